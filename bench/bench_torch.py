"""Layers over packed codes in torch: speed of the forward pass as ratios to torch's own layers in the same run, what 16-bit inputs cost, and memory.

Usage: python bench/bench_torch.py [--size 1024] [--seconds N] [--only weights|inputs] [--skip-speed] [--skip-memory]
For each number of rows and threads: ours at 8, 4 and 2 bits, F32 and BF16 F.linear, and torch's int4 kernel for CPUs; then layers whose inputs are coded with
8 bits, ours and torch's dynamically quantized one, as the tables of bench/README.md. All take turns of about a millisecond for `seconds`, so that a slow moment
of the machine meets all of them; every figure is the best turn.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from arrow_quant_v2.torch import IntegerLinear, QuantLinear, StoredForm


def candidates(size):
    """name -> function of x [rows, size] in float32."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(size, size, bias=False)
    half = torch.nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    found = {"F32 F.linear": linear, "BF16 F.linear": lambda x: half(x.bfloat16())}
    for bits, group, params in ((8, 128, "f16"), (4, 128, "f16"), (4, 256, "two-level"), (2, 256, "two-level")):
        layer = QuantLinear.from_linear(linear, StoredForm(bits, group, params), "rtn")
        found[f"ours INT{bits} {params}"] = layer
    codes = torch.randint(0, 16, (size, size), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(size // 128, size, 2, dtype=torch.bfloat16)
    found["torch int4pack"] = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, 128, scales)
    return found


def with_coded_inputs(size):
    """The same of layers on integers: one static pair, and each row by its own range."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(size, size, bias=False)
    found = {"F32 F.linear": linear}
    groups = [{"time_range": (0, 1000), "scale": 8 / 255, "zero_point": 127.3, "group_size": 64}]
    for bits, group, params in ((8, 128, "f16"), (4, 128, "f16"), (4, 256, "two-level"), (2, 256, "two-level")):
        layer = QuantLinear.from_linear(linear, StoredForm(bits, group, params), "rtn")
        found[f"W{bits}A8 {params} static"] = IntegerLinear(layer, groups, "static")
        found[f"W{bits}A8 {params} dynamic"] = IntegerLinear(layer, mode="dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have us use another package for that
        found["torch dynamic int8"] = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8)
    return found


def seconds(function, x, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function(x)
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def bench_speed(size, duration, found):
    print(f"N = K = {size}: GFLOP/s and ratio to F32 F.linear\n\n| threads, rows | " + " | ".join(found) + " |\n|" + "---|" * (len(found) + 1))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (1, 4, 49, 256, 1024):
            x, work = torch.randn(rows, size), 2e-9 * rows * size * size
            calls = max(1, int(0.05 / work))
            best, end = dict.fromkeys(found, float("inf")), time.perf_counter() + duration
            while time.perf_counter() < end:
                for name, function in found.items():
                    best[name] = min(best[name], seconds(function, x, calls))
            cells = (f"{work / best[name]:.1f} ({best['F32 F.linear'] / best[name]:.2f})" for name in found)
            print(f"| {threads}, {rows} | " + " | ".join(cells) + " |", flush=True)


def bench_call():
    """What a call costs besides the product: layers of 64 x 64."""
    torch.set_num_threads(1)
    linear = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    layer, x = QuantLinear.from_linear(linear, StoredForm(4, 64, "f16"), "rtn"), torch.randn(1, 64)
    wanted = {"ours": (layer, x), "ours where torch sees the operator": (layer, x.clone().requires_grad_()), "F32 F.linear": (linear, x)}
    best = dict.fromkeys(wanted, float("inf"))
    for _ in range(200):
        for name, (function, given) in wanted.items():
            best[name] = min(best[name], seconds(function, given, 50))
    print("\na call of a layer of 64 x 64, one row: " + ", ".join(f"{name} {1e6 * best[name]:.1f} us" for name in wanted))


def decibels(exact, got):
    return float(10 * torch.log10((exact**2).sum() / ((got.double() - exact) ** 2).sum()))


def inputs_of(kind, rows, size):
    """Rows as layers see them: normal; normal with a few channels 100 times as wide; normal with single values 1000 times as large; spread over 12 octaves."""
    x = torch.randn(rows, size)
    if kind == "100-fold channels":
        x[:, ::97] *= 100
    elif kind == "1000-fold values":
        x[torch.rand(rows, size) < 1 / 512] *= 1000
    elif kind == "heavy tails":
        x *= torch.exp2(12 * torch.rand(rows, size))
    return x


@torch.no_grad()
def bench_accuracy(size, rows=256):
    """How far y is from the exact product with the values that the codes stand for: ours, and torch's layers of F32 and BF16 on the same values."""
    torch.manual_seed(1)
    kinds = ("normal", "100-fold channels", "1000-fold values", "heavy tails")
    print("\nSNR of the product against that in F64, dB\n\n| | " + " | ".join(kinds) + " |\n|" + "---|" * (len(kinds) + 1))
    inputs = [inputs_of(kind, rows, size) for kind in kinds]
    linear = torch.nn.Linear(size, size, bias=False)
    for bits, group, params in ((8, 128, "f16"), (4, 128, "f16"), (4, 256, "two-level"), (2, 256, "two-level")):
        layer = QuantLinear.from_linear(linear, StoredForm(bits, group, params), "rtn")
        cells = (f"{decibels(x.double() @ layer.matrix().double().T, layer(x)):.1f}" for x in inputs)
        print(f"| ours INT{bits} {params} | " + " | ".join(cells) + " |", flush=True)
    weight = layer.matrix()
    for name, function in (("F32", lambda x: x @ weight.T), ("BF16", lambda x: (x.bfloat16() @ weight.bfloat16().T).float())):
        print(f"| {name} F.linear | " + " | ".join(f"{decibels(x.double() @ weight.double().T, function(x)):.1f}" for x in inputs) + " |", flush=True)


@torch.no_grad()
def bench_model(images=64):
    """SNR of the sample DiT's noise prediction against the F32 model: with our layers, and with F32 layers on the values that the same codes stand for."""
    from arrow_quant_v2.torch import quantize_module
    from diffusers import DiTTransformer2DModel

    here = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples", "dit-fashion")
    torch.manual_seed(2)
    x, steps, labels = torch.randn(images, 1, 28, 28), torch.arange(images) * 1000 // images, torch.arange(images) % 10

    def predict(model):
        return model(x, timestep=steps, class_labels=labels).sample.double()

    exact = predict(DiTTransformer2DModel.from_pretrained(here, subfolder="transformer"))
    for bits, group, params in ((8, 64, "f16"), (4, 64, "f16"), (2, 64, "f16")):
        model = DiTTransformer2DModel.from_pretrained(here, subfolder="transformer")
        quantize_module(model, bits=bits, group=group, params=params, modality="image")
        ours = decibels(exact, predict(model))
        for name, part in list(model.named_modules()):
            if isinstance(part, QuantLinear):
                plain = torch.nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
                plain.weight.copy_(part.matrix())
                if part.bias is not None:
                    plain.bias.copy_(part.bias)
                setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], plain)
        print(f"noise prediction of the sample DiT, INT{bits}: {ours:.3f} dB, with F32 layers on the same values {decibels(exact, predict(model)):.3f} dB")


