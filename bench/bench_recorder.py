"""What recording calibration costs beside the forward passes it watches, on the sample DiT: with second moments and without them.

Usage: python bench/bench_recorder.py [--batch N] [--passes N] [--pairs N] [--threads N] [--mixed] [--cpu]
A pair is a run of the plain model and one that is recorded; the figure is the median over the pairs of recorded / plain - 1, in brackets the quartiles. Rows
for H are gathered and multiplied some hundred at a time, so that a pass costs more or less: a run has many, at random timesteps.
Aims on a quiet machine at batch 16: below 30 % with second moments, below 5 % without.
"""

import argparse
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
    parser.add_argument("--passes", type=int, default=25, help="forward passes of a run")
    parser.add_argument("--pairs", type=int, default=9)
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

    def run():
        seconds = 0.0
        for _ in range(arguments.passes):
            t = torch.randint(0, 1000, (arguments.batch if arguments.mixed else 1,)).expand(arguments.batch).contiguous()
            start = clock()
            model(x, timestep=t, class_labels=labels)
            seconds += clock() - start
        return seconds / arguments.passes

    what = "a timestep for each sample" if arguments.mixed else "one timestep for the batch"
    print(f"sample DiT, batch {arguments.batch}, {torch.get_num_threads()} threads, {what}, {arguments.pairs} pairs of {arguments.passes} passes")
    for name, options in KINDS.items():
        recorder, plain, costs = Recorder(model, None, threads=arguments.threads, **options), [], []
        with torch.no_grad():
            for i in range(arguments.pairs + 1):
                seconds = run()
                with recorder:
                    cost = run() / seconds - 1
                if i:  # the first pair warms everything up
                    plain.append(seconds)
                    costs.append(cost)
        low, middle, high = statistics.quantiles(costs)
        print(f"  {name:<20} {middle * 100:+5.1f} %   ({low * 100:+.1f}, {high * 100:+.1f})   of a pass of {statistics.median(plain) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
