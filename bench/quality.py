#!/usr/bin/env python3
"""What weights-only quantization costs the sample models: ours beside the peers that can be installed, equal layers, equal evaluation, every bit counted.

    bench/quality.py --samples DIR [--json FILE] [--markdown FILE] [--only dit|text] [--images 512] [--passes 4] [--pictures FILE] [--every-row]

DIR holds models/dit-fashion, models/mdlm-text, data/ and eval/ (eval_dit.py, eval_mdlm.py). The linear layers of the blocks are replaced by what each method
makes of them; everything else stays F32. Bits per weight are those of codes, scales, offsets and whatever else the method stores, over all those layers.

- DiT: signal to noise of the predicted noise against the F32 model (eval_dit.py eps_error, 256 test images), dB.
- Text: mean Kullback-Leibler divergence per masked byte (eval_mdlm.py), and masked cross entropy.

Methods that use inputs get the same second moments E[x x^T] of calibration data (training images, each `passes` times with a random timestep; passages with
random masks), seeded. "planned" spends bits where they help: each layer's weight in the error is what one rounding of it does to the model's output on
calibration data, without labels; candidates are measured by the solver; the best sum of weight x relative output error within the budget is taken, as
`arrowquant plan` does. "bias corrected", and "planned": codes are solved for the inputs less their mean, and the layer's own bias makes up for that (Nagel
et al. 2019), as `arrowquant quantize` does. "command" rows are what `arrowquant quantize` (on PATH, or --arrowquant) writes, options and all as shown, from
statistics that a Recorder takes of the same calibration data; the budget is spent on the layers of the blocks alone. Peers missing on this machine are said to
be.

--pictures FILE draws samples of the original DiT and of what the command makes of it at 4 and at 2 bits, from the same noise, beside each other (PNG).
"""

import argparse
import copy
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import arrow_quant_v2 as aq
import numpy as np
import torch

BLOCK_LAYER = re.compile(r"^(transformer_blocks|blocks)\.\d+\.")
TWO_LEVEL = {"group": 256, "params": "two-level"}


# ---- ours: name -> (values, stored bits) ----


def rounded(bits, group, method):
    """Codes without calibration; scale and offset stored as halves, as the container does (32 bits a group)."""

    def run(layer):
        form = "two-level" if group == 256 and bits < 8 else "f16"
        codes, params, _ = aq._core._quantize_stored(layer.weight, bits, group, form, method)
        values = aq._core._dequantize_stored(codes, params, *layer.weight.shape, bits, group, form)
        return np.asarray(values).reshape(layer.weight.shape), 8 * (len(codes) + len(params))

    return run


def solved(bits, group=64, params="f16", refine=8, corrected=False):
    """corrected: codes for the inputs less their mean, and the layer's bias makes up for that, where it has one."""

    def run(layer):
        corrects = corrected and layer.module.bias is not None
        moment = layer.covariance if corrects else layer.moment
        if params == "r2q":
            r = aq.r2q(layer.weight, moment, group, refine=refine, as_numpy=True)
        else:
            r = aq.gptq(layer.weight, moment, bits, group, params=params, refine=refine, as_numpy=True)
        layer.output_db, values = r["output_sqnr_db"], aq.dequantize(r)
        if corrects:  # its output has the mean's part too
            power = [((layer.weight @ h) * layer.weight).sum() for h in (layer.moment, moment)]
            layer.output_db += 10 * np.log10(power[0] / power[1])
            layer.correct(values)
        return values, 8 * r["stored_bytes"]

    return run


# ---- peers ----


def hqq(bits, group):
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer

    def run(layer):
        w = torch.from_numpy(layer.weight.copy())
        q, meta = quantizer.quantize(w, nbits=bits, group_size=group, axis=1, optimize=True, device="cpu", compute_dtype=torch.float32, channel_wise=True,
                                     round_zero=False)  # fmt: skip
        meta["scale"], meta["zero"] = (meta[k].half().float() for k in ("scale", "zero"))  # stored as halves
        return quantizer.dequantize(q, meta).numpy(), w.numel() * bits + 32 * meta["scale"].numel()

    return run


