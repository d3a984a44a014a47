"""Where in the schedule a pass is: found among the arguments of a module's forward, and counted as the library counts timesteps."""

from __future__ import annotations

import inspect
import math

import numpy as np
import torch

from .._core import ConfigurationError, FormatError
from .._progress import warn

__all__ = ["Clock"]

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level", "mask_ratio")
ROUNDING = 1e-3  # of a timestep: t / 1000 * 1000 is t again in float32


class Clock:
    """Where in the schedule a forward pass is: its timesteps as the library counts them, 0 (clean) to T-1 (pure noise)."""

    def __init__(self, module, timestep, num_timesteps, scale):
        self.find = timestep if callable(timestep) else None
        self.parameter = None
        self.signature = None
        self.num_timesteps = 0 if timestep is None else num_timesteps or 1000
        self.scale = scale
        self.decided = scale is not None
        self.now = None  # None: unknown; int: all rows; int32 array: one for each sample
        self.seen = set()
        self.told = set()
        if isinstance(timestep, str):
            self.signature = inspect.signature(module.forward)
            self.parameter = self._parameter(timestep)
        elif timestep is not None and self.find is None:
            raise TypeError(f"timestep must be the name of an argument, a callable or None, not {type(timestep).__name__}")

    def _parameter(self, name):
        known = self.signature.parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
        if name in known or (open_ended and name != "timestep"):
            return name
        if name == "timestep":  # the default: other customary names serve as well
            found = next((other for other in TIMESTEP_NAMES if other in known), name if open_ended else None)
            if found:
                return found
        raise ValueError(
            f"forward has no argument {name!r}; it has {', '.join(known)}. Give timestep= one of them, a callable that gets forward's arguments, or None for a "
            "model without timesteps"
        )

    def read(self, args, kwargs):
        if self.num_timesteps == 0:
            self.now = 0
            return
        if self.find is not None:
            value = self.find(*args, **kwargs)
        elif self.parameter in kwargs:
            value = kwargs[self.parameter]
        else:
            arguments = self.signature.bind_partial(*args, **kwargs).arguments
            value = arguments.get(self.parameter, self.signature.parameters[self.parameter].default if self.parameter in self.signature.parameters else None)
        self.now = None if value is None or value is inspect.Parameter.empty else self.steps_of(value)

    def forget(self):
        self.now = None

    def steps_of(self, value):
        """Timesteps of the schedule, from what the model calls its timestep: an int, or an int32 array where samples differ."""
        if isinstance(value, torch.Tensor):
            floating = value.is_floating_point()
            values = value.detach().reshape(-1).tolist()
        else:
            value = np.asarray(value)
            floating = value.dtype.kind == "f"
            values = value.astype(np.float64).reshape(-1).tolist()
        if not values:
            return None
        distinct = set(values)  # mostly one
        bad = next((v for v in distinct if not math.isfinite(v)), None)
        if bad is not None:
            raise FormatError(f"a timestep is not finite: {bad}")
        factor = self.num_timesteps / self._scale_of(max(distinct), floating)
        steps = {v: self._step_of(v, factor) for v in distinct}
        self.seen.update(steps.values())
        return steps[values[0]] if len(set(steps.values())) == 1 else np.array([steps[v] for v in values], np.int32)

    def _step_of(self, value, factor):
        last = self.num_timesteps - 1
        step = math.floor(min(max(value * factor + ROUNDING, -1), last + 2))
        if not 0 <= step <= last + 1:
            self.tell("outside", f"timestep {value:g} is outside the schedule of {self.num_timesteps}; counted at its nearest end")
        return min(max(step, 0), last)  # T is the noisiest end itself: ratio 1, sigma 1

    def _scale_of(self, largest, floating):
        """What the model counts as the full schedule: T itself, or 1 where floats say how noisy (decided on the first pass)."""
        if not floating and not self.decided:
            return self.num_timesteps
        if self.scale is None:
            self.scale = 1.0 if largest <= 1 else float(self.num_timesteps)
        elif not self.decided and self.scale == 1.0 and largest > 1:
            raise ConfigurationError(
                f"the first passes had timesteps of at most 1, taken as ratios of the schedule, now there is {largest:g}: say what the full schedule "
                f"counts with scale=1.0 or scale={self.num_timesteps}"
            )
        return self.scale

    def of(self, x, n_first):
        """What Calibration.update takes for input x. n_first: its first dimension where that is known to count samples, else 0."""
        now = self.now
        if now is None:
            self.tell("unknown", "a layer ran at an unknown timestep (outside the module's forward, or without its timestep argument); counted in time group 0")
            return None
        if type(now) is int:
            return now
        rows = n_first or x.shape[0]
        if rows % len(now) == 0:
            return now
        self.tell(
            "mixed",
            f"an input of shape {tuple(x.shape)} does not divide into the {len(now)} samples of the pass, whose timesteps differ; counted in time group 0",
        )
        return None

    def tell(self, kind, text):
        """A warning, once for each kind."""
        if kind not in self.told:
            self.told.add(kind)
            warn(text)

    def group_of(self, timestep, groups):
        """The g with g T / G <= t < (g + 1) T / G, rounded down."""
        return ((timestep + 1) * groups - 1) // self.num_timesteps
