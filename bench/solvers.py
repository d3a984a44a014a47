#!/usr/bin/env python3
"""Speed of GPTQ: the sample DiT and square layers, ours and a plain GPTQ in torch (torch_gptq.py) on the same CPU with as many threads.

    bench/solvers.py [--model examples/dit-fashion] [--threads 1 2] [--inputs 1024 2048 4096] [--runs 3]

Both factor H, damp it by 1 %, take groups of 128 at 4 bits whose parameters are halves, and measure nothing. Ours searches parameters and visits the inputs in
balanced order, its defaults, without refine. Torch has them from the range of the group ("min-max") or, like with like, from a search too ("searched"). Its
columns come in blocks of 128, as published. Shortest of several runs by turns. The second moments are those of random correlated inputs: what is timed does
not depend on their values. On a machine with other work torch's threads wait for each other: time one thread there.
"""

import argparse
import glob
import os
import re
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


def ours(layers, threads, refine=0):
    return lambda: [aq.gptq(w, h, 4, 128, refine=refine, measure=False, as_numpy=True, threads=threads) for w, h in layers]


def theirs(layers, search):
    tensors = [(torch.from_numpy(w), torch.from_numpy(h)) for w, h in layers]
    return lambda: [torch_gptq(w, h, 4, 128, search=search) for w, h in tensors]


def row(name, layers, threads, runs):
    torch.set_num_threads(threads)
    mine, plain, searched = shortest(runs, ours(layers, threads), theirs(layers, False), theirs(layers, True))
    print(f"| {name} | {threads} | {mine:.3f} s | {plain:.3f} s, {plain / mine:.1f} × | {searched:.3f} s, {searched / mine:.1f} × |", flush=True)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=os.path.join(here, "../examples/dit-fashion")), p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--inputs", type=int, nargs="*", default=[1024, 2048, 4096]), p.add_argument("--runs", type=int, default=3)
    a = p.parse_args()
    rng = np.random.default_rng(0)

    weights = {}
    for path in sorted(glob.glob(os.path.join(a.model, "transformer", "*.safetensors"))):
        weights.update({k: v.astype(np.float32) for k, v in load_file(path).items()})
    blocks = [w for k, w in weights.items() if re.match(r"transformer_blocks\.\d+\..*weight$", k) and w.ndim == 2 and ".emb." not in k]
    moments = {n: moment(n, rng) for n in {w.shape[1] for w in blocks}}
    dit = [(w, moments[w.shape[1]]) for w in blocks]
    squares = {n: [(rng.standard_normal((n, n), dtype=np.float32) * 0.05, moment(n, rng))] for n in a.inputs}

    print("| | threads | ours | torch, min-max | torch, searched |\n|---|---|---|---|---|")
    for threads in a.threads:
        row(f"sample DiT, {len(dit)} layers", dit, threads, a.runs)
        for n, layers in squares.items():
            row(f"{n} × {n}", layers, threads, a.runs if n < 4096 else 1)
    for threads in a.threads:
        print(f"sample DiT with 3 rounds of refine, {threads} threads: {shortest(a.runs, ours(dit, threads, 3))[0]:.2f} s (asked: 5)")


if __name__ == "__main__":
    main()
