"""The Python module against what it must reach, and against group-wise 4-bit quantization of quanto and torchao on the same arrays and threads.

Usage: python bench/bench_python.py [--threads N ...] [--rounds N] [--peers]
Peers that are not installed are skipped with a line. Every figure is the best of the rounds; --peers: only the comparison. Beside it stands the time that
reading the arrays alone takes with the same threads: no quantizer can be faster.
"""

import argparse
import asyncio
import logging
import math
import os
import resource
import subprocess
import sys
import tempfile
import time

import arrow_quant_v2 as aq
import numpy as np


def best(f, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = f()
        times.append(time.perf_counter() - start)
        del result
    return min(times)


class LibraryTime(logging.Handler):
    """Keeps the library's own time, which each batch call logs."""

    def emit(self, record):
        self.seconds = record.args[2]


def bench_import(rounds):
    code = "import time; t = time.perf_counter(); import arrow_quant_v2; print(time.perf_counter() - t)"
    seconds = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(rounds))
    print(f"import                              {seconds * 1e3:8.2f} ms   (must be below 50)")


def bench_overhead(rounds):
    rng = np.random.default_rng(0)
    weights = {f"layer{i}": rng.standard_normal((1000, 1000), dtype=np.float32) for i in range(100)}
    logger, handler = logging.getLogger("arrow_quant_v2"), LibraryTime()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    quantizer = aq.ArrowQuantV2()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    totals, overheads = [], []
    for i in range(rounds):
        start = time.perf_counter()
        result = quantizer.quantize_batch(weights, 4, as_numpy=True)
        totals.append(time.perf_counter() - start)
        overheads.append(totals[-1] - handler.seconds)
        if i == 0:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024
            size = sum(r["quantized_data"].nbytes + r["scales"].nbytes + r["zero_points"].nbytes for r in result.values()) / 2**20
        del result
    logger.setLevel(logging.WARNING)
    given = sum(w.nbytes for w in weights.values())
    print(f"quantize_batch, 100 of 1000 x 1000  {min(totals) * 1e3:8.2f} ms   {given / min(totals) / 1e9:.2f} GB/s of float32")
    print(f"  above the library's own time      {min(overheads) * 1e3:8.2f} ms   (must be below 2)")
    print(f"  memory grew by {grown:.0f} MiB: the result is {size:.0f} MiB, the input, which is not copied, {given / 2**20:.0f} MiB")


async def longest_pauses(work):
    """Runs a coroutine beside one that wakes up each millisecond; seconds of work, and how much too late the latest and the median wake-up came."""
    late, done = [], False

    async def ticker():
        while not done:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - start - 0.001)

    task, start = asyncio.create_task(ticker()), time.perf_counter()
    await work()
    seconds, done = time.perf_counter() - start, True
    await task
    return seconds, max(late), sorted(late)[len(late) // 2]


def bench_event_loop():
    """The event loop while a model of 40 layers is searched on all threads."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "model.safetensors")
        save_file({f"blocks.{i}.proj.weight": rng.standard_normal((1024, 1024), dtype=np.float32) for i in range(40)}, source)
        config = aq.DiffusionQuantConfig(bit_width=4, modality="image", fail_fast=False)

        async def quiet():
            await asyncio.sleep(1)

        async def quantize():
            await aq.AsyncArrowQuantV2().quantize_diffusion_model_async(source, os.path.join(folder, "out"), config)

        for name, work in (("nothing", quiet), ("a model", quantize)):
            seconds, longest, median = asyncio.run(longest_pauses(work))
            print(f"event loop beside {name:<18}{seconds * 1e3:8.0f} ms   wake-ups late by {median * 1e3:.2f} ms (median), {longest * 1e3:.1f} ms at most")


def modules(arrays):
    """The arrays as the weights of linear layers: what the peers' public functions take."""
    import torch

    layers = torch.nn.Sequential(*[torch.nn.Linear(a.shape[1], a.shape[0], bias=False) for a in arrays])
    for layer, a in zip(layers, arrays, strict=True):
        layer.weight = torch.nn.Parameter(torch.from_numpy(a), requires_grad=False)
    return layers


def quanto_public(arrays, group):
    from optimum.quanto import freeze, qint4, quantize

    layers = modules(arrays)
    start = time.perf_counter()
    quantize(layers, weights=qint4)
    freeze(layers)
    return time.perf_counter() - start


def quanto_inner(arrays, group):
    import torch
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    tensors = [torch.from_numpy(a) for a in arrays]
    start = time.perf_counter()
    for t in tensors:
        scale, shift = MaxOptimizer()(t, qint4, 0, group)
        quantize_weight(t, qtype=qint4, axis=0, scale=scale, shift=shift, group_size=group, optimized=False)
    return time.perf_counter() - start


def torchao_public(arrays, group):
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layers = modules(arrays)
    start = time.perf_counter()
    quantize_(layers, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)))
    return time.perf_counter() - start


