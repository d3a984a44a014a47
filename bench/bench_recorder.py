"""What recording calibration costs beside the forward passes it watches, on the sample DiT: with second moments and without them.

Usage: python bench/bench_recorder.py [--batch N] [--pairs N] [--threads N] [--mixed] [--cpu]
A pair is one pass of the plain model and one that is recorded, each timed after another of its kind, so that a slow moment of the machine falls on both; the
figure is the median pass with recording over the median pass without, in brackets the same of the first and the third quartiles.
Aims on a quiet machine at batch 16: below 30 % with second moments, below 5 % without.
"""

import argparse
import itertools
import pathlib
import statistics
import time
import warnings

import torch
from arrow_quant_v2.torch import Recorder
from diffusers import DiTTransformer2DModel

SAMPLE = pathlib.Path(__file__).resolve().parents[1] / "examples" / "dit-fashion"
KINDS = {
    "without H": {"hessian": False},
    "with H": {},
    "with H, pooled": {"hessian_pooled": True},
    "with H of every row": {"hessian_full": 0},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0, help="of torch and of the library; 0: all")
    parser.add_argument("--mixed", action="store_true", help="a timestep of its own for each sample, instead of one for the batch")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall time; with --threads 1 it says something on a busy machine too")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = DiTTransformer2DModel.from_pretrained(SAMPLE, subfolder="transformer").eval()
    x, labels = torch.randn(arguments.batch, 1, 28, 28), torch.randint(0, 10, (arguments.batch,))

    steps = itertools.cycle(range(0, 1000, 100))

    def one_pass():
        t = torch.randint(0, 1000, (arguments.batch,)) if arguments.mixed else torch.full((arguments.batch,), next(steps))
        start = clock()
        model(x, timestep=t, class_labels=labels)
        return clock() - start

    what = "a timestep for each sample" if arguments.mixed else "one timestep for the batch"
    print(f"sample DiT, batch {arguments.batch}, {torch.get_num_threads()} threads, {what}, {arguments.pairs} pairs of passes")
    for name, options in KINDS.items():
        recorder, plain, recorded = Recorder(model, None, threads=arguments.threads, **options), [], []
        with torch.no_grad():
            for i in range(arguments.pairs + 3):
                one_pass()
                seconds = one_pass()
                with recorder:
                    one_pass()
                    more = one_pass()
                if i >= 3:  # the first ones warm everything up
                    plain.append(seconds)
                    recorded.append(more)
        low, middle, high = (b / a - 1 for a, b in zip(statistics.quantiles(plain), statistics.quantiles(recorded), strict=True))
        print(f"  {name:<20} {middle * 100:+5.1f} %   ({low * 100:+.1f}, {high * 100:+.1f})   of a pass of {statistics.median(plain) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
