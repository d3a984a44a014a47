"""What recording calibration costs beside the forward passes it watches, on the sample DiT: with second moments and without them.

Usage: python bench/bench_recorder.py [--batch N] [--rounds N] [--threads N] [--mixed] [--cpu]
Each round runs the plain model and each kind of recording one after the other; the figure is the median over the rounds of time with / time without - 1.
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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--passes", type=int, default=5, help="forward passes timed in a round")
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
        start = clock()
        for i in range(arguments.passes):
            t = torch.randint(0, 1000, (arguments.batch,)) if arguments.mixed else torch.full((arguments.batch,), i * 1000 // arguments.passes)
            model(x, timestep=t, class_labels=labels)
        return (clock() - start) / arguments.passes

    recorders = {name: Recorder(model, None, threads=arguments.threads, **options) for name, options in KINDS.items()}
    plain, costs = [], {name: [] for name in KINDS}
    with torch.no_grad():
        for i in range(arguments.rounds + 1):
            before = run()
            for name, recorder in recorders.items():
                with recorder:
                    seconds = run()
                after = run()
                if i:  # the first round warms everything up
                    costs[name].append(seconds / ((before + after) / 2) - 1)
                    plain.append(after)
                before = after
    what = "a timestep for each sample" if arguments.mixed else "one timestep for the batch"
    print(f"sample DiT, batch {arguments.batch}, {torch.get_num_threads()} threads, {what}: forward pass {min(plain) * 1e3:.1f} ms at best")
    for name, found in costs.items():
        print(f"  {name:<22} +{statistics.median(found) * 100:5.1f} %   (of {len(found)} rounds {min(found) * 100:.1f} … {max(found) * 100:.1f})")


if __name__ == "__main__":
    main()
