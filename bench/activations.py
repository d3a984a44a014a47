"""What 8-bit activations cost, by how their scale is chosen: one static pair for all timesteps, one for each group of timesteps, or dynamic per token.

Usage: python bench/activations.py [--shared FOLDER] [--work FOLDER] [--images N] [--passages N] [--models dit,text] [--bits 8,4]
                                  [--set 'smooth="none"'] [--calib-seed S] [--spatial [--skip-images N] [--seeds K]]

docs/activations.md holds what it prints.

FOLDER holds models/, data/ and eval/ of the sample models. Each model is recorded once (Recorder), quantized by arrow_quant_v2.quantize with that calibration
and --act-bits 8, loaded into its own torch modules (load_into) and run on integers (integer_activations). The weights of the three
kinds come from the same calibration and settings; equalization is chosen by measured output error, for one static pair and for time groups each by its own.
Image: SNR of the noise prediction against the F32 model, in dB, per tenth of the schedule (eval_dit.py). Text: KL per masked byte and cross entropy of the
masked bytes, per tenth of the mask ratio (the passages and masks of eval_mdlm.py).

--spatial: what the spatial parts are worth with 4-bit weights and 8-bit inputs, on K disjoint splits of the test images after the first N, each with noise of
its own. Nothing was chosen by those images. Two measures: the mean over the layers of each one's relative squared output error, under the inputs that the F32
model gives it, and the relative squared error of the noise prediction.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import tempfile
import warnings

import arrow_quant_v2 as aq
import numpy as np
import torch
from arrow_quant_v2.activations import static_pair
from arrow_quant_v2.torch import IntegerLinear, Recorder, integer_activations, load_into

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODES = ("static", "time", "dynamic")
SPATIAL_MODES = ("time", "static", "dynamic")
LABELS = {"f32": "weights only", "static": "one static pair", "time": "10 time groups", "dynamic": "dynamic per token"}
GROUPS = 10


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Image:
    """The sample DiT: noise prediction on test images."""

    title, unit, parts = "dit-fashion", "SNR of the noise prediction in dB", "tenth of the schedule, from clean to noise"

    def __init__(self, shared, arguments):
        from diffusers import DDIMScheduler

        self.eval, self.path = module_of(shared / "eval/eval_dit.py"), shared / "models/dit-fashion"
        self.data, self.calib = shared / "data/fashion-test2k.npz", shared / "data/fashion-calib.npz"
        self.scheduler = DDIMScheduler.from_pretrained(self.path, subfolder="scheduler")
        self.reference, self.images, self.skip = self.eval.load(str(self.path)), arguments.images, arguments.skip_images
        self.calib_seed = arguments.calib_seed
        self.settings = {"modality": "image"}

    def candidate(self):
        return self.eval.load(str(self.path))

    @torch.no_grad()
    def record(self, path):
        x, t, y, eps = self.eval.noise_batch(self.calib, 512, seed=self.calib_seed)
        noisy = self.scheduler.add_noise(x, eps, t)
        with Recorder(self.reference, path, groups=GROUPS, modality="image", data_name="fashion-calib"):
            for i in range(0, 512, 64):
                self.reference(noisy[i : i + 64], timestep=t[i : i + 64], class_labels=y[i : i + 64])

    def integer(self, model, mode, path=None):
        self.context, self.folded = integer_activations(model, mode, timestep="timestep"), folded(path)

    def split(self, k):
        """The k-th split of the test images that no choice was made by: (noisy images, timesteps that cover the schedule evenly, labels), in batches of 64."""
        z, n, first = np.load(self.data), self.images, self.skip + k * self.images
        if first + n > len(z["images"]):
            raise SystemExit(f"--skip-images {self.skip}: {len(z['images'])} test images hold no {k + 1} splits of {n}")
        x = torch.from_numpy(z["images"][first : first + n]).float().reshape(-1, 1, 28, 28) / 127.5 - 1
        t, y = torch.arange(n) * 7919 % n * 1000 // n, torch.from_numpy(z["labels"][first : first + n].astype(np.int64))
        noisy = self.scheduler.add_noise(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + k)), t)
        return [(noisy[i : i + 64], t[i : i + 64], y[i : i + 64]) for i in range(0, n, 64)]

    @torch.no_grad()
    def errors(self, model, batches):
        """(mean relative squared error of the layers' outputs under the reference's own inputs, relative squared error of the noise prediction)"""
        scales, shifts, outputs = self.folded
        layers = {name: part for name, part in model.named_modules() if isinstance(part, IntegerLinear)}
        error, power = dict.fromkeys(["model", *layers], 0.0), dict.fromkeys(["model", *layers], 0.0)

        def add(name, candidate, original):
            error[name] += (candidate - original).double().square().sum().item()
            power[name] += original.double().square().sum().item()

        def hook(name):
            def compare(module, inputs, output):
                by, plus = outputs.get(name, (1, 0))
                add(name, layers[name]((inputs[0] - shifts.get(name, 0)) * scales.get(name, 1)) * by + plus, output)

            return self.reference.get_submodule(name).register_forward_hook(compare)

        for x, t, y in batches:
            handles = [hook(name) for name in layers]
            with self.context.at(t):
                original = self.reference(x, timestep=t, class_labels=y).sample
            for handle in handles:
                handle.remove()
            add("model", model(x, timestep=t, class_labels=y).sample, original)
        return np.mean([error[name] / power[name] for name in layers]), error["model"] / power["model"]

    def measure(self, model):
        out = self.eval.eps_error(self.reference, model, self.scheduler, self.data, self.images)
        return {"all": out["eps_snr_db"], "parts": [float(-10 * np.log10(v)) for v in out["eps_rel_mse_per_tenth"]]}


class Text:
    """The text model: distributions at masked positions of held-out text."""

    title, unit, parts = "mdlm-text", "KL per masked byte, in thousandths of a nat", "tenth of the mask ratio"

    def __init__(self, shared, arguments):
        self.eval, self.path = module_of(shared / "eval/eval_mdlm.py"), shared / "models/mdlm-text"
        self.text, self.calib = shared / "data/text-heldout.txt", shared / "data/text-calib.jsonl"
        self.reference, self.passages = self.eval.load(str(self.path)), arguments.passages
        self.settings, self.calib_seed = {"modality": "text"}, arguments.calib_seed

    def candidate(self):
        return self.eval.load(str(self.path))

    @torch.no_grad()
    def record(self, path):
        n, g = self.reference.seq_len, torch.Generator().manual_seed(self.calib_seed)
        rows = [[b for b in json.loads(line)["text"].encode() if b < 128][:n] for line in self.calib.read_text().splitlines()]
        ids = torch.tensor([row for row in rows if len(row) == n][:512])
        t = ((torch.arange(len(ids)) * 37 % len(ids)).float() + 0.5) / len(ids)
        masked = torch.rand(ids.shape, generator=g) < t[:, None]
        with Recorder(self.reference, path, timestep="t", scale=1.0, groups=GROUPS, modality="text", data_name="text-calib"):
            for i in range(0, len(ids), 32):
                self.reference(ids[i : i + 32].masked_fill(masked[i : i + 32], 128), t[i : i + 32])

    def integer(self, model, mode):
        integer_activations(model, mode, timestep="t", scale=1.0)

    @torch.no_grad()
    def measure(self, model):
        """As eval_mdlm.text_error, with the cross entropy per tenth too."""
        n, g = self.reference.seq_len, torch.Generator().manual_seed(0)
        data = torch.tensor([b for b in self.text.read_bytes() if b < 128])
        x = torch.stack([data[s : s + n] for s in torch.linspace(0, len(data) - n - 1, self.passages).long().tolist()])
        t = ((torch.arange(self.passages) * 37 % self.passages).float() + 0.5) / self.passages * 0.9 + 0.05
        masked = torch.rand(x.shape, generator=g) < t[:, None]
        kl, nll, count = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
        for i in range(0, self.passages, 16):
            xi, ti, mi = x[i : i + 16], t[i : i + 16], masked[i : i + 16]
            ids = xi.masked_fill(mi, 128)
            r, c = (f(ids, ti)[mi].double().log_softmax(-1) for f in (self.reference, model))
            part = (ti[:, None].expand(mi.shape)[mi] * 10).long().clamp(max=9)
            kl.index_add_(0, part, (r.exp() * (r - c)).sum(-1))
            nll.index_add_(0, part, -c.gather(-1, xi[mi][:, None])[:, 0])
            count.index_add_(0, part, torch.ones(len(part), dtype=torch.float64))
        return {
            "all": 1000 * (kl.sum() / count.sum()).item(),
            "parts": (1000 * kl / count).tolist(),
            "cross_entropy": (nll.sum() / count.sum()).item(),
            "cross_entropy_parts": (nll / count).tolist(),
        }


def folded(path):
    """Where equalization is folded: what the operations before layers make of their inputs, (x - m) s, as {layer: s} and {layer: m}, and how the outputs of
    linear layers that are such operations become the original's, y a + b, as {layer: (a, b)}."""
    scales, shifts, outputs = {}, {}, {}
    if path is None:
        return scales, shifts, outputs
    with aq.open(path) as f:
        for name, tensor in f.items():
            layer = name.removesuffix(".weight")
            if tensor.equalization_folded:
                scales[layer] = torch.tensor(tensor.equalization_scales)
            if tensor.folded_shift is not None:
                shifts[layer] = torch.tensor(tensor.folded_shift)
        for fold in json.loads((pathlib.Path(path) / "metadata.json").read_text())["folds"]:
            consumer = fold["consumers"][0].removesuffix(".weight")
            for part in (p for p in fold["producer"] if p["tensor"].endswith(".bias")):
                by, plus = outputs.setdefault(part["tensor"].removesuffix(".bias"), (torch.ones(f[part["tensor"]].shape), torch.zeros(f[part["tensor"]].shape)))
                rows = slice(part["row_begin"], part["row_begin"] + fold["inputs"])
                by[rows] = 1 / scales[consumer]
                plus[rows] = by[rows] - 1 if part["adds_one"] else shifts.get(consumer, torch.zeros(1))
    return scales, shifts, outputs


