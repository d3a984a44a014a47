"""Recorder: what the layers of a running model receive, accumulated by the C library per group of timesteps.

A hook before each linear and convolution layer (_core._Listener) hands the layer's input to the library where it lies: contiguous float32 on the CPU is read in
place, anything else comes here and is converted by one copy. A hook before the whole module takes the timestep from its arguments. Layers that read the very
same tensor (q, k, v) are found on their first call and share one set of statistics; each later call is checked, and a layer that turns out to read something
else stops the run.
"""

from __future__ import annotations

import fnmatch
import os
import time
import weakref
from collections import Counter

import numpy as np
import torch
from torch.nn import functional

from .. import _jobs
from .._core import Calibration, Interrupted, _Listener
from .._progress import Watch, warn
from . import threads
from .clock import Clock
from .curvature import Curvature

__all__ = ["Recorder"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Self

    from .._types import Path, ProgressLike

threads.lend()

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


class Recorder:
    """Records the statistics of a module's inputs, layer by layer, while it runs inside a `with` block; writes one calibration file at its end.

    module: any torch.nn.Module: a diffusers transformer or U-Net, a diffusion language model. Its nn.Linear and nn.Conv1d/2d/3d are recorded under the names
    of their weights.
    path: the file. It appears complete or not at all: an exception in the block leaves none. An existing one is an error, unless overwrite replaces it or
    append merges what is recorded into it. None: no file, collect() has it all.
    timestep: the argument of module.forward that holds the timestep; a callable that gets forward's arguments and returns it; or None where there is none.
    A number or a tensor, one for all or one for each sample (first dimension of the inputs). Floats of at most 1 are ratios of the schedule (1 is pure noise;
    the mask ratio of a language model), others count as the scheduler does; `scale` says what counts as the full schedule when that is not clear.
    num_timesteps: T of the schedule (None: 1000); groups: number of time groups.
    hessian, hessian_pooled, max_memory, spill_folder: as in Calibration. hessian_full: layers with more inputs take evenly one of ceil(n / hessian_full) rows
    into the second moment, all rows into everything else. None: the commonest number of inputs of the module's layers, so that the widest layers do not cost
    more than the pass itself; 0: every row.
    gradients: 'output': each pass is also differentiated along random directions of its output, without labels: what an error in each layer costs the model,
    which `plan` and `quantize` with a budget then go by. 'logits': the same for the distributions that a language model predicts. About three times the time.
    True: keep the gradients of backward passes that the caller runs, of a loss. output: takes what forward returns and gives the tensor that counts (None:
    `.sample`, `.logits`, else the first).
    share_inputs: layers that read the very same tensor (q, k, v) on their first call share one set of statistics; every later call is checked, and one that
    reads something else is a RuntimeError. False: each layer has its own, which costs more.
    layers, exclude: names or globs of weights or modules to record or to leave out; prefix: put before each name, where the saved model has one.
    progress: True for a bar, or a callable that takes a Progress after each forward pass and may return False to stop (Interrupted); total: passes expected.
    data_name, data_sha256, seed, synthetic, modality: about the data, told in reports.

    Raises FormatError for an input that is not finite (layer, row and channel are named); TypeError, ValueError or ConfigurationError for wrong arguments.

    >>> import torch
    >>> from arrow_quant_v2.torch import Recorder
    >>> class Denoiser(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.to_q, self.to_k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    ...     def forward(self, x, timestep):
    ...         return self.to_q(x) + self.to_k(x)
    >>> model = Denoiser()
    >>> with torch.no_grad(), Recorder(model, 'denoiser.aqcal', overwrite=True, groups=2) as rec:
    ...     out = model(torch.ones(4, 16, 8), timestep=torch.tensor([0, 300, 600, 999]))
    >>> rec.calibration.stats('to_q.weight', group=1)['count'], rec.calibration.source('to_k.weight')
    (32, 'to_q.weight')
    """

    __module__ = "arrow_quant_v2.torch"

    def __init__(
        self,
        module: torch.nn.Module,
        path: Path | None,
        timestep: str | Callable[..., Any] | None = "timestep",
        *,
        groups: int = 10,
        num_timesteps: int | None = None,
        scale: float | None = None,
        hessian: bool = True,
        hessian_pooled: bool = False,
        hessian_full: int | None = None,
        gradients: bool | str = False,
        output: Callable[[Any], torch.Tensor] | None = None,
        share_inputs: bool = True,
        layers: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        prefix: str = "",
        append: bool = False,
        overwrite: bool = False,
        progress: ProgressLike = None,
        total: int | None = None,
        max_memory: float | str | None = None,
        spill_folder: Path | None = None,
        data_name: str | None = None,
        data_sha256: str | None = None,
        seed: int = 0,
        synthetic: bool = False,
        modality: str | None = None,
        threads: int = 0,
    ) -> None:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}: of a pipeline give its transformer or unet")
        if hasattr(module, "_orig_mod"):
            raise TypeError("module is compiled: its layers run without hooks. Record the module itself, before torch.compile")
        if append and overwrite:
            raise TypeError("append merges into the file and overwrite replaces it: give one of them")
        self.path = None if path is None else _jobs.path_of(path)
        self.module = module
        self.passes = 0
        self._clock = Clock(module, timestep, num_timesteps, scale)
        own = {name for name, _ in module.named_parameters()}  # a tied weight stands under its first name alone, as in a saved model: mostly an embedding's
        kinds = (torch.nn.Linear, *CONVOLUTIONS)
        parts = [(name, part) for name, part in module.named_modules() if isinstance(part, kinds) and (f"{name}.weight" if name else "weight") in own]
        self._layers = chosen([Layer(name, part, prefix) for name, part in parts], layers, exclude, prefix)
        self._settings: dict[str, Any] = {
            "num_timesteps": self._clock.num_timesteps,
            "groups": groups if self._clock.num_timesteps else 1,
            "hessian": hessian,
            "hessian_pooled": hessian_pooled,
            "hessian_full": commonest(layer.n_inputs for layer in self._layers) if hessian_full is None else hessian_full,
            "max_memory": 0 if max_memory is None else int(_jobs.bytes_of(max_memory)),
            "spill_folder": spill_folder,
            "data_name": data_name,
            "data_sha256": data_sha256,
            "seed": seed,
            "synthetic": synthetic,
            "modality": modality,
        }
        self.calibration: Calibration = Calibration(**self._settings)
        self._earlier = self._open_earlier(append, overwrite)
        self._gradients, self._share = gradients, share_inputs
        weights = [layer.module.weight for layer in self._layers if isinstance(getattr(layer.module, "weight", None), torch.nn.Parameter)]
        self._curvature = Curvature(module, gradients, output, weights, seed) if gradients not in (False, True) else None
        if output is not None and self._curvature is None:
            raise TypeError("output says what gradients='output' or 'logits' are taken of: give one of them")
        self._watch, self._total, self._started = Watch(progress), total, 0.0
        self._threads = threads
        self._handles: list[Any] = []
        self._borrowed: list[torch.nn.Parameter] = []
        self._replace = append or overwrite
        fixed = (self.calibration, self._clock, torch.Tensor, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
        for layer in self._layers:
            n_inputs = layer.n_inputs if layer.shape is None else -1
            layer.listener = _Listener(*fixed, n_inputs, threads, self._slow_hook_of(layer))
        encoders = [part for part in module.modules() if isinstance(part, torch.nn.TransformerEncoderLayer)]
        self._skippable = {id(part) for encoder in encoders for part in encoder.modules()}
        self._leading: list[Layer] = []  # layers that others follow, and those others
        self._following: list[Layer] = []
        self._leaders: dict[int, list[Layer]] = {}  # layers first called in this pass, by the address of what they read: others may share it

    def _open_earlier(self, append, overwrite):
        """The existing file, where its content is to be kept."""
        if self.path is None or not os.path.exists(self.path):
            return None
        if append:
            earlier = Calibration.open(self.path)
            Calibration(**self._settings).merge(earlier)  # schedules that disagree are told now, not after the work
            return earlier
        if not overwrite:
            raise FileExistsError(17, "the calibration file exists: append=True merges into it, overwrite=True replaces it", self.path)
        return None

    # ---- the block ----

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this Recorder is recording already")
        self._started = time.monotonic()
        self._watch.__enter__()
        if self._curvature:
            self._curvature.begin()
        hook = self._handles.append
        hook(self.module.register_forward_pre_hook(self._before_pass, with_kwargs=True, prepend=True))
        hook(self.module.register_forward_hook(self._after_pass))
        for layer in self._layers:
            hook(Preceding(layer) if self._can_precede(layer.module) else layer.module.register_forward_pre_hook(hook_of(layer), with_kwargs=True))
            if self._gradients:
                self._watch_gradient(layer)
        return self

    def _can_precede(self, module):
        """Whether a listener may stand before the module's call. A hook costs several times as much, but is what other hooks, compiled modules and encoder
        layers get on with, which look for hooks and else skip the calls of their parts."""
        return getattr(module, "_compiled_call_impl", module) is None and not module._forward_pre_hooks and id(module) not in self._skippable

    def __exit__(self, kind, value, traceback) -> None:
        self._remove_hooks()
        self._watch.__exit__(kind, value, traceback)
        if kind is None:
            if self.passes == 0:
                warn("nothing was recorded: the module did not run inside the block" + (f"; {self.path} was not written" if self.path else ""))
                return
            if self.path is not None:
                self.save()
            self._warn_of_gaps()

    def _remove_hooks(self):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for weight in self._borrowed:
            weight.requires_grad_(False)
        self._borrowed.clear()
        if self._curvature:
            self._curvature.end()
        for layer in self._layers:
            layer.inputs.clear()
        self._leaders.clear()

    def save(self) -> None:
        """Writes what was recorded so far; the file is replaced when the block ends.

        >>> import torch
        >>> from arrow_quant_v2.torch import Recorder
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> with Recorder(model, 'so-far.aqcal', timestep=None, overwrite=True) as rec:
        ...     out = model(torch.ones(2, 4))
        ...     rec.save()
        """
        if self.path is None:
            raise ValueError("there is no path to write to: the Recorder was made without one")
        self.collect().save(self.path, overwrite=self._replace)
        self._replace = True

    def collect(self) -> Calibration:
        """What was recorded so far, with what an appended file held, as one collection.

        >>> import torch
        >>> from arrow_quant_v2.torch import Recorder
        >>> model = torch.nn.Linear(4, 4)
        >>> with Recorder(model, None, timestep=None) as rec:
        ...     out = model(torch.ones(2, 4))
        >>> rec.collect().stats('weight', group=0)['count']
        2
        """
        return self.calibration if self._earlier is None else united([self._earlier, self.calibration], self._settings)

    def _warn_of_gaps(self):
        silent = [layer.name for layer in self._layers if layer.index is None]
        if silent:
            warn(f"{len(silent)} of {len(self._layers)} layers did not run and have no statistics: {', '.join(silent[:5])}{', …' if len(silent) > 5 else ''}")
        if self._clock.num_timesteps:
            seen = {self._clock.group_of(t, self.calibration.groups) for t in self._clock.seen}
            empty = [str(g) for g in range(self.calibration.groups) if g not in seen]
            if empty:
                warn(f"no timestep fell into {len(empty)} of {self.calibration.groups} time groups: {', '.join(empty)}")

    # ---- passes ----

    def _before_pass(self, module, args, kwargs):
        self._clock.read(args, kwargs)
        self._leaders.clear()
        for layer in self._leading:
            layer.inputs.clear()
        if self._curvature:
            self._curvature.enter()

    def _after_pass(self, module, args, output):
        for layer in self._following:
            if layer.n_calls != layer.follows.n_calls:
                raise differs(layer, "did not run each time")
        if self._curvature:
            output = self._curvature.backward(output)
        self.passes += 1
        self._clock.forget()
        self._leaders.clear()
        elapsed = time.monotonic() - self._started
        fraction = min(1.0, self.passes / self._total) if self._total else 0.0
        left = elapsed / fraction - elapsed if fraction else None
        if not self._watch("record", None, self.passes, self._total or 0, 0, 0, fraction, elapsed, left, None):
            raise Interrupted(f"recording was stopped after {self.passes} passes; no file was written")
        return output if self._curvature else None

    # ---- layers ----

    def _slow_hook_of(self, layer):
        """What the listener before a layer calls with an input that it does not hand over itself."""
        record = self._record_linear if layer.shape is None else self._record_convolution

        def hook(x):
            if layer.index is None:
                self._add(layer, x)
            if layer.follows is not None:
                if not layer.follows.had(x):
                    raise differs(layer, "is given another tensor")
                return
            if layer.leads:
                layer.remember(x)
            record(layer, x)

        return hook

    def _add(self, layer, x):
        """First call: another layer that was first called in this pass with the very same values leads this one."""
        others = self._leaders.setdefault(x.data_ptr(), []) if self._share and not x.is_inference() else []
        leader = next((o for o in others if o.n_calls == 1 and o.n_inputs == layer.n_inputs and o.shape == layer.shape and o.had(x)), None)
        layer.index = self.calibration.add_layer(layer.name, layer.n_inputs, same_input_as=leader.name if leader else None)
        layer.follows = leader
        layer.listener.settle(layer.index, leader is not None, leader.inputs if leader else None)
        if leader is None:
            others.append(layer)
            layer.remember(x)
            return
        self._following.append(layer)
        if not leader.leads:
            leader.leads = True
            leader.listener.settle(leader.index, False, leader.inputs)
            self._leading.append(leader)

    def _record_linear(self, layer, x):
        times = self._clock.of(x, x.shape[0] if x.dim() > 2 else 0)
        rows = in_memory(x)
        if rows.dim() != 2:
            rows = rows.reshape(-1, layer.n_inputs)
        self.calibration.update(layer.index, rows.numpy(), times, self._threads)

    def _record_convolution(self, layer, x):
        s = layer.shape
        if x.dim() == s.n_dims + 1:
            x = x.unsqueeze(0)
        times = self._clock.of(x, x.shape[0])
        if s.pad is not None:
            x = functional.pad(x, s.pad, mode=s.pad_mode)
        values = in_memory(x).contiguous().numpy()
        self.calibration.update_conv(layer.index, values, s.kernel, s.stride, s.padding, s.dilation, s.groups, times, self._threads)

    # ---- gradients ----

    def _watch_gradient(self, layer):
        weight = getattr(layer.module, "weight", None)
        if not isinstance(weight, torch.nn.Parameter) or not weight.is_floating_point():
            return
        lent = not weight.requires_grad or self._curvature is not None
        if lent:
            weight.requires_grad_(True)
            self._borrowed.append(weight)
        self._handles.append(weight.register_hook(lambda gradient: self._add_gradient(layer, gradient)))
        if lent:  # nobody else asked for it: it need not stay in memory
            self._handles.append(weight.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None)))

    def _add_gradient(self, layer, gradient):
        if layer.index is not None:
            values = in_memory(gradient).reshape(gradient.shape[0], -1).contiguous().numpy()
            self.calibration.add_gradient(layer.index, values)

    def add_gradients(self) -> None:
        """Adds the .grad of each recorded weight, for callers that run their own backward passes without gradients=True.

        >>> import torch
        >>> from arrow_quant_v2.torch import Recorder
        >>> model = torch.nn.Linear(4, 4)
        >>> with Recorder(model, 'linear.aqcal', timestep=None, overwrite=True) as rec:
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     rec.add_gradients()
        >>> rec.calibration.gradient('weight')[0].tolist()
        [4.0, 4.0, 4.0, 4.0]
        """
        if self._gradients:
            raise RuntimeError("gradients=True adds them already, at each backward pass")
        for layer in self._layers:
            gradient = getattr(getattr(layer.module, "weight", None), "grad", None)
            if gradient is not None:
                self._add_gradient(layer, gradient)

    def __repr__(self):
        return f"<Recorder of {len(self._layers)} layers, {self.passes} passes, for {self.path!r}>"


