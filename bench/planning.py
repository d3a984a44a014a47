"""Error against size: uniform INT2, INT4 and INT8, and plans at their sizes and at five budgets between them, on the sample models.

Usage: python bench/planning.py --models DIR --data DIR [--work DIR] [--only dit|text] [--data-free] [--json FILE] [--svg FILE]
DIR holds dit-fashion and mdlm-text (models), fashion-calib.npz, fashion-test2k.npz, text-calib.jsonl and text-heldout.txt (data).
Writes what docs/planning.md shows: a table per model on stdout, the curves as SVG.
`--weights` compares what a layer's error may count by instead: its size, recorded gradients of the output, and probing (one 4-bit rounding of the layer, run).
`--speed N` plans a synthetic model of N layers with 1M weights each instead.

Calibration is recorded as a user does, with gradients="output".
"""

import argparse
import importlib.util
import json
import math
import pathlib
import tempfile
import time

import arrow_quant_v2 as aq
import numpy as np
import torch
from arrow_quant_v2.torch import Recorder


def db(error, reference):
    return -10 * math.log10(max(error / reference, 1e-20))


class Dit:
    """Noise prediction: relative squared error of ε on test images, over timesteps that cover the schedule."""

    name, what, timestep = "dit-fashion", "ε SNR, dB", "timestep"

    def __init__(self, models, data):
        from diffusers import DDIMScheduler, DiTTransformer2DModel

        self.path = models / "dit-fashion"
        self.model = DiTTransformer2DModel.from_pretrained(self.path, subfolder="transformer").eval()
        self.scheduler = DDIMScheduler.from_pretrained(self.path, subfolder="scheduler")
        self.calibration, self.test = self.batches(data / "fashion-calib.npz", 512, 1), self.batches(data / "fashion-test2k.npz", 256, 0)

    def batches(self, file, n, seed):
        z = np.load(file)
        x = torch.from_numpy(z["images"][:n]).float().reshape(-1, 1, 28, 28) / 127.5 - 1
        y = torch.from_numpy(z["labels"][:n].astype(np.int64))
        t = (torch.arange(n) * 7919 % n * 1000 // n).long()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        xt = self.scheduler.add_noise(x, noise, t)
        return [(xt[i : i + 32], t[i : i + 32], y[i : i + 32]) for i in range(0, n, 32)]

    def run(self, batch):
        x, t, y = batch
        return self.counted(self.model(x, timestep=t, class_labels=y))

    def counted(self, out):
        return out.sample


class Text:
    """Masked language model: relative squared error of the logits of masked bytes in held-out text, their mean taken off."""

    name, what, timestep = "mdlm-text", "logit SNR, dB", "t"

    def __init__(self, models, data):
        self.path = models / "mdlm-text"
        spec = importlib.util.spec_from_file_location("modeling", self.path / "modeling.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.mask, self.model = module.MASK, module.MDLM.from_pretrained(self.path)
        texts = [json.loads(line)["text"] for line in (data / "text-calib.jsonl").read_text().splitlines()]
        held = (data / "text-heldout.txt").read_text(errors="ignore")
        self.calibration = self.batches(" ".join(texts), 256, 1)
        self.test = self.batches(held, 128, 0)

    def batches(self, text, n, seed):
        bytes_ = torch.tensor([b for b in text.encode() if b < 128])
        length = self.model.seq_len
        x = torch.stack([bytes_[s : s + length] for s in torch.linspace(0, len(bytes_) - length - 1, n).long().tolist()])
        t = ((torch.arange(n) * 37 % n).float() + 0.5) / n * 0.9 + 0.05
        masked = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < t[:, None]
        return [(x[i : i + 16].masked_fill(masked[i : i + 16], self.mask), t[i : i + 16], masked[i : i + 16]) for i in range(0, n, 16)]

    def run(self, batch):
        ids, t, self.masked = batch
        return self.counted(self.model(ids, t))

    def counted(self, out):
        return (out - out.mean(-1, keepdim=True))[self.masked]


class Bench:
    def __init__(self, subject, work):
        self.s, self.work = subject, work
        self.weights = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
        with torch.no_grad():
            self.outputs = [subject.run(b) for b in subject.test]
        self.power = sum((o**2).sum().item() for o in self.outputs)
        self.calib = str(work / f"{subject.name}.aqcal")
        if not pathlib.Path(self.calib).exists():  # of an earlier run in the same --work folder
            self.record()

    def record(self):
        with torch.no_grad(), Recorder(self.s.model, self.calib, self.s.timestep, gradients="output", output=self.s.counted, seed=2, overwrite=True):
            for batch in self.s.calibration:
                self.s.run(batch)

    def probed(self, names, batches=2):
        """What a relative output error of 1 in each layer costs, from the error of the model with that layer alone at 4 bits."""
        calibration, some = aq.Calibration.open(self.calib), self.s.calibration[:batches]
        with torch.no_grad():
            before, costs = [self.s.run(b) for b in some], {}
            for name in names:
                weight, h = self.s.model.get_parameter(name), np.asarray(calibration.hessian(name))
                solved = aq.gptq(self.weights[name].reshape(len(weight), -1).numpy(), h, 4, 64, as_numpy=True)
                weight.copy_(torch.from_numpy(np.asarray(aq.dequantize(solved), np.float32)).reshape(weight.shape))
                error = sum(((self.s.run(b) - o) ** 2).sum().item() for b, o in zip(some, before, strict=True))
                costs[name] = error * 10 ** (solved["output_sqnr_db"] / 10)
                weight.copy_(self.weights[name])
        return costs

    def error(self, container):
        """Squared error of the model with the container's weights, and dB."""
        with aq.open(container) as c:
            names = [n for n in c.keys() if n in self.weights]
            state = {n: torch.from_numpy(np.asarray(c[n].dequantize(), dtype=np.float32)).reshape(self.weights[n].shape) for n in names}
        self.s.model.load_state_dict(self.weights | state)
        with torch.no_grad():
            error = sum(((self.s.run(b) - o) ** 2).sum().item() for b, o in zip(self.s.test, self.outputs, strict=True))
        self.s.model.load_state_dict(self.weights)
        return db(error, self.power)

    def quantize(self, label, **settings):
        out = self.work / f"{self.s.name}-{label}"
        r = aq.quantize(self.s.path, out, overwrite=True, **settings)
        return {"label": label, "bytes": r.size, "db": self.error(out), "bpw": r.bpw, "fallbacks": r.report["summary"]["fallbacks"]}

    def uniform(self, bits, calibrated):
        return self.quantize(f"int{bits}", bits=bits, min_accuracy=0.0, **({"calib": self.calib} if calibrated else {}))

    def planned(self, budget, calibrated, **how):
        settings = {"calib": self.calib} if calibrated else {}
        p = aq.plan(self.s.path, min_accuracy=0.0, cache_dir=self.work / "cache", **({} if budget is None else {"target_size": budget}), **settings, **how)
        path = self.work / "plan.json"
        p.save(path, overwrite=True)
        row = self.quantize("plan", plan_path=str(path), min_accuracy=0.0, **settings)
        bits = {b: sum(layer.bits == b for layer in p.layers.values()) for b in (2, 4, 8, 16)}
        return row | {"budget": budget, "predicted": p.size, "estimated_db": p.sqnr_db, "layers": bits, "weighting": p.summary["weighting"]}


def measure(bench, calibrated, between=5, **how):
    uniform = [bench.uniform(bits, calibrated) for bits in (2, 4, 8)]
    low, high = uniform[0]["bytes"], uniform[-1]["bytes"]
    budgets = [u["bytes"] for u in uniform]
    budgets += [round(low * (high / low) ** (k / (between + 1))) for k in range(1, between + 1)]
    plans = []
    for budget in sorted(budgets):
        row = bench.planned(budget, calibrated, **how)
        if row["bytes"] > budget:
            raise SystemExit(f"{bench.s.name}: written {row['bytes']} bytes exceed the budget of {budget}")
        same = [u for u in uniform if u["bytes"] == budget]
        row["against"] = same[0]["label"] if same else None
        row["gain_db"] = row["db"] - same[0]["db"] if same else None
        if same:  # what the choice among the layers alone gives, embeddings and projections kept as the uniform run keeps them
            row["same_layers_db"] = bench.planned(budget, calibrated, skip_sensitive_layers=True, **how)["db"]
        plans.append(row)
    return {"model": bench.s.name, "what": bench.s.what, "calibrated": calibrated, "uniform": uniform, "plans": plans}


def table(result):
    heading = [
        "budget, MB",
        "written, MB",
        "used",
        result["what"],
        "same size, uniform",
        "gain, dB",
        "gain, same layers open",
        "layers at 2 / 4 / 8 bits / kept",
    ]
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    by = {u["label"]: u for u in result["uniform"]}
    for p in result["plans"]:
        cells = [f"{p['budget'] / 1e6:.3f}", f"{p['bytes'] / 1e6:.3f}", f"{100 * p['bytes'] / p['budget']:.1f} %", f"{p['db']:.1f}", "", "", ""]
        if p["against"]:
            uniform = by[p["against"]]["db"]
            cells[4:] = [f"{uniform:.1f} ({p['against'].upper()})", f"{p['gain_db']:+.1f}", f"{p['same_layers_db'] - uniform:+.1f}"]
        lines.append(f"| {' | '.join([*cells, ' / '.join(str(n) for n in p['layers'].values())])} |")
    return "\n".join(lines)


def weightings(bench):
    """dB of plans that keep embeddings and projections, at 2.63 and 4.5 bits per weight, by what a layer's error counts by."""
    same = {"skip_sensitive_layers": True}
    names = aq.plan(bench.s.path, calib=bench.calib, min_accuracy=0.0, cache_dir=bench.work / "cache", **same).layers
    kinds = {"size": {name: bench.weights[name].numel() ** 0.5 for name in names}, "gradients of the output": None, "probed": bench.probed(names)}
    lines = [f"| {bench.s.what}, by | at most 2.63 bits | at most 4.5 bits |", "|---|---|---|"]
    for kind, weights in kinds.items():
        rows = [bench.planned(None, True, target_bpw=bpw, **({} if weights is None else {"layer_weights": weights}), **same) for bpw in (2.63, 4.5)]
        lines.append(f"| {kind} | " + " | ".join(f"{row['db']:.1f} ({row['bpw']:.2f})" for row in rows) + " |")
    return "\n".join(lines)


def svg(results, path):
    """Both curves of each result, without a plotting library."""
    width, height, pad = 420, 300, 46
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(results)}" height="{height}" font-family="sans-serif" font-size="11">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for k, r in enumerate(results):
        points = r["uniform"] + r["plans"]
        x0, x1 = (math.log(f(p["bytes"] for p in points)) for f in (min, max))
        y0, y1 = min(p["db"] for p in points) - 2, max(p["db"] for p in points) + 2

        def at(p, k=k, x0=x0, x1=x1, y0=y0, y1=y1):
            x = k * width + pad + (math.log(p["bytes"]) - x0) / (x1 - x0) * (width - 2 * pad)
            return x, height - pad - (p["db"] - y0) / (y1 - y0) * (height - 2 * pad)

        title = f"{r['model']}, {'calibrated' if r['calibrated'] else 'without calibration'}"
        parts.append(f'<text x="{k * width + pad}" y="20" font-weight="bold">{title}</text>')
        parts.append(f'<text x="{k * width + pad}" y="36">{r["what"]} against MB (logarithmic); solid: plan, dashed: uniform</text>')
        left, bottom = k * width + pad, height - pad
        parts.append(f'<path d="M{left} {pad} V{bottom} H{(k + 1) * width - pad}" stroke="#888" fill="none"/>')
        for value in range(int(math.ceil(y0 / 10)) * 10, int(y1) + 1, 10):
            y = at({"bytes": math.exp(x0), "db": value})[1]
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value}</text><path d="M{left - 3} {y:.1f} h3" stroke="#888"/>')
        for p in r["uniform"]:
            x = at(p)[0]
            parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{p["bytes"] / 1e6:.2f}</text>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 28}" text-anchor="middle">{p["label"].upper()}</text>')
        for rows, style in ((r["plans"], 'stroke="#1a6"'), (r["uniform"], 'stroke="#c33" stroke-dasharray="4 3"')):
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, sorted(rows, key=lambda p: p["bytes"])))
            parts.append(f'<polyline points="{line}" fill="none" {style} stroke-width="1.6"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="white" {style.split(" stroke-dash")[0]}/>' for x, y in map(at, rows)]
    pathlib.Path(path).write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def speed(n_layers):
    """Seconds to plan n_layers of 1024 x 1024 F16 weights, without a cache."""
    from arrow_quant_v2 import _core  # noqa: F401 - loaded before the clock starts

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.safetensors"
        entries = {f"blocks.{i}.w.weight": {"dtype": "F16", "shape": [1024, 1024], "data_offsets": [i << 21, (i + 1) << 21]} for i in range(n_layers)}
        header = json.dumps(entries).encode()
        rng = np.random.default_rng(0)
        with open(path, "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            for i in range(n_layers):
                f.write((rng.standard_normal(1 << 20, dtype=np.float32) * (1 + i % 7)).astype(np.float16).tobytes())
        start = time.perf_counter()
        p = aq.plan(path, target_bpw=4.0, min_accuracy=0.0)
        seconds = time.perf_counter() - start
        print(f"{n_layers} layers of 1M weights planned in {seconds:.2f} s, {p.size / 1e6:.1f} MB, {p.bpw:.3f} bits per weight")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, help="keeps containers and calibration (a temporary folder)")
    parser.add_argument("--only", choices=["dit", "text"])
    parser.add_argument("--data-free", action="store_true", help="without calibration")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--svg", type=pathlib.Path)
    parser.add_argument("--weights", action="store_true", help="compare weightings of the layers instead")
    parser.add_argument("--speed", type=int, metavar="N")
    arguments = parser.parse_args()
    if arguments.speed:
        return speed(arguments.speed)
    if not arguments.models or not arguments.data:
        parser.error("--models and --data are needed")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or pathlib.Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for name, kind in (("dit", Dit), ("text", Text)):
            if arguments.only in (None, name):
                bench = Bench(kind(arguments.models, arguments.data), work)
                if arguments.weights:
                    print(f"\n{bench.s.name}\n\n{weightings(bench)}", flush=True)
                    continue
                result = measure(bench, not arguments.data_free)
                results.append(result)
                print(f"\n{result['model']}\n\n{table(result)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.svg:
        svg(results, arguments.svg)


if __name__ == "__main__":
    main()