def containers(task, work, calibration, bits, extra, suffix=""):
    """Two containers with the same weights: parameters of activations for ten groups of timesteps, and one for all."""
    found = {}
    for mode, settings in (("time", {"time_groups": GROUPS}), ("static", {"time_aware": False})):
        found[mode] = work / f"{task.title}-int{bits}-{mode}{suffix}"
        aq.quantize(task.path, found[mode], bits=bits, group=64, calib=calibration, act_bits=8, overwrite=True, **settings, **task.settings, **extra)
    return found


def recorded(task, work):
    calibration = work / f"{task.title}-{task.calib_seed}.aqcal"
    if not calibration.exists():
        task.record(calibration)
    return calibration


def spatial(task, work, bits, seeds, extra):
    """A table: for each mode both measures without the spatial parts and with them, mean and spread over the splits, and how much less the error is."""
    splits, found = [task.split(k) for k in range(seeds)], {}
    for on in (False, True):
        paths = containers(task, work, recorded(task, work), bits, extra | {"spatial": on}, f"-spatial-{on}".lower())
        for mode in SPATIAL_MODES:
            path = paths["static" if mode == "static" else "time"]
            model = load_into(task.candidate(), path)
            task.integer(model, mode, path)
            found[mode, on] = np.array([task.errors(model, batches) for batches in splits])
    first = f"| W{bits}A8 | "
    lines = [
        first + " | ".join(f"{what}, {how}" for what in ("layers' outputs", "noise prediction") for how in ("without", "with", "less")) + " |",
        "|---" * 7 + "|",
    ]
    for mode in SPATIAL_MODES:
        off, on, cells = found[mode, False], found[mode, True], []
        for i in range(2):
            less = 100 * (1 - on[:, i] / off[:, i])
            cells += [f"{v.mean():.3e} ± {v.std():.1e}" for v in (off[:, i], on[:, i])] + [
                f"{less.mean():.1f} ± {less.std():.1f} % ({less.min():.1f} to {less.max():.1f})"
            ]
        lines.append(f"| {LABELS[mode]} | " + " | ".join(cells) + " |")
    return f"{seeds} splits of {task.images} images after the first {task.skip}, noise of calibration from seed {task.calib_seed}:\n\n" + "\n".join(lines)