def quanto(bits, group):
    oq = importlib.import_module("optimum.quanto")
    kind = {2: oq.qint2, 4: oq.qint4}[bits]

    def run(layer):
        w = torch.from_numpy(layer.weight.copy())
        scale, shift = oq.MaxOptimizer()(w, kind, 0, group)
        scale, shift = scale.half().float(), shift.half().float()
        q = oq.quantize_weight(w, kind, 0, scale, shift, group)
        return q.dequantize().numpy(), w.numel() * bits + 16 * (scale.numel() + shift.numel())

    return run


def torchao(bits, group):
    ao = importlib.import_module("torchao.quantization.quant_primitives")
    top = 2**bits - 1

    def run(layer):
        w = torch.from_numpy(layer.weight.copy())
        block, options = (1, group), {"quant_min": 0, "quant_max": top}
        scale, zero = ao.choose_qparams_affine(w, ao.MappingType.ASYMMETRIC, block, torch.int32, **options)
        scale = scale.half().float()
        q = ao.quantize_affine(w, block, scale, zero, torch.int32, **options)
        return ao.dequantize_affine(q, block, scale, zero, torch.int32, **options).numpy(), w.numel() * bits + (16 + bits) * scale.numel()

    return run


def nf4(group):
    functional = importlib.import_module("bitsandbytes.functional")

    def run(layer):
        w = torch.from_numpy(layer.weight.copy())
        q, state = functional.quantize_4bit(w, blocksize=group, quant_type="nf4")
        return functional.dequantize_4bit(q, state).numpy(), w.numel() * 4 + 32 * state.absmax.numel()

    return run


def gguf_type(word):
    """The gguf package's own encoder. Its blocks run along the rows; all of these have 32 values."""
    gguf, quants = importlib.import_module("gguf"), importlib.import_module("gguf.quants")
    kind = gguf.GGMLQuantizationType[word]

    def run(layer):
        packed = quants.quantize(layer.weight, kind)
        return quants.dequantize(packed, kind), packed.nbytes * 8

    return run


def ggml_type(word, library):
    """ggml's own encoder (libggml-base), which the gguf package lacks for K types, without an importance matrix. Blocks of 256 run over the matrix as one
    long row: rows of 192 values would not hold one."""
    import ctypes

    gguf, quants = importlib.import_module("gguf"), importlib.import_module("gguf.quants")
    kind, ggml = gguf.GGMLQuantizationType[word], ctypes.CDLL(library)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t

    def run(layer):
        w = np.ascontiguousarray(layer.weight).reshape(1, -1)
        packed = np.zeros(w.size // block * size, np.uint8)
        ggml.ggml_quantize_chunk(int(kind), w.ctypes.data_as(ctypes.c_void_p), packed.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0), ctypes.c_int64(1),
                                 ctypes.c_int64(w.size), None)  # fmt: skip
        return quants.dequantize(packed.reshape(1, -1), kind).reshape(layer.weight.shape), packed.nbytes * 8

    return run


def plain_gptq(bits, group):
    """GPTQ as published, in torch: the inverse's Cholesky factor, min-max parameters from the updated weights, halves."""

    def run(layer):
        from torch_gptq import gptq

        values, n_groups = gptq(torch.from_numpy(layer.weight), torch.from_numpy(layer.moment), bits, group)
        return values.numpy(), layer.weight.size * bits + 32 * n_groups

    return run


# ---- models ----