def united(parts, settings):
    """One collection of several. Layers share statistics in it where they share the same ones in every part that has them."""
    whole = Calibration(**settings)
    sources, sizes, added = {}, {}, set()
    for part in parts:
        for name in part.layers:
            sources.setdefault(name, set()).add(part.source(name))
            sizes[name] = part.n_inputs(name)

    def add(name):
        if name in added:
            return
        added.add(name)
        leader = next(iter(sources[name])) if len(sources[name]) == 1 and name not in sources[name] else None
        if leader:
            add(leader)
        whole.add_layer(name, sizes[name], same_input_as=leader)

    for name in sources:
        add(name)
    for part in parts:
        whole.merge(part)
    return whole


# ---- what the recorder keeps about a layer ----


class Layer:
    """One recorded module. `follows`: the layer whose statistics hold for this one too; `leads`: others follow this one; `inputs`: what it was given lately."""

    __slots__ = ("name", "module", "n_inputs", "shape", "index", "listener", "follows", "leads", "inputs")

    def __init__(self, name, module, prefix):
        self.name = prefix + (name + "." if name else "") + "weight"
        self.module = module
        self.shape = None if isinstance(module, torch.nn.Linear) else Convolution(module)
        self.n_inputs = module.in_features if self.shape is None else self.shape.n_inputs
        self.index = self.follows = self.listener = None
        self.leads = False
        self.inputs = []

    @property
    def n_calls(self):
        return self.listener.n_calls

    def remember(self, x):
        self.inputs.append((weakref.ref(x), version_of(x)))

    def had(self, x):
        """Whether x holds the very values that this layer was given in this pass: the same memory, alive since then, and unchanged."""
        version = version_of(x)
        for reference, then in self.inputs:
            y = reference()
            if y is not None and then == version and (y is x or same_memory(x, y)):
                return True
        return False


