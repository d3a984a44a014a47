#!/usr/bin/env python3
"""Searches group sizes per layer by evolution, every genome measured, and quantizes the model with the best.

    scripts/evolutionary_search.py --model models/dit --output dit-evolved --bit-width 2 --target-metric balanced --save-results results.json

The same seed gives the same answer. Exit code 0 or 1.
"""

import argparse
import json
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
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--population-size", type=int, default=20)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--mutation-rate", type=float, default=0.2)
    parser.add_argument("--crossover-rate", type=float, default=0.7)
    parser.add_argument("--elite-ratio", type=float, default=0.1)
    parser.add_argument("--target-metric", choices=["cosine_similarity", "accuracy", "compression_ratio", "balanced"], default="cosine_similarity")
    parser.add_argument("--max-evaluations", type=int, default=200)
    parser.add_argument("--bit-width", type=int, default=4)
    parser.add_argument("--profile", choices=["edge", "local", "cloud"], default="local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-results", type=Path, nargs="?", const=Path(), metavar="FILE.json", help="without a name: OUTPUT-evolution.json")
    parser.add_argument("--verbose", action="store_true", help="every generation and every layer")
    return parser.parse_args()


def main():
    args = arguments()
    try:
        config = config_from_sources(args.profile)
        config.bit_width = args.bit_width
        search = aq.EvolutionarySearch(
            args.population_size,
            args.generations,
            args.mutation_rate,
            args.crossover_rate,
            args.elite_ratio,
            args.target_metric,
            args.max_evaluations,
            args.seed,
        )
        result = search.search(args.model, args.output, config)
        if args.save_results is not None:
            name = f"{args.output}-evolution.json" if args.save_results == Path() else args.save_results
            Path(name).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except (aq.ArrowQuantError, OSError, MemoryError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    best = result["best"]
    if args.verbose:
        for g in result["generation_history"]:
            print(f"generation {g['generation']}: best {g['best_fitness']:.6f}, mean {g['avg_fitness']:.6f}, worst {g['worst_fitness']:.6f}")
        for name, size in best["layer_group_sizes"].items():
            print(f"  group {size:>3}  {name}")
    metrics = best["metrics"]
    print(f"{args.target_metric} {best['fitness']:.6f} after {result['total_evaluations']} evaluations")
    print(f"cosine similarity {metrics['cosine_similarity']:.6f}, layers {metrics['compression_ratio']:.2f} times smaller; wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