class Layer:
    last = None

    def __init__(self, name, module):
        self.name, self.module = name, module
        self.weight = module.weight.detach().numpy().copy()
        self.sum, self.mean, self.rows, self.output_db = 0, 0, 0, None
        self.bias = None if module.bias is None else module.bias.detach().clone()

    def observe(self, _, inputs):
        x = inputs[0].detach().reshape(-1, self.weight.shape[1])
        if Layer.last is None or Layer.last[0] is not inputs[0]:  # q, k and v read the same tensor
            Layer.last = inputs[0], (x.T @ x).double(), x.double().sum(0)
        self.sum, self.mean, self.rows = self.sum + Layer.last[1], self.mean + Layer.last[2], self.rows + len(x)

    @property
    def moment(self):
        return (self.sum / self.rows).float().numpy()

    @property
    def covariance(self):
        mean = self.mean / self.rows
        return (self.sum / self.rows - torch.outer(mean, mean)).float().numpy()

    def correct(self, values):
        with torch.no_grad():
            self.module.bias.copy_(self.bias + (torch.from_numpy(self.weight - values).double() @ (self.mean / self.rows)).float())

    def put(self, values):
        with torch.no_grad():
            self.module.weight.copy_(torch.from_numpy(np.ascontiguousarray(values, np.float32)))


class Remembered:
    """A model that is asked the same questions in the same order again and again: it computes the answers once."""

    def __init__(self, model):
        self.model, self.answers, self.asked = model, [], 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **options):
        if self.asked == len(self.answers):
            self.answers.append(self.model(*args, **options))
        self.asked += 1
        return self.answers[self.asked - 1]


class Subject:
    """A model whose block layers are replaced, how it is calibrated and how far it is from the original."""

    recording = {}

    def __init__(self, reference):
        self.reference, self.model, self.recorded = Remembered(reference), copy.deepcopy(reference), None
        self.original = copy.deepcopy(self.model.state_dict())
        self.layers = [Layer(n, m) for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and self.counts(n)]

    def counts(self, name):
        return BLOCK_LAYER.match(name) and "timestep_embedder" not in name

    @torch.no_grad()
    def calibrate(self):
        hooks = [layer.module.register_forward_pre_hook(layer.observe) for layer in self.layers]
        self.outputs = [self.forward(batch) for batch in self.batches]
        for hook in hooks:
            hook.remove()
        Layer.last = None

    @torch.no_grad()
    def drift(self, n=2):
        """Relative squared change of the model's output on the first calibration batches."""
        pairs = [(self.forward(self.batches[i]), self.outputs[i]) for i in range(n)]
        return sum(((a - b) ** 2).sum().item() for a, b in pairs) / sum((b**2).sum().item() for _, b in pairs)

    def restore(self):
        self.model.load_state_dict(self.original)

    def statistics(self):
        """The calibration file of the command: one Recorder around the same passes."""
        from arrow_quant_v2.torch import Recorder

        if not self.recorded:
            self.folder = tempfile.TemporaryDirectory()
            self.recorded = os.path.join(self.folder.name, "inputs.aqcal")
            with torch.no_grad(), Recorder(self.model, self.recorded, self.timestep, gradients=self.gradients, **self.recording):
                for batch in self.batches:
                    self.model(*batch[:1], **self.named(batch))
        return self.recorded

    def command(self, program, options):
        """A container that the program makes of the model, and (values, stored bits) of its layers."""
        out = os.path.join(os.path.dirname(self.statistics()), "out")
        words = [program, "quantize", self.path, "-o", out, "--overwrite", "--calib", self.recorded, *options, *self.blocks_only, "--json"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr.strip().splitlines()[-1])
        container = aq.open(out)
        self.report = json.loads(done.stdout)["layers"]

        with torch.no_grad():  # operations before layers that equalization was folded into are not the original's
            for name, value in self.model.state_dict().items():
                if name in container and not container[name].quantized:
                    value.copy_(torch.from_numpy(np.array(container[name].dequantize(), np.float32)).reshape(value.shape))

        def run(layer):
            tensor = container[layer.name + ".weight"]
            return np.asarray(tensor.dequantize(), np.float32).reshape(layer.weight.shape), stored_bits(tensor)

        return run


