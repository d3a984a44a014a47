#!/usr/bin/env python3
"""Quantizes one model, or several listed in a file.

    scripts/quantize_diffusion.py --model models/dit --output dit-int4 --profile local
    scripts/quantize_diffusion.py --batch jobs.json --output-dir quantized --report report.json

A batch file holds {"jobs": [{"model_path": …, "output_path": …, and settings by their field names}]}. Settings count in this order: those of a job, options,
ARROW_QUANT_* environment variables, the --config file, the profile, the defaults. Exit code 0, or 1 when a job failed.
"""

import argparse
import copy
import json
import logging
import sys
from pathlib import Path

import arrow_quant_v2 as aq
from arrow_quant_v2._jobs import config_from_sources

OPTIONS = ("bit_width", "modality", "num_time_groups", "group_size", "min_accuracy", "calibration_samples", "fail_fast", "enable_time_aware", "enable_spatial")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n")


def arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="a .safetensors file, an index, or a model folder")
    what.add_argument("--batch", type=Path, metavar="FILE.json", help="jobs to run one after the other")
    parser.add_argument("--output", type=Path, help="folder to write (with --model)")
    parser.add_argument("--output-dir", type=Path, help="folder for outputs that have no path of their own")
    parser.add_argument("--config", type=Path, help="YAML or JSON file of settings")
    parser.add_argument("--profile", choices=["edge", "local", "cloud"])
    parser.add_argument("--bit-width", type=int)
    parser.add_argument("--modality", choices=["text", "code", "image", "audio"])
    parser.add_argument("--num-time-groups", type=int)
    parser.add_argument("--group-size", type=int)
    for part in ("time-aware", "spatial"):
        field = f"enable_{part.replace('-', '_')}"
        switch = parser.add_mutually_exclusive_group()
        switch.add_argument(f"--enable-{part}", dest=field, action="store_true", default=None)
        switch.add_argument(f"--disable-{part}", dest=field, action="store_false")
    parser.add_argument("--min-accuracy", type=float)
    parser.add_argument("--calibration-samples", type=int)
    parser.add_argument("--fail-fast", action="store_true", default=None, help="stop at the first layer below the floor")
    parser.add_argument("--verbose", action="store_true", help="tell every step")
    parser.add_argument("--quiet", action="store_true", help="tell errors only")
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    return parser, parser.parse_args()


def jobs_of(args):
    """[(model path, output path, settings of the job)]"""
    if args.batch:
        jobs = json.loads(args.batch.read_text(encoding="utf-8"))["jobs"]
    else:
        jobs = [{"model_path": args.model} | ({"output_path": args.output} if args.output else {})]
    found = []
    for number, job in enumerate(jobs, 1):
        job = dict(job)
        if "model_path" not in job:
            raise ValueError(f"job {number} has no model_path")
        model, output = Path(job.pop("model_path")), job.pop("output_path", None)
        if output is None and args.output_dir is None:
            raise ValueError(f"job {number} has no output_path, and there is no --output or --output-dir")
        found.append((model, Path(output) if output is not None else args.output_dir / model.with_suffix("").name, job))
    return found


def config_of(args, job):
    config = copy.copy(config_from_sources(args.profile, args.config))
    for name in OPTIONS:
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    for name, value in job.items():
        setattr(config, name, value)
    return config


def run(args, model, output, job):
    """The result dict of one job; with `error` in place of figures when it failed."""
    told = (lambda message, fraction: print(f"  {fraction:4.0%}  {message}")) if args.verbose else None
    try:
        result = aq.ArrowQuantV2().quantize_diffusion_model(model, output, config_of(args, job), told)
    except (aq.ArrowQuantError, OSError, MemoryError, ValueError, TypeError, AttributeError) as error:
        print(f"error: {model}: {error}", file=sys.stderr)
        return {"model_path": str(model), "quantized_path": str(output), "error": str(error)}
    if not args.quiet:
        print(
            f"{model} -> {result['quantized_path']}: {result['model_size_mb']:.2f} MiB, {result['bits_per_weight'] or 0:.2f} bits per weight,"
            f" {result['compression_ratio']:.2f} times smaller, cosine {result['cosine_similarity'] or 0:.6f}, {result['quantization_time_s']:.1f} s"
        )
    return {"model_path": str(model)} | result


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def report_of(results):
    good = [r for r in results if "error" not in r]
    summary = {
        "total_jobs": len(results),
        "successful": len(good),
        "failed": len(results) - len(good),
        "success_rate": len(good) / len(results) if results else None,
        "total_size_mb": sum(r["model_size_mb"] for r in good),
        "avg_compression_ratio": mean(r["compression_ratio"] for r in good),
        "avg_cosine_similarity": mean(r["cosine_similarity"] for r in good),
        "total_time_s": sum(r["quantization_time_s"] for r in good),
    }
    return {"summary": summary, "results": results}


def main():
    parser, args = arguments()
    level = logging.DEBUG if args.verbose else logging.ERROR if args.quiet else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        jobs = jobs_of(args)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.batch or args.model}: {error}")
    results = [run(args, *job) for job in jobs]
    if args.report:
        args.report.write_text(json.dumps(report_of(results), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if any("error" in r for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
