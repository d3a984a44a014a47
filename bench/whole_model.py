"""Whole-model benchmark: time, memory and start-up of the arrowquant program on a made 4 GB model.

The model: random BF16, 200 layers of 4096 x 2560, in sharded safetensors files of 1 GB. Printed, all measured in this run, caches dropped before each step:
  copy     plain read of the source's bytes, and plain write (with fsync) of as many bytes as the output has
  kernel   conversion to F32 and quantization of the same tensors from memory (`aq_bench model`), all threads
  run      wall time and peak resident memory of `arrowquant quantize`
and their ratio run / (copy + kernel); then the start-up time of `arrowquant version`.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import time

import numpy as np

ROWS, COLS, LAYERS, LAYERS_PER_SHARD = 4096, 2560, 200, 48
CHUNK = 1 << 22


def make_model(folder, layers):
    """Writes the sharded model once; layers have different scales so that no two are equal."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    size = ROWS * COLS * 2
    shards = [range(i, min(i + LAYERS_PER_SHARD, layers)) for i in range(0, layers, LAYERS_PER_SHARD)]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {
            f"blocks.{i}.linear.weight": {"dtype": "BF16", "shape": [ROWS, COLS], "data_offsets": [k * size, (k + 1) * size]} for k, i in enumerate(shard)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for i in shard:
                values = np.random.default_rng(i).standard_normal(ROWS * COLS, dtype=np.float32) * np.float32(0.02 + 0.0001 * i)
                f.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                weight_map[f"blocks.{i}.linear.weight"] = name
    (folder / "config.json").write_text('{"architectures": ["DiTTransformer2DModel"]}\n')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size * layers}, "weight_map": weight_map}))


def drop_caches(paths):
    """Writes back and forgets the cached pages of some files; needs no privilege."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_seconds(paths):
    drop_caches(paths)
    start = time.perf_counter()
    buffer = bytearray(CHUNK)
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - start


def write_seconds(path, size):
    buffer = os.urandom(CHUNK)
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as f:
        left = size
        while left > 0:
            left -= f.write(buffer[: min(left, CHUNK)])
        os.fsync(f.fileno())
    seconds = time.perf_counter() - start
    os.unlink(path)
    return seconds


def quantize(program, model, out, options):
    """Returns (wall seconds, peak resident bytes) of one run."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    process = subprocess.Popen([program, "quantize", str(model), "-o", str(out), "-q", *options])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, f"arrowquant quantize failed: status {status}"
    return seconds, usage.ru_maxrss * 1024


def kernel_seconds(bench, model, options):
    """Seconds of conversion and quantization alone, from memory."""
    done = subprocess.run([bench, "model", str(model), *options], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[1].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/release/arrowquant")
    parser.add_argument("--bench", default="build/release/aq_bench")
    parser.add_argument("--folder", default="build/bench", help="where the model and outputs go (needs 6 GB)")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    folder = pathlib.Path(arguments.folder)
    model, out = folder / f"model-{arguments.layers}", folder / "out"
    make_model(model, arguments.layers)
    sources = sorted(model.glob("*.safetensors"))
    source_bytes = sum(p.stat().st_size for p in sources)
    print(f"model: {arguments.layers} layers of {ROWS} x {COLS} BF16, {len(sources)} shards, {source_bytes / 1e9:.2f} GB")

    cases = {
        "int4 g128 rtn": ["--bits", "4", "--method", "rtn"],
        "int8 g128 rtn": ["--bits", "8", "--method", "rtn"],
        "int4 g128 search": ["--bits", "4", "--method", "search"],
    }
    for title, options in cases.items():
        walls, ratios, peaks = [], [], []
        for _ in range(arguments.runs):
            drop_caches(sources)
            wall, peak = quantize(arguments.program, model, out, options)
            written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
            read, write = read_seconds(sources), write_seconds(folder / "written", written)
            kernel = kernel_seconds(arguments.bench, model, options)
            ratio = wall / (read + write + kernel)
            walls.append(wall), peaks.append(peak), ratios.append(ratio)
            parts = f"read {read:.2f} s, write {write:.2f} s ({written / 1e9:.2f} GB), kernel {kernel:.2f} s"
            print(f"  {title}: run {wall:.2f} s; {parts}; ratio {ratio:.2f}, peak {peak / 1e6:.0f} MB", flush=True)
        speed = source_bytes / 1e9 / statistics.median(walls)
        print(f"{title}: median ratio {statistics.median(ratios):.2f} (at most 1.5), {speed:.2f} GB/s, peak memory {max(peaks) / 1e6:.0f} MB (at most 600)")
    shutil.rmtree(out, ignore_errors=True)

    starts = []
    for _ in range(30):
        start = time.perf_counter()
        subprocess.run([arguments.program, "version"], stdout=subprocess.DEVNULL, check=True)
        starts.append(time.perf_counter() - start)
    middle, worst = 1e3 * statistics.median(starts), 1e3 * max(starts)
    print(f"start-up of `arrowquant version`: median {middle:.1f} ms, worst of {len(starts)} {worst:.1f} ms (at most 20)")


if __name__ == "__main__":
    main()