def rotations(report):
    """How many layers were kept rotated, and how much more output error the rotation gave the others: what each layer was compared with."""
    solved = [layer for layer in report if layer["method"] == "gptq"]
    others = [layer for layer in solved if not layer["hadamard_group"]]
    worse = [layer["output_sqnr_db"] - float(re.search(r"hadamard ([-\d.]+) dB", layer["compared_with"])[1]) for layer in others]
    told = f"kept on {len(solved) - len(others)} of {len(solved)} layers"
    return told + (f", {np.mean(worse):.1f} dB worse on the others ({min(worse):.1f} to {max(worse):.1f})" if worse else "")


def stored_bits(tensor):
    """Codes and parameters of a tensor of a container."""
    rows, inputs = tensor.shape[0], int(np.prod(tensor.shape[1:]))
    groups = -(-inputs // (tensor.group_size or inputs))
    subs = -(-inputs // {2: 16, 4: 32}.get(tensor.bits, inputs))
    params = {"f16": 32 * groups, "f32": 64 * groups, "r2q": 48 * groups, "two-level": 32 * groups + 8 * -(-subs * 2 * {2: 4, 4: 6}.get(tensor.bits, 0) // 8)}
    scales = sum(32 * len(v) for v in (tensor.equalization_scales, tensor.folded_shift) if v is not None)
    return rows * (8 * -(-inputs * tensor.bits // 8) + params[tensor.params]) + scales


class Dit(Subject):
    timestep, gradients, blocks_only = "timestep", "output", ["--exclude", "*embed*", "--exclude", "proj_out*"]

    def __init__(self, folder, evaluation, images, passes):
        from diffusers import DDIMScheduler

        self.eval, self.path = evaluation, os.path.join(folder, "models/dit-fashion")
        path = self.path
        super().__init__(evaluation.load(path))
        self.scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
        self.test = os.path.join(folder, "data/fashion-test2k.npz")
        z, g = np.load(os.path.join(folder, "data/fashion-calib.npz")), torch.Generator().manual_seed(1)
        x = torch.from_numpy(z["images"][:images]).float().reshape(-1, 1, 28, 28) / 127.5 - 1
        y = torch.from_numpy(z["labels"][:images].astype(np.int64))
        self.batches = []
        for _ in range(passes):
            t, eps = torch.randint(0, 1000, (len(x),), generator=g), torch.randn(x.shape, generator=g)
            xt = self.scheduler.add_noise(x, eps, t)
            self.batches += [(xt[i : i + 64], t[i : i + 64], y[i : i + 64]) for i in range(0, len(x), 64)]

    def named(self, batch):
        return {"timestep": batch[1], "class_labels": batch[2]}

    def forward(self, batch):
        xt, t, y = batch
        return self.model(xt, timestep=t, class_labels=y).sample

    def evaluate(self):
        e = self.eval.eps_error(self.reference, self.model, self.scheduler, self.test)
        return {"eps_snr_db": e["eps_snr_db"], "loss": e["loss"], "loss_reference": e["loss_ref"]}


class Text(Subject):
    timestep, gradients, blocks_only = "t", "logits", sum((["--exclude", f"{name}*"] for name in ("local", "head", "tok", "pos", "time")), [])

    def __init__(self, folder, evaluation, passages, passes):
        self.eval, self.path = evaluation, os.path.join(folder, "models/mdlm-text")
        path = self.path
        super().__init__(evaluation.load(path))
        self.test = os.path.join(folder, "data/text-heldout.txt")
        n, g = self.reference.seq_len, torch.Generator().manual_seed(1)
        with open(os.path.join(folder, "data/text-calib.jsonl"), encoding="utf-8") as f:
            texts = [[b for b in json.loads(line)["text"].encode() if b < 128] for line in f]
        texts = torch.tensor([t[:n] for t in texts if len(t) >= n][:passages])
        self.batches = []
        for _ in range(passes):
            t = torch.rand(len(texts), generator=g) * 0.9 + 0.05
            ids = texts.masked_fill(torch.rand(texts.shape, generator=g) < t[:, None], 128)
            self.batches += [(ids[i : i + 32], t[i : i + 32]) for i in range(0, len(ids), 32)]

    def named(self, batch):
        return {"t": batch[1]}

    def forward(self, batch):
        return self.model(*batch).log_softmax(-1)

    def evaluate(self):
        e = self.eval.text_error(self.reference, self.model, self.test)
        return {"kl": e["kl"], "nll": e["nll"], "nll_reference": e["nll_ref"]}


# ---- planning ----

CANDIDATES = {
    2: [(2, 0, "f16"), (2, 96, "f16"), (2, 64, "f16"), (2, 256, "two-level"), (2, 64, "r2q"), (4, 0, "f16"), (4, 256, "two-level")],
    4: [(2, 256, "two-level"), (4, 0, "f16"), (4, 96, "f16"), (4, 64, "f16"), (4, 256, "two-level"), (4, 32, "f16"), (8, 0, "f16")],
}


def sensitivities(subject):
    """What a relative output error of 1 in each layer would cost, from the drift that a 4-bit rounding of it causes."""
    costs = {}
    for layer in subject.layers:
        values, _ = solved(4, 64)(layer)
        layer.put(values)
        costs[layer.name] = subject.drift() * 10 ** (layer.output_db / 10)
        layer.put(layer.weight)
    return costs


def planned(subject, costs, width, budget):
    """A (values, bits) per layer within `budget` bits a weight: steps of the best error per bit, along each layer's convex hull."""
    options = {}
    for layer in subject.layers:
        found = []
        for bits, group, params in CANDIDATES[width]:
            if group and group < 256 and layer.weight.shape[1] % group:
                continue
            values, size = solved(bits, group, params, corrected=True)(layer)
            found.append((size, costs[layer.name] * 10 ** (-layer.output_db / 10), (bits, group or layer.weight.shape[1], params), values))
        found.sort(key=lambda c: c[:2])
        hull = []
        for c in found:
            while hull and c[1] >= hull[-1][1]:
                break
            else:
                while len(hull) > 1 and (hull[-2][1] - hull[-1][1]) * (c[0] - hull[-1][0]) <= (hull[-1][1] - c[1]) * (hull[-1][0] - hull[-2][0]):
                    hull.pop()
                hull.append(c)
        options[layer.name] = hull
    at, limit = dict.fromkeys(options, 0), budget * sum(layer.weight.size for layer in subject.layers)
    used = sum(hull[0][0] for hull in options.values())
    while True:
        steps = []
        for name, hull in options.items():
            i = at[name]
            if i + 1 < len(hull) and used + hull[i + 1][0] - hull[i][0] <= limit:
                steps.append(((hull[i][1] - hull[i + 1][1]) / (hull[i + 1][0] - hull[i][0]), name))
        if not steps:
            break
        name = max(steps)[1]
        used += options[name][at[name] + 1][0] - options[name][at[name]][0]
        at[name] += 1
    chosen = {name: options[name][i] for name, i in at.items()}
    summary = {}
    for _, _, form, _ in chosen.values():
        summary[form] = summary.get(form, 0) + 1
    print("  planned:", ", ".join(f"{n} x {b} bits {p} g{g}" for (b, g, p), n in sorted(summary.items())), file=sys.stderr)

    def run(layer):
        size, _, _, values = chosen[layer.name]
        if layer.bias is not None:
            layer.correct(values)
        return values, size

    return run


# ---- the table ----


COMMANDS = ["--target-bpw 4.5 --min-accuracy 0", "--target-bpw 2.63 --min-accuracy 0", "--bits 4 --group 64", "--bits 2"]
COMMANDS += [words + " --no-bias-correction" for words in COMMANDS[:2]]
COMMANDS += [f"--method gptq --bits {bits} --group 64 --smooth none{more}" for bits in (4, 2) for more in ("", " --rotate hadamard", " --no-bias-correction")]


def methods(library):
    """(who, what, maker): makers are called when their turn comes, so that a missing peer is told and skipped."""
    rows = [("ArrowQuant", "rtn 4 bits f16 g64", lambda: rounded(4, 64, "rtn")), ("ArrowQuant", "search 4 bits f16 g64", lambda: rounded(4, 64, "search")),
            ("ArrowQuant", "search 4 bits two-level", lambda: rounded(4, 256, "search")), ("ArrowQuant", "gptq 4 bits f16 g64", lambda: solved(4, 64)),
            ("ArrowQuant", "gptq 4 bits two-level", lambda: solved(4, **TWO_LEVEL)), ("ArrowQuant", "planned, at most 4.5", ("plan", 4, 4.5)),
            ("ArrowQuant", "gptq 4 bits f16 g64, bias corrected", lambda: solved(4, 64, corrected=True)),
            ("ArrowQuant", "gptq 4 bits two-level, bias corrected", lambda: solved(4, **TWO_LEVEL, corrected=True)),
            ("ArrowQuant", "rtn 2 bits f16 g64", lambda: rounded(2, 64, "rtn")), ("ArrowQuant", "search 2 bits two-level", lambda: rounded(2, 256, "search")),
            ("ArrowQuant", "gptq 2 bits f16 g64", lambda: solved(2, 64)), ("ArrowQuant", "gptq 2 bits two-level", lambda: solved(2, **TWO_LEVEL)),
            ("ArrowQuant", "gptq 2 bits two-level, bias corrected", lambda: solved(2, **TWO_LEVEL, corrected=True)),
            ("ArrowQuant", "r2q 2 bits g64", lambda: solved(2, 64, "r2q")), ("ArrowQuant", "planned, at most 2.63", ("plan", 2, 2.63)),
            ("torch", "plain GPTQ 4 bits g64", lambda: plain_gptq(4, 64)), ("torch", "plain GPTQ 2 bits g64", lambda: plain_gptq(2, 64))]  # fmt: skip
    rows += [("ArrowQuant", "command: " + words, ("command", words)) for words in COMMANDS]
    for bits, group in ((4, 64), (4, 32), (2, 64), (2, 16)):
        rows.append(("HQQ", f"{bits} bits g{group}", lambda b=bits, g=group: hqq(b, g)))
    for bits, group in ((4, 64), (2, 64), (2, 32)):
        rows.append(("quanto", f"qint{bits} g{group}", lambda b=bits, g=group: quanto(b, g)))
    for bits, group in ((4, 64), (4, 32), (2, 64), (2, 32)):
        rows.append(("torchao", f"uint{bits} affine g{group}", lambda b=bits, g=group: torchao(b, g)))
    rows.append(("bitsandbytes", "NF4 g64", lambda: nf4(64)))
    rows += [("gguf", word, lambda w=word: gguf_type(w)) for word in ("Q4_0", "Q4_1", "Q5_0")]
    if library:
        rows += [("ggml", word, lambda w=word: ggml_type(w, library)) for word in ("Q2_K", "Q3_K", "Q4_K", "Q5_K")]
    return rows


def measure(subject, library, wanted, program):
    rows, costs = [], None
    for who, what, maker in methods(library):
        if not re.search(wanted, f"{who} {what}"):
            continue
        start = time.perf_counter()
        try:
            if isinstance(maker, tuple) and maker[0] == "command":
                run = subject.command(program, maker[1].split())
            elif isinstance(maker, tuple):
                costs = costs or sensitivities(subject)
                run = planned(subject, costs, *maker[1:])
            else:
                run = maker()
            bits = 0
            for layer in subject.layers:
                values, size = run(layer)
                layer.put(values)
                bits += size
        except (ImportError, AttributeError, OSError) as e:
            print(f"{who} {what}: not here ({type(e).__name__}: {e})", file=sys.stderr)
            subject.restore()
            continue
        seconds = time.perf_counter() - start
        row = {"who": who, "what": what, "bits": bits / sum(layer.weight.size for layer in subject.layers), **subject.evaluate(), "seconds": seconds}
        if isinstance(maker, tuple) and "hadamard" in what:
            row["rotated"] = rotations(subject.report)
        subject.restore()
        subject.reference.asked = 0
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def table(title, key, digits, rows):
    lines = [f"### {title}", "", f"| | | bits per weight | {key} |", "|---|---|---:|---:|"]
    for row in sorted(rows, key=lambda r: (-round(r["bits"], 2), r[key] if key == "kl" else -r[key])):
        bold = "**" if row["who"] == "ArrowQuant" else ""
        what = row["what"] + (f"; {row['rotated']}" if "rotated" in row else "")
        lines.append(f"| {row['who']} | {what} | {row['bits']:.3f} | {bold}{row[key]:.{digits}f}{bold} |")
    return "\n".join(lines) + "\n"


def draw(subject, program, path):
    """Samples of ten classes at 50 DDIM steps with guidance 1.5: the original, 4 bits, 2 bits; and how far they are from the original's."""
    from PIL import Image

    steps, rows = 50, []
    for words in (None, COMMANDS[0], COMMANDS[1]):
        if words:
            run = subject.command(program, words.split())
            for layer in subject.layers:
                layer.put(run(layer)[0])
        rows.append(subject.eval.sample(subject.model, subject.scheduler, 10, steps)[0].clamp(-1, 1))
        apart = (rows[-1] - rows[0]).abs().mean().item() * 127.5
        power = ((rows[-1] - rows[0]) ** 2).mean().item()
        psnr = f", PSNR {10 * np.log10(4 / power):.1f} dB" if power else ""
        print(f"samples, {words or 'original'}: {apart:.2f} of 255 from the original's on average{psnr}", file=sys.stderr)
    subject.restore()
    zoom = 3
    pixels = torch.cat([torch.cat([torch.nn.functional.pad(x[0], (1, 1, 1, 1), value=1) for x in row], 1) for row in rows])
    pixels = ((pixels + 1) * 127.5).round().byte().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    Image.fromarray(pixels.numpy()).save(path, optimize=True)


def module_at(path):
    spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--samples", required=True), p.add_argument("--json"), p.add_argument("--markdown"), p.add_argument("--only", choices=["dit", "text"])
    p.add_argument("--images", type=int, default=512), p.add_argument("--passes", type=int, default=4)
    p.add_argument("--rows", default="", help="only rows whose words match this; those of an earlier --json file stay")
    p.add_argument("--ggml", help="libggml-base.so, for its K types"), p.add_argument("--arrowquant", default="arrowquant", help="the program")
    p.add_argument("--pictures", help="PNG of samples")
    p.add_argument("--every-row", action="store_true", help="recordings for the command do not thin the rows that H takes")
    a = p.parse_args()
    Subject.recording = {"hessian_full": 0} if a.every_row else {}
    torch.manual_seed(0)
    subjects = {
        "dit": lambda: Dit(a.samples, module_at(os.path.join(a.samples, "eval/eval_dit.py")), a.images, a.passes),
        "text": lambda: Text(a.samples, module_at(os.path.join(a.samples, "eval/eval_mdlm.py")), a.images, a.passes),
    }
    titles = {
        "dit": ("Sample DiT, 42 block linears: ε SNR in dB (more is better)", "eps_snr_db", 2),
        "text": ("Sample text model, 28 block linears: KL", "kl", 6),
    }
    results, text = {}, []
    if a.json and os.path.exists(a.json):
        with open(a.json) as f:
            results = json.load(f)
    for name, make in subjects.items():
        if a.only in (None, name):
            subject = make()
            subject.calibrate()
            rows = measure(subject, a.ggml, a.rows, a.arrowquant)
            if a.pictures and name == "dit":
                draw(subject, a.arrowquant, a.pictures)
            measured = {(r["who"], r["what"]) for r in rows}
            results[name] = [r for r in results.get(name, []) if (r["who"], r["what"]) not in measured] + rows
            text.append(table(titles[name][0], *titles[name][1:], results[name]))
    if a.json:
        with open(a.json, "w") as f:
            json.dump(results, f, indent=1)
    if a.markdown:
        with open(a.markdown, "w") as f:
            f.write("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