def run(task, work, bits, extra):
    paths, results = containers(task, work, recorded(task, work), bits, extra), {}
    model = load_into(task.candidate(), paths["time"])
    results["f32"] = task.measure(model)
    for mode in MODES:
        model = load_into(task.candidate(), paths["static" if mode == "static" else "time"])
        task.integer(model, mode)
        results[mode] = task.measure(model)
    return results, describe(paths)


def describe(paths):
    """How the layers were made, and how much coarser than the cleanest group's own step one static step is: what time groups can gain there."""
    with aq.open(paths["time"]) as f:
        layers = [t for t in f.values() if t.quantized]
        coarser = [20 * np.log10(static_pair(t.time_groups)[0] / t.time_groups[0]["scale"]) for t in layers if t.time_groups]
        methods = ", ".join(f"{sum(t.method == m for t in layers)} by {m}" for m in sorted({t.method for t in layers}))
        equalized = sum(t.equalization_scales is not None for t in layers)
    step = f"one static step is {np.mean(coarser):.1f} dB coarser than the cleanest group's, at most {max(coarser):.1f} dB"
    return f"{len(layers)} layers, {methods}, {equalized} equalized; {step}"


def table(task, bits, results):
    digits = 1 if task.title == "dit-fashion" else 3
    lines = [f"| W{bits}A8 | all | " + " | ".join(str(k + 1) for k in range(10)) + " |", "|---" * 12 + "|"]
    for mode in ("f32", *MODES):
        r = results[mode]
        lines.append(f"| {LABELS[mode]} | {r['all']:.{digits + 1}f} | " + " | ".join(f"{v:.{digits}f}" for v in r["parts"]) + " |")
    return "\n".join(lines)


