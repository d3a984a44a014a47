"""What static scales of 8-bit inputs could reach at best on the sample DiT, chosen with all values at hand: why time groups gain what they gain.

Usage: python bench/activation_bounds.py [--shared FOLDER] [--images N]

The weights stay F32. Inputs of the layers of the blocks are coded in the reference model itself by one pair of scale and zero point: for all timesteps, for
each of 10 groups of timesteps, for each single sample, for each token. The ends of each range are the ones with the least squared error of the layer's output
(weights' columns taken as independent) on the very values: calibration samples for the first two, for samples the input that is coded. A sample has one
timestep: what the range of a sample of its own does not gain, no static scale by timestep can. Figures: docs/activations.md.
"""

import argparse
import pathlib

import torch
from activations import ROOT, Image

GROUPS, CLIPS, ROWS = 10, [1 - 0.1 * k for k in range(7)], 500


def coded(x, low, high):
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = -low / scale
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale


def best_range(x, weight):
    """The ends of the range of x [rows, n], each times 1, 0.9 … 0.4, with the least error; weight [n]: what a column's squared error counts."""
    x = x.reshape(-1, x.shape[-1])
    if len(x) > ROWS:
        x = x[torch.linspace(0, len(x) - 1, ROWS).long()]
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)

    def error(a, b):
        return (((coded(x, low * a, high * b) - x) ** 2) * weight).sum().item()

    a = b = 1.0
    for _ in range(2):
        a = min(CLIPS, key=lambda c: error(c, b))
        b = min(CLIPS, key=lambda c: error(a, c))
    return low * a, high * b


class Coded(torch.nn.Module):
    """The reference model with coded inputs: kind 'static', 'time', 'sample' or 'token'."""

    def __init__(self, task):
        super().__init__()
        self.model, self.kind, self.t = task.reference, None, None
        parts = {name: part for name, part in self.model.named_modules() if isinstance(part, torch.nn.Linear)}
        self.layers = {n: p for n, p in parts.items() if ".attn1." in n or ".ff." in n or n.endswith("norm1.linear")}
        self.weights = {n: (p.weight.detach() ** 2).sum(0) for n, p in self.layers.items()}
        self.ranges, seen = {}, {n: [] for n in self.layers}
        self.hooks = [
            part.register_forward_pre_hook(lambda _, args, n=name: seen[n].append(rows_of(args[0])[:, ::5].clone())) for name, part in self.layers.items()
        ]
        times = self.collect(task)
        for hook in self.hooks:
            hook.remove()
        for name, found in seen.items():
            x = torch.cat(found)
            groups = [best_range(x[times * GROUPS // 1000 == g], self.weights[name]) for g in range(GROUPS)]
            self.ranges[name] = {"static": [best_range(x, self.weights[name])], "time": groups}
        for name, part in self.layers.items():
            part.register_forward_pre_hook(lambda _, args, n=name: (self.code(n, args[0]),))

    @torch.no_grad()
    def collect(self, task, n=512):
        x, t, y, noise = task.eval.noise_batch(task.calib, n, seed=1)
        noisy = task.scheduler.add_noise(x, noise, t)
        for i in range(0, n, 64):
            self.model(noisy[i : i + 64], timestep=t[i : i + 64], class_labels=y[i : i + 64])
        return t

    def code(self, name, x):
        rows = rows_of(x)
        if self.kind is None:
            return x
        if self.kind == "token":
            low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
        else:
            if self.kind == "sample":
                pairs = [best_range(sample, self.weights[name]) for sample in rows]
            else:
                found = self.ranges[name][self.kind]
                pairs = [found[t * len(found) // 1000] for t in self.t]
            low, high = (torch.stack(ends)[:, None, None] for ends in zip(*pairs, strict=True))
        return coded(rows, low, high).reshape(x.shape)

    def forward(self, x, timestep=None, **arguments):
        self.t = timestep.expand(len(x)).tolist()
        return self.model(x, timestep=timestep, **arguments)


def rows_of(x):
    x = x.detach()
    return x if x.dim() == 3 else x[:, None]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=pathlib.Path, default=ROOT.parent / "shared")
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    task = Image(arguments.shared, arguments)
    model = Coded(task)
    task.reference = Image(arguments.shared, arguments).reference  # uncoded
    print("| F32 weights, 8-bit inputs | all | " + " | ".join(str(k + 1) for k in range(10)) + " |\n" + "|---" * 12 + "|")
    labels = {"static": "one pair, best", "time": "10 time groups, best", "sample": "a pair for each sample, best", "token": "a pair for each token"}
    for kind, label in labels.items():
        model.kind = kind
        found = task.measure(model)
        print(f"| {label} | {found['all']:.2f} | " + " | ".join(f"{v:.1f}" for v in found["parts"]) + " |", flush=True)


if __name__ == "__main__":
    main()
