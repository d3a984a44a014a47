#!/usr/bin/env python3
"""Chooses a group size for each layer by its sensitivity, and writes the allocation as JSON.

    scripts/granularity_allocation.py --model models/dit --output allocation.json --method variance --target-compression 10

The same as `arrowquant plan MODEL -o FILE --sensitivity METHOD --target-compression X …`.
The methods gradient and hessian need calibration (--calib). Accuracy and
compression are estimates; the accuracy measured on the weights at the chosen sizes is printed beside them. Exit code 0 or 1.
"""

import argparse
import sys
from pathlib import Path

import arrow_quant_v2 as aq
from arrow_quant_v2._jobs import config_from_sources


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n")


def arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a .safetensors file, an index, or a model folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--method", choices=["gradient", "hessian", "variance"], default="gradient")
    parser.add_argument("--num-samples", type=int, default=32, help="samples the calibration was meant to hold (for the record)")
    parser.add_argument("--min-accuracy", type=float, default=0.70, help="least estimated accuracy of a layer")
    parser.add_argument("--target-compression", type=float, default=10.0, help="compression that counts 1 in the objective")
    parser.add_argument("--accuracy-weight", type=float, default=0.7, help="of accuracy against compression, 0 to 1")
    parser.add_argument("--bit-width", type=int, default=2)
    parser.add_argument("--available-sizes", type=int, nargs="+", default=[32, 64, 128, 256], metavar="SIZE")
    parser.add_argument("--calib", type=Path, help="calibration file of arrow_quant_v2.torch.Recorder, with gradients for the method gradient")
    return parser.parse_args()


def show(allocation):
    summary = allocation.report["summary"]
    print(f"layers: {summary['num_layers']}, {summary['bit_width']} bits, analysed in {allocation.analysis_time_s:.2f} s")
    print(f"average accuracy: {summary['avg_accuracy']:.3f} (estimated; measured {summary['measured_accuracy']:.4f}, off by {summary['estimate_error']:+.3f})")
    print(f"average compression: {summary['avg_compression']:.2f} (estimated; target {summary['target_compression']:.2f})")
    print("group sizes:")
    for size, count in summary["group_sizes"].items():
        print(f"  {size:>4}: {count} layers")
    print("most sensitive layers:")
    for s in sorted(allocation.layer_sensitivities, key=lambda s: (-s.sensitivity_score, s.layer_name))[:10]:
        print(f"  {s.sensitivity_score:.3f}  group {allocation.layer_group_sizes[s.layer_name]:>3}  {s.layer_name}")


def main():
    args = arguments()
    try:
        config = config_from_sources()
        config.bit_width = args.bit_width
        if args.calib:
            config.calibration_path = str(args.calib)
        settings = aq.GranularityConfig(
            sensitivity_method=args.method,
            num_samples=args.num_samples,
            target_compression_ratio=args.target_compression,
            min_accuracy=args.min_accuracy,
            available_group_sizes=args.available_sizes,
            accuracy_weight=args.accuracy_weight,
        )
        allocation = aq.GranularityAllocator(settings).allocate(args.model, config)
        allocation.save(args.output)
    except (aq.ArrowQuantError, OSError, MemoryError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(allocation)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
