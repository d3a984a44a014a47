"""Layers on packed codes against torch on the same machine, in the same run: F.linear in float32 and bfloat16, and torch's _weight_int4pack_mm_for_cpu.

Usage: python bench/bench_linear.py [--threads 1,2] [--rounds N]
N = K = 1024, groups of 128, several layers in turn so that weights do not stay in the second-level cache. Each figure is the best of the rounds, in which all
candidates run one after the other. Ours is called as arrow_quant_v2.torch calls it.
"""

import argparse
import time

import numpy as np
import torch
from arrow_quant_v2 import _core

SIZE, LAYERS, GROUP = 1024, 32, 128
KINDS = [(4, "f16"), (8, "f16"), (2, "f16"), (4, "two-level")]


def ours(weights, bits, params, threads):
    group = 256 if params == "two-level" else GROUP
    stored = [_core._quantize_stored(w, bits, group, params, "rtn") for w in weights]

    def run(x, y):
        for codes, parameters, form in stored:
            _core._linear_stored(x.numpy(), codes, parameters, None, y.numpy(), len(x), SIZE, SIZE, bits, group, form, threads)

    return run


def plain(weights, dtype):
    tensors = [torch.from_numpy(w).to(dtype) for w in weights]

    def run(x, y):
        x = x.to(dtype)
        for w in tensors:
            torch.nn.functional.linear(x, w)

    return run


def int4pack(weights):
    rng = np.random.default_rng(1)
    codes = [torch.from_numpy(rng.integers(0, 16, (SIZE, SIZE), dtype=np.int32)) for _ in weights]
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(c, 1) for c in codes]
    params = torch.rand((SIZE // GROUP, SIZE, 2), dtype=torch.bfloat16)

    def run(x, y):
        x = x.to(torch.bfloat16)
        for w in packed:
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, params)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", default="1,4,8,16,49,256,1024")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((SIZE, SIZE), dtype=np.float32) for _ in range(LAYERS)]
    print(f"torch {torch.__version__}, {_core.simd_level()}, N = K = {SIZE}, {LAYERS} layers in turn; microseconds a layer, and how many times as fast ours is")
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        others = {"F32": plain(weights, torch.float32), "BF16": plain(weights, torch.bfloat16), "int4pack": int4pack(weights)}
        own = {f"INT{bits} {params}": ours(weights, bits, params, threads) for bits, params in KINDS}
        for rows in map(int, args.rows.split(",")):
            x, y = torch.from_numpy(rng.standard_normal((rows, SIZE), dtype=np.float32)), torch.empty((rows, SIZE))
            best = {}
            with torch.inference_mode():
                for _ in range(args.rounds if rows < 1024 else 3):
                    for name, run in {**own, **others}.items():
                        start = time.perf_counter()
                        run(x, y)
                        best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
            us = {name: seconds / LAYERS * 1e6 for name, seconds in best.items()}
            print(f"{threads} threads, {rows:4d} rows:  " + "  ".join(f"{name} {t:.0f}" for name, t in us.items()))
            for name in own:
                print(f"    {name:14s} " + "  ".join(f"x {other} {us[other] / us[name]:.2f}" for other in others))


if __name__ == "__main__":
    main()
