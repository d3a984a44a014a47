#!/usr/bin/env python3
"""Packs a quantized model into one archive with a manifest of its files and their SHA-256, after checking it.

    scripts/package_model.py --model dit-int4 --output dit-int4.tar.gz --target edge --max-size 35MB
    scripts/package_model.py --model dit-int4 --output manifest.json --manifest-only

The same model gives the same archive: names are sorted, times and owners left out.
Exit code 0, or 1 when the model is damaged, too large or below --min-accuracy.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import arrow_quant_v2 as aq
from arrow_quant_v2._jobs import bytes_of


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n")


def arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="container folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.tar.gz", help="with --manifest-only FILE.json")
    parser.add_argument("--manifest-only", action="store_true")
    parser.add_argument("--target", help="where it is to run (edge, local, cloud …), for the manifest")
    parser.add_argument("--max-size", help="largest size of the files, as in 35MB")
    parser.add_argument("--min-accuracy", type=float, help="least mean cosine similarity that the container holds of itself")
    parser.add_argument("--skip-validation", action="store_true", help="do not read every tensor")
    parser.add_argument("--compression-level", type=int, choices=range(10), default=6, metavar="0-9")
    parser.add_argument("--verbose", action="store_true", help="every file")
    parser.add_argument("--quiet", action="store_true", help="errors only")
    return parser.parse_args()


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def manifest_of(args):
    """What is packed, or an exception that says why it may not be."""
    files = sorted((p for p in args.model.rglob("*") if p.is_file()), key=lambda p: p.relative_to(args.model).as_posix())
    size = sum(p.stat().st_size for p in files)
    if args.max_size is not None and size > bytes_of(args.max_size):
        raise ValueError(f"{args.model}: {size} bytes are more than --max-size {args.max_size}")
    cosine = None
    if not args.skip_validation or args.min_accuracy is not None:
        report = aq.verify(args.model)
        cosine = report["summary"]["cosine"]
        if not report["ok"]:
            raise ValueError(f"{args.model}: {report['problems'][0]}")
        if args.min_accuracy is not None and (cosine is None or cosine < args.min_accuracy):
            raise ValueError(f"{args.model}: mean cosine similarity {cosine} is below {args.min_accuracy}")
    with aq.open(args.model) as container:
        metadata = {k: container.metadata.get(k) for k in ("modality", "schema_version", "arrowquant_version", "summary")}
    entries = [{"path": p.relative_to(args.model).as_posix(), "size_bytes": p.stat().st_size, "sha256": sha256(p)} for p in files]
    return {
        "name": args.model.resolve().name,
        "target": args.target,
        "size_bytes": size,
        "cosine_similarity": cosine,
        "validated": cosine is not None,
        **metadata,
        "files": entries,
    }


def add(archive, name, data, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    archive.addfile(info, data)


def pack(args, manifest):
    """Writes beside the target and renames, so that no half archive stays."""
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    text = json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"
    try:
        with (
            open(temporary, "wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=args.compression_level, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            add(archive, f"{manifest['name']}/manifest.json", io.BytesIO(text), len(text))
            for entry in manifest["files"]:
                with open(args.model / entry["path"], "rb") as f:
                    add(archive, f"{manifest['name']}/{entry['path']}", f, entry["size_bytes"])
        os.replace(temporary, args.output)
    finally:
        temporary.unlink(missing_ok=True)


def main():
    args = arguments()
    try:
        manifest = manifest_of(args)
        if args.manifest_only:
            args.output.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            pack(args, manifest)
    except (aq.ArrowQuantError, OSError, MemoryError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.verbose:
        for entry in manifest["files"]:
            print(f"{entry['sha256']}  {entry['size_bytes']:>12}  {entry['path']}")
    if not args.quiet:
        print(f"{args.output}: {len(manifest['files'])} files, {manifest['size_bytes'] / 1e6:.2f} MB, {args.output.stat().st_size / 1e6:.2f} MB as written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
