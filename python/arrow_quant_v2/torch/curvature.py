"""How much the model's output answers to each weight, without labels: backward passes of the recorder's own (Recorder(…, gradients="output")).

A pass is differentiated along a random direction v of its output. Over signs v = ±1 the mean square of d(v · output)/dW is the diagonal of the Gauss-Newton
matrix of the output's squared error (Hutchinson's estimator); for logits the direction is the gradient of the log-likelihood of a token drawn from the model's
own softmax, whose mean square is the diagonal of the Fisher matrix: the Kullback-Leibler divergence to second order (Martens 2014, arXiv 1412.1193).
"""

from __future__ import annotations

import torch

__all__ = ["Curvature"]

MEASURES = ("output", "logits")


class Curvature:
    """Runs the backward passes of one recording.

    measure: 'output' (squared error of the output) or 'logits' (divergence of the distributions over the last dimension); pick: a callable that takes what
    forward returned and gives the tensor that counts, or None: the first one, for logits `.logits`; weights: those whose gradients are wanted. The others have
    none while it runs, and the caller's .grad are set aside.
    """

    def __init__(self, module, measure, pick, weights, seed):
        if measure not in MEASURES:
            raise ValueError(f"Invalid gradients: {measure!r}. Must be False, True, 'output', or 'logits'")
        self.module, self.measure, self.pick = module, measure, pick
        self.weights = {id(weight) for weight in weights}
        self.generator = torch.Generator().manual_seed(seed)
        self.kept, self.asked = [], None

    def begin(self):
        """What the caller has of gradients is set aside."""
        self.kept = [(p, p.requires_grad, p.grad) for p in self.module.parameters()]
        for p, _, _ in self.kept:
            p.requires_grad_(id(p) in self.weights)
            p.grad = None

    def end(self):
        for p, required, gradient in self.kept:
            p.requires_grad_(required)
            p.grad = gradient
        self.kept = []
        self.leave()

    def enter(self):
        """Before a pass: it is differentiated, whatever the caller does around it."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("gradients cannot be had in inference mode: run the model under torch.no_grad(), or without either")
        self.asked = torch.is_grad_enabled()
        torch.set_grad_enabled(True)

    def leave(self):
        if self.asked is not None:
            torch.set_grad_enabled(self.asked)
            self.asked = None

    def backward(self, output):
        """One random direction of the output. Returns the output without its graph."""
        chosen = self.pick(output) if self.pick else tensor_of(output, self.measure)
        if not isinstance(chosen, torch.Tensor) or not chosen.is_floating_point():
            raise TypeError("gradients need a floating-point tensor as output: give output=, a callable that takes what forward returns and gives it")
        if chosen.numel() and chosen.requires_grad:
            self.direction(chosen).backward()
        self.leave()
        return without_graph(output)

    def direction(self, chosen):
        if self.measure == "output":
            signs = torch.randint(0, 2, chosen.shape, generator=self.generator, dtype=torch.int8).to(chosen.device, torch.float32) * 2 - 1
            return (chosen.float() * signs).sum()
        likelihood = chosen.float().log_softmax(-1).reshape(-1, chosen.shape[-1])
        drawn = torch.multinomial(likelihood.detach().exp().cpu(), 1, generator=self.generator)
        return likelihood.gather(1, drawn.to(likelihood.device)).sum()


def tensor_of(output, measure):
    """The tensor that counts of what forward returned."""
    if measure == "logits" and hasattr(output, "logits"):
        return output.logits
    while not isinstance(output, torch.Tensor):
        parts = output.values() if isinstance(output, dict) else output
        output = next(iter(parts), None) if isinstance(output, (dict, list, tuple)) else getattr(output, "sample", None)
    return output


def without_graph(output):
    """The same values, as a caller under no_grad expects them: free of the graph, which has been used up."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, dict):  # the outputs of diffusers and transformers are dicts that are made of their fields
        parts = {name: without_graph(part) for name, part in output.items()}
        return parts if type(output) is dict else type(output)(**parts)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(without_graph, output))
    return type(output)(map(without_graph, output)) if isinstance(output, (list, tuple)) else output
