#!/usr/bin/env python3
"""Measures a quantized model against its source, layer by layer.

    scripts/validate_quantization.py --original models/dit --quantized dit-int4 --per-layer-threshold 0.95 --fail-on-threshold --report report.json

A damaged or incomplete container is an error: exit code 1. Accuracy below a threshold is a warning, and with --fail-on-threshold exit code 1 too.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import arrow_quant_v2 as aq

BY_BITS = {2: 0.70, 4: 0.90, 8: 0.95}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n")


def arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="the source model")
    parser.add_argument("--quantized", type=Path, required=True, help="the container")
    parser.add_argument("--min-accuracy", type=float, help="least mean cosine similarity (default: by --bit-width, else the stored configuration's)")
    parser.add_argument("--bit-width", type=int, choices=sorted(BY_BITS), help="takes the least mean of that width: 0.70, 0.90 or 0.95")
    parser.add_argument("--per-layer-threshold", type=float, help="least cosine similarity of each layer (default: the stored configuration's)")
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    parser.add_argument("--html-report", type=Path, metavar="FILE.html", help="one page of sizes, errors and histograms, measured against the source")
    parser.add_argument("--fail-on-threshold", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="every layer")
    parser.add_argument("--quiet", action="store_true", help="errors only")
    return parser.parse_args()


def report_of(args):
    verified = aq.verify(args.quantized, args.original, min_accuracy=0)  # only what is damaged is a problem; thresholds are applied here
    with aq.open(args.quantized) as f:
        stored = f.config.get("min_accuracy", 0.85)
    least = args.min_accuracy if args.min_accuracy is not None else BY_BITS.get(args.bit_width, stored)
    per_layer = args.per_layer_threshold if args.per_layer_threshold is not None else stored
    layers = [t for t in verified["tensors"] if t["measured"] == "against" and t["bits"] is not None]
    cosines = {t["name"]: t["cosine"] for t in layers}
    below = [f"layer {name}: cosine similarity {c:.6f} is below {per_layer}" for name, c in cosines.items() if c < per_layer]
    mean = verified["summary"]["cosine"]
    if mean is not None and mean < least:
        below.insert(0, f"mean cosine similarity {mean:.6f} is below {least}")
    return {
        "validation": {
            "cosine_similarity": mean,
            "compression_ratio": verified["summary"]["compression_ratio"],
            "model_size_mb": verified["summary"]["model_size_mb"],
            "min_accuracy": least,
            "per_layer_threshold": per_layer,
            "passed": not below and verified["ok"],
        },
        "results": [
            {key: t[key] for key in ("name", "bits", "bytes", "cosine", "sqnr_db", "max_error")} | {"passed": t["cosine"] >= per_layer} for t in layers
        ],
        "statistics": {
            "min": min(cosines.values(), default=None),
            "max": max(cosines.values(), default=None),
            "mean": statistics.fmean(cosines.values()) if cosines else None,
            "std": statistics.pstdev(cosines.values()) if cosines else None,
        },
        "per_layer_accuracy": cosines,
        "warnings": below + verified["warnings"],
        "errors": verified["problems"],
    }


def main():
    args = arguments()
    try:
        report = report_of(args)
        if args.html_report:
            aq.report(args.quantized, args.html_report, against=args.original, overwrite=True)
    except (aq.ArrowQuantError, OSError, MemoryError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    validation = report["validation"]
    if args.verbose:
        for layer in report["results"]:
            print(f"  {layer['cosine']:.6f}  {layer['bits']} bits  {layer['name']}")
    if not args.quiet:
        for warning in report["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        verdict = "passed" if validation["passed"] else "not passed"
        print(f"{args.quantized}: {verdict}, cosine {validation['cosine_similarity'] or 0:.6f}, {validation['model_size_mb']:.2f} MiB")
    for problem in report["errors"]:
        print(f"error: {problem}", file=sys.stderr)
    if args.report:
        args.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if report["errors"] or (args.fail_on_threshold and not validation["passed"]) else 0


if __name__ == "__main__":
    sys.exit(main())