def hook_of(layer):
    """Its listener as a function, which copies of the module can take along."""
    return lambda module, args, kwargs: layer.listener(module, args, kwargs)


class Preceding:
    """A listener in the place where torch keeps a module's compiled call; it leads to the plain one, hooks and all. Copies and pickles do not take it along."""

    def __init__(self, layer):
        self.module, self.listener = layer.module, layer.listener
        self.listener.precede(self.module._call_impl)
        self.module._compiled_call_impl = self.listener

    def remove(self):
        if self.module._compiled_call_impl is self.listener:
            self.module._compiled_call_impl = None
        self.listener.precede(None)


def version_of(x):
    """Counts changes in place. Tensors of inference mode do not have it: with them no layers begin to share."""
    return None if x.is_inference() else x._version


def differs(layer, how):
    return RuntimeError(
        f"{layer.name} {how} where {layer.follows.name} ran, whose input it shared on its first call: record again with share_inputs=False, which counts them "
        "apart"
    )


def same_memory(x, y):
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype and x.device == y.device


class Convolution:
    """The shape of a convolution as the library takes it. Padding that is uneven or not of zeros is done by torch beforehand (pad, pad_mode)."""

    __slots__ = ("n_dims", "n_inputs", "kernel", "stride", "padding", "dilation", "groups", "pad", "pad_mode")

    def __init__(self, module):
        self.kernel, self.stride, self.dilation, self.groups = module.kernel_size, module.stride, module.dilation, module.groups
        self.n_dims = len(self.kernel)
        self.n_inputs = module.in_channels // module.groups * int(np.prod(self.kernel))
        self.pad = None
        self.pad_mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        if module.padding == "valid":
            sides = [(0, 0)] * self.n_dims
        elif module.padding == "same":
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            sides = [(span // 2, span - span // 2) for span in spans]
        else:
            sides = [(p, p) for p in module.padding]
        self.padding = tuple(before for before, _ in sides)
        if any(before != after for before, after in sides) or (self.pad_mode != "constant" and any(self.padding)):
            self.pad = [p for before, after in reversed(sides) for p in (before, after)]
            self.padding = (0,) * self.n_dims

    def __eq__(self, other):
        return isinstance(other, Convolution) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]


def in_memory(x):
    """x as float32 on the CPU, outside the graph: itself, or one copy."""
    if x.requires_grad:
        x = x.detach()
    if x.device.type == "meta":
        raise TypeError("the module runs on the meta device: its inputs have no values to record")
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        x = x.to("cpu", torch.float32)
    return x.resolve_neg() if x.is_neg() else x


def commonest(sizes):
    """The most frequent of some numbers; of several the largest."""
    counted = Counter(sizes)
    return max(counted, key=lambda size: (counted[size], size))


def chosen(layers, include, exclude, prefix):
    """The layers whose weight or module name a pattern of `include` (None: all) matches and none of `exclude`; a pattern that matches nothing is an error."""

    def matches(layer, pattern):
        names = (layer.name, layer.name[len(prefix) :])
        return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern) for name in names)

    for what, patterns in (("layers", include or ()), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise TypeError(f"{what} must be a list of names or globs, not str")
        for pattern in patterns:
            if not any(matches(layer, pattern) for layer in layers):
                near = _jobs.nearest(pattern, [layer.name.removesuffix(".weight") for layer in layers])
                raise ValueError(f"{what}: no linear or convolution layer matches {pattern!r}{near}")
    kept = [layer for layer in layers if (include is None or any(matches(layer, p) for p in include)) and not any(matches(layer, p) for p in exclude)]
    if not kept:
        raise ValueError("there is nothing to record: the module has no linear or convolution layer" + (" that was asked for" if layers else ""))
    return kept
