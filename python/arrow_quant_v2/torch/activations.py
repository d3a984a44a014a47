"""Layers that run on integers: 8-bit codes of the input times the 2, 4 or 8-bit codes of the weight (W8A8, W4A8, W2A8).

How the input is coded is a matter of `mode`: one scale and zero point for all timesteps ('static'), one for each group of timesteps ('time'), which the
sampler's timestep picks, or one for each row (token) from its own range ('dynamic'). Sums of products are exact integers (aq_linear_coded of the library), so
the result is the same on every machine and for any number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from .. import _core
from ..activations import static_pair
from . import ops
from .modules import QuantLinear
from .time_context import TimeContext

__all__ = ["IntegerLinear", "integer_activations"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from .._types import TimeGroupParams


NOWHERE = TimeContext()  # of layers that were given none: it never knows a timestep


class IntegerLinear(nn.Module):
    """A QuantLinear that runs on integers: [..., in_features] to [..., out_features] in the input's dtype.

    layer: a QuantLinear, whose codes are used where they lie; groups: time groups of its input (None: layer.time_groups); mode 'time', 'static' or 'dynamic';
    context: the TimeContext that tells the timestep, for 'time'; where it does not know, or there is none, the default group holds: the one with the widest
    scale, whose range cuts off least at other timesteps (one RuntimeWarning says so). In a batch of mixed timesteps the samples lie one after the other along
    the first axis.
    simulate: the same codes in floating-point operations on the input's device: equal to rounding, without integers.

    >>> import torch
    >>> from arrow_quant_v2.torch import IntegerLinear, QuantLinear, StoredForm, TimeContext
    >>> layer = QuantLinear.from_linear(torch.nn.Linear(64, 8), StoredForm(bits=8, group_size=64))
    >>> groups = [{'time_range': (i * 500, (i + 1) * 500), 'scale': 0.03, 'zero_point': 128.0, 'group_size': 64} for i in range(2)]
    >>> time, x = TimeContext(1000), torch.randn(2, 3, 64)
    >>> integer = IntegerLinear(layer, groups, context=time)
    >>> with time.at([10, 900]):
    ...     y = integer(x)
    >>> y.shape, bool((y - layer(x)).abs().max() < 0.2)
    (torch.Size([2, 3, 8]), True)
    """

    __module__ = "arrow_quant_v2.torch"

    def __init__(
        self,
        layer: QuantLinear,
        groups: Sequence[TimeGroupParams] | None = None,
        mode: str = "time",
        context: TimeContext | None = None,
        simulate: bool = False,
    ):
        super().__init__()
        if mode not in ("time", "static", "dynamic"):
            raise ValueError(f"Invalid mode: {mode!r}. Must be 'time', 'static', or 'dynamic'")
        groups = getattr(layer, "time_groups", None) if groups is None else groups
        if mode != "dynamic" and not groups:
            raise ValueError("the layer has no time groups: give groups=, or mode='dynamic'")
        self.layer, self.mode, self.simulate = layer, mode, simulate
        self.context = NOWHERE if context is None else context
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._scales = self._zeros = None
        if mode == "time":
            groups = _core._time_groups(groups or ())
            self._starts = np.array([g["time_range"][0] for g in groups])
            self._scales, self._zeros = (np.array([g[key] for g in groups], np.float32) for key in ("scale", "zero_point"))
        elif mode == "static":
            scale, zero = static_pair(groups or ())
            self._scales, self._zeros = np.array([scale], np.float32), np.array([zero], np.float32)

    @property
    def weight(self):
        """The values that the layer stands for, see QuantLinear.weight."""
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def _pairs(self):
        """Scales and zero points of now: one for all, or one for each sample; None for 'dynamic'."""
        if self.mode != "time":
            return self._scales, self._zeros
        steps = self.context.known()
        which = [self._scales.argmax()] if steps is None else np.clip(np.searchsorted(self._starts, steps, side="right") - 1, 0, None)
        return self._scales[which], self._zeros[which]

    def forward(self, x):
        layer, form = self.layer, self.layer.form
        scales = layer.input_scales()
        values = x.detach().to(torch.float32)
        if scales is not None or form.hadamard:
            moved = _core._transform_input(values.cpu().contiguous().numpy(), None if scales is None else scales.cpu().numpy(), form.hadamard)
            values = torch.from_numpy(moved).to(x.device)
        s, z = self._pairs()
        if self.simulate:
            return self._simulated(values, s, z).to(x.dtype)
        y = None if torch.compiler.is_compiling() else self._now(values, s, z)
        if y is not None:
            return y.to(x.dtype)
        bias = None if layer.bias is None else layer.bias.detach().to("cpu", torch.float32).contiguous().numpy()
        arguments = (layer.qweight.cpu().numpy(), layer.qparams.cpu().numpy(), (layer.rows, layer.cols), form.bits, form.group_size, form.params, s, z, bias)
        return torch.from_numpy(_core._linear_integer(values.cpu().contiguous().numpy(), *arguments, torch.get_num_threads())).to(x.device, x.dtype)

    def _now(self, values, s, z):
        """The product without numpy's buffers, see ops.linear_now; None where that does not suit."""
        layer, rows = self.layer, values.numel() // max(1, self.in_features)
        if rows == 0 or values.shape[-1] != self.in_features or (s is not None and rows % len(s)):
            return None
        if s is None:
            pairs = (0, 0, rows)
        else:
            if len(s) > 1:
                s, z = np.repeat(s, rows // len(s)), np.repeat(z, rows // len(s))
            pairs = (s.ctypes.data, z.ctypes.data, len(s))
        return ops.linear_now(values.contiguous(), layer.qweight, layer.qparams, layer.bias, layer.form, pairs)

    def _simulated(self, x, s, z):
        rows = x.reshape(-1, x.shape[-1])
        if s is None:
            low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
            s = torch.where(high > low, (high - low) / 255, torch.ones_like(high))
            z = -low / s
        else:
            s, z = (torch.as_tensor(v, device=x.device).repeat_interleave(len(rows) // len(v)) for v in (s, z))
        codes = (rows / s[:, None] + z[:, None]).round().clamp(0, 255)
        coded = ((codes - z[:, None]) * s[:, None]).reshape(x.shape)
        if not hasattr(self, "_values"):
            form = self.layer.form
            self._values = _plain(self.layer, form)
        bias = None if self.layer.bias is None else self.layer.bias.to(torch.float32)
        return nn.functional.linear(coded, self._values.to(x.device), bias)

    def extra_repr(self):
        return f"mode={self.mode}, groups={0 if self._scales is None else len(self._scales)}{', simulate=True' if self.simulate else ''}"


def _plain(layer, form):
    """The dequantized codes themselves, equalization and rotation not undone: what coded inputs are multiplied by."""
    return ops.unpacked(layer.qweight, layer.qparams, layer.cols, form.bits, form.group_size, form.params)


def integer_activations(
    module: nn.Module,
    mode: str = "time",
    *,
    groups: Mapping[str, Any] | None = None,
    timestep: str | Callable[..., Any] = "timestep",
    num_timesteps: int = 1000,
    scale: float | None = None,
    simulate: bool = False,
) -> TimeContext:
    """Makes the QuantLinear layers of a module run on integers, in place; returns the TimeContext that was attached to the module.

    module: what load_into or quantize_module made, or one that this function was used on before, with another mode. groups: {layer name: time groups} for
    layers that have none of their own (layer.time_groups, from the container); layers that have neither stay as they are, except under 'dynamic', which needs
    none. timestep: name of the argument of module.forward that holds the timestep, or a callable that gets forward's arguments. num_timesteps and scale: see
    TimeContext. simulate: see IntegerLinear. ValueError where no layer would run on integers.

    >>> import torch
    >>> from arrow_quant_v2.torch import QuantLinear, StoredForm, integer_activations
    >>> class Denoiser(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.proj = torch.nn.Linear(256, 256)
    ...     def forward(self, x, timestep):
    ...         return self.proj(x)
    >>> model = Denoiser()
    >>> model.proj = QuantLinear.from_linear(model.proj, StoredForm(bits=8))
    >>> time = integer_activations(model, 'dynamic')
    >>> model
    Denoiser(
      (proj): IntegerLinear(
        mode=dynamic, groups=0
        (layer): QuantLinear(256 -> 256, bits=8, group_size=128, params=f16, bias=True)
      )
    )
    """
    context = TimeContext(num_timesteps, scale)
    unknown = set(groups or ()) - {name for name, part in module.named_modules() if isinstance(part, (QuantLinear, IntegerLinear))}
    if unknown:
        raise ValueError(f"groups names layers that are no QuantLinear of the module: {', '.join(sorted(unknown)[:5])}")
    replaced = 0
    for name, part in list(module.named_modules()):
        if not isinstance(part, (QuantLinear, IntegerLinear)) or isinstance(_parent(module, name), IntegerLinear):
            continue
        layer = part.layer if isinstance(part, IntegerLinear) else part
        own = (groups or {}).get(name) or getattr(layer, "time_groups", None)
        if mode != "dynamic" and not own:
            continue
        setattr(_parent(module, name), name.rpartition(".")[2], IntegerLinear(layer, own, mode, context, simulate))
        replaced += 1
    if not replaced:
        raise ValueError("no layer runs on integers: the module has no QuantLinear" + ("" if mode == "dynamic" else " with time groups"))
    return context.attach(module, timestep) if mode == "time" else context


def _parent(module, name):
    return module.get_submodule(name.rpartition(".")[0])
