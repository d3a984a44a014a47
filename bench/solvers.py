#!/usr/bin/env python3
"""Speed of the solvers: all block linears of the sample DiT, and ours against a plain GPTQ in torch on the same CPU and threads.

    bench/solvers.py [--model examples/dit-fashion] [--threads 2] [--inputs 1024] [--runs 3]

The second moments are those of random correlated inputs: what is timed does not depend on their values. Shortest of several interleaved runs.
"""

import argparse
import glob
import os
import re
import resource
import time

import arrow_quant_v2 as aq
import numpy as np
import torch
from safetensors.numpy import load_file
from torch_gptq import gptq as torch_gptq


def moment(n, rng):
    x = rng.standard_normal((2 * n, n), dtype=np.float32)
    x[:, 1:] += 0.8 * x[:, :-1]
    return x.T @ x / len(x)


def shortest(runs, *functions):
    best = [float("inf")] * len(functions)
    for _ in range(runs):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=os.path.join(here, "../examples/dit-fashion")), p.add_argument("--threads", type=int, default=2)
    p.add_argument("--inputs", type=int, default=1024), p.add_argument("--runs", type=int, default=3)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    rng = np.random.default_rng(0)

    weights = {}
    for path in sorted(glob.glob(os.path.join(a.model, "transformer", "*.safetensors"))):
        weights.update({k: v.astype(np.float32) for k, v in load_file(path).items()})
    layers = [w for k, w in weights.items() if re.match(r"transformer_blocks\.\d+\..*weight$", k) and w.ndim == 2 and ".emb." not in k]
    moments = {n: moment(n, rng) for n in {w.shape[1] for w in layers}}

    def whole(**options):
        return lambda: [aq.gptq(w, moments[w.shape[1]], 4, 64, as_numpy=True, threads=a.threads, **options) for w in layers]

    plain, refined = shortest(a.runs, whole(refine=0), whole())
    print(f"sample DiT, {len(layers)} layers, {sum(w.size for w in layers)} weights: gptq {plain:.2f} s, with 3 rounds of refine {refined:.2f} s (asked: 5)")

    n = a.inputs
    w, h = rng.standard_normal((n, n), dtype=np.float32) * 0.05, moment(n, rng)
    tw, th = torch.from_numpy(w), torch.from_numpy(h)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours, theirs, product = shortest(
        a.runs,
        lambda: aq.gptq(w, h, 4, 128, refine=0, as_numpy=True, threads=a.threads),
        lambda: torch_gptq(tw, th, 4, 128),
        lambda: tw @ th,
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{n} x {n}, groups of 128: ours {ours:.2f} s, plain torch {theirs:.2f} s, {theirs / ours:.1f} times as long (asked: 5)")
    print(f"ours takes {ours / product:.1f} of torch's products; memory grew by {grown:.0f} MB, H takes {h.nbytes / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