LOAD = """
import resource, sys, torch
import arrow_quant_v2 as aq
from arrow_quant_v2.torch import load_into
def rss():
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmRSS'))
with torch.device('meta'):
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(int(sys.argv[2]))])
torch.nn.functional.linear(torch.randn(8, 64), torch.randn(64, 64)), torch.ops.arrowquant
import arrow_quant_v2.torch.load
before = rss()
load_into(model, sys.argv[1])
with torch.no_grad():
    x = torch.randn(64, 2048)
    for layer in model:
        layer(x)
print(rss() - before)
"""


def bench_memory(n_layers=64):
    import arrow_quant_v2 as aq
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        source, out = os.path.join(folder, "model.safetensors"), os.path.join(folder, "int4")
        torch.manual_seed(0)
        save_file({f"{i}.{k}": torch.randn(s).bfloat16() for i in range(n_layers) for k, s in (("weight", (2048, 2048)), ("bias", (2048,)))}, source)
        aq.quantize(source, out, bits=4, modality="image")
        size = sum(os.path.getsize(os.path.join(out, f)) for f in os.listdir(out) if f.endswith(".parquet"))
        done = subprocess.run([sys.executable, "-c", LOAD, out, str(n_layers)], capture_output=True, text=True, check=True)
        grown = int(done.stdout)
        print(f"\nmemory of a loaded model after a forward pass: {grown / 1e6:.0f} MB, its files {size / 1e6:.0f} MB: ratio {grown / size:.2f} (at most 1.1)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=4, help="for each number of rows and threads")
    parser.add_argument("--only", choices=("weights", "inputs"), help="one of the two tables of speed, and nothing else")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    args = parser.parse_args()
    for table, make in (("weights", candidates), ("inputs", with_coded_inputs)):
        if not args.skip_speed and args.only in (None, table):
            bench_speed(args.size, args.seconds, make(args.size))
    if args.only:
        return
    if not args.skip_speed:
        bench_call()
    bench_accuracy(args.size)
    bench_model()
    if not args.skip_memory:
        bench_memory()


if __name__ == "__main__":
    main()