def torchao_inner(arrays, group):
    import torch
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quant_primitives import MappingType

    tensors = [torch.from_numpy(a) for a in arrays]
    start = time.perf_counter()
    for t in tensors:
        IntxUnpackedToInt8Tensor.from_hp(t, (1, group), torch.int4, mapping_type=MappingType.ASYMMETRIC)
    return time.perf_counter() - start


PEERS = (
    ("optimum-quanto, quantize + freeze", quanto_public),
    ("torchao, quantize_(IntxWeightOnlyConfig)", torchao_public),
    ("optimum-quanto, quantize_weight alone", quanto_inner),
    ("torchao, from_hp alone (codes not packed)", torchao_inner),
)


def reading(arrays):
    """The sum of all values: what the memory gives."""
    import torch

    tensors = [torch.from_numpy(a) for a in arrays]
    start = time.perf_counter()
    for t in tensors:
        t.sum()
    return time.perf_counter() - start


def ours_on(weights, group, threads):
    start = time.perf_counter()
    result = aq.quantize_batch(weights, 4, group=group, threads=threads, as_numpy=True)
    seconds = time.perf_counter() - start
    del result
    return seconds


def bench_peers(n_layers, size, group, threads, rounds):
    """All candidates in turn, round after round, so that a busy moment of the machine falls on none of them alone."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((size, size), dtype=np.float32) for _ in range(n_layers)]
    weights = {f"layer{i}": a for i, a in enumerate(arrays)}
    candidates = {"ours": lambda: ours_on(weights, group, threads), "reading": lambda: reading(arrays)}
    candidates |= {name: lambda run=run: run(arrays, group) for name, run in PEERS}
    best, skipped = {}, {}
    for _ in range(max(3, rounds)):
        for name, run in candidates.items():
            if name in skipped:
                continue
            try:
                if name != "ours":
                    import torch

                    torch.set_num_threads(threads)
                    with torch.no_grad():
                        seconds = run()
                else:
                    seconds = run()
            except Exception as e:
                skipped[name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
                continue
            best[name] = min(best.get(name, seconds), seconds)
    given, ours, read = n_layers * size * size * 4 / 1e9, best["ours"], best.get("reading", math.nan)
    print(f"{n_layers} of {size} x {size}, 4 bits, groups of {group}, {threads} threads: {ours * 1e3:.2f} ms, {given / ours:.1f} GB/s")
    print(f"  reading alone: {read * 1e3:.2f} ms, {given / read:.1f} GB/s; ours works at {read / ours:.0%} of that")
    for name, _ in PEERS:
        if name in skipped:
            print(f"  {name}: skipped ({skipped[name]})")
        else:
            print(f"  {name}: {best[name] * 1e3:.1f} ms, {best[name] / ours:.1f} times ours, {best[name] / read:.1f} times reading")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--peers", action="store_true", help="only the comparison with the peers")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"arrow_quant_v2 {aq.__version__}, {aq.simd_level()}, {args.threads} threads")
    if not args.peers:
        bench_import(args.rounds)
        bench_overhead(args.rounds)
        bench_event_loop()
    # 128 does not divide 1000: the peers take 200. (quanto's quantize() chooses by itself: there a whole row of 1000.)
    for n_layers, size, group in ((100, 1000, 200), (32, 1024, 128), (8, 2048, 128), (4, 4096, 128)):
        for threads in args.threads:
            bench_peers(n_layers, size, group, threads, args.rounds)


if __name__ == "__main__":
    main()