def cross_entropy(bits, results):
    lines = [f"| W{bits}A8, cross entropy in nats | all | " + " | ".join(str(k + 1) for k in range(10)) + " |", "|---" * 12 + "|"]
    for mode in ("f32", *MODES):
        r = results[mode]
        lines.append(f"| {LABELS[mode]} | {r['cross_entropy']:.4f} | " + " | ".join(f"{v:.3f}" for v in r["cross_entropy_parts"]) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=pathlib.Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=pathlib.Path, help="folder for calibration files and containers; kept. Default: a temporary one")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--passages", type=int, default=128)
    parser.add_argument("--models", default="dit,text")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--calib-seed", type=int, default=1, help="seed of the noise, or the masks, of the calibration data")
    parser.add_argument("--spatial", action="store_true", help="also what the spatial parts are worth at W4A8, on images that nothing was chosen by")
    parser.add_argument("--skip-images", type=int, default=256, help="test images before those of --spatial")
    parser.add_argument("--seeds", type=int, default=5, help="splits of --spatial, of --images each")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="further settings of arrow_quant_v2.quantize")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    extra = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.set)}
    tasks = {"dit": Image, "text": Text}
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or pathlib.Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for name in arguments.models.split(","):
            task = tasks[name](arguments.shared, arguments)
            for bits in map(int, filter(None, arguments.bits.split(","))):
                results, made = run(task, work, bits, extra)
                section = f"`{task.title}`, {task.unit}, per {task.parts}; {made}:\n\n" + table(task, bits, results)
                if "cross_entropy" in results["f32"]:
                    section += "\n\n" + cross_entropy(bits, results)
                print(section + "\n", flush=True)
            if name == "dit" and arguments.spatial:
                print(spatial(task, work, 4, arguments.seeds, extra) + "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
