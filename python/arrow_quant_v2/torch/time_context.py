"""Where in the schedule a running model is, for layers whose parameters depend on it."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from .clock import Clock

__all__ = ["TimeContext"]


class TimeContext:
    """The timestep of the forward pass that runs now, shared by the layers of a model: one for all samples, or one for each.

    num_timesteps: T of the schedule; a timestep is an int, a float or a tensor, as the model takes it: floats of at most 1 are ratios of the schedule (the mask
    ratio of a language model), others count as the scheduler does; `scale` says what counts as the full schedule when that is not clear.

    >>> import torch
    >>> from arrow_quant_v2.torch import TimeContext
    >>> time = TimeContext(num_timesteps=1000)
    >>> with time.at(torch.tensor([0.0, 0.5])):
    ...     time.steps()
    [0, 500]
    """

    __module__ = "arrow_quant_v2.torch"

    def __init__(self, num_timesteps: int = 1000, scale: float | None = None):
        self.num_timesteps, self.scale = num_timesteps, scale
        self._clock = Clock(None, _itself, num_timesteps, scale)
        self._handle = None

    def attach(self, module, timestep="timestep"):
        """Takes the timestep from the arguments of module.forward at each pass: `timestep` is an argument's name, or a callable that gets forward's arguments.
        Returns this object.

        >>> import torch
        >>> from arrow_quant_v2.torch import TimeContext
        >>> time = TimeContext().attach(torch.nn.Linear(4, 4), timestep=lambda *args, **kwargs: 500)
        >>> time
        TimeContext(num_timesteps=1000, attached=True)
        """
        self.detach()
        self._clock = Clock(module, timestep, self.num_timesteps, self.scale)
        self._handle = module.register_forward_pre_hook(lambda _, args, kwargs: self._clock.read(args, kwargs), with_kwargs=True, prepend=True)
        return self

    def detach(self):
        """Stops taking timesteps from a module.

        >>> import torch
        >>> from arrow_quant_v2.torch import TimeContext
        >>> time = TimeContext().attach(torch.nn.Linear(4, 4), timestep=lambda *args, **kwargs: 500)
        >>> time.detach()
        >>> time
        TimeContext(num_timesteps=1000, attached=False)
        """
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def at(self, timestep):
        """Sets the timestep inside a `with` block.

        >>> from arrow_quant_v2.torch import TimeContext
        >>> with TimeContext(num_timesteps=1000).at(0.25) as time:
        ...     time.steps()
        [250]
        """
        before = self._clock.now
        self._clock.now = self._clock.steps_of(timestep)
        try:
            yield self
        finally:
            self._clock.now = before

    def steps(self) -> list[int]:
        """The timesteps of now as the schedule counts them: one for all samples, or one for each. RuntimeError where none is known.

        >>> from arrow_quant_v2.torch import TimeContext
        >>> with TimeContext(num_timesteps=1000).at([10, 20]) as time:
        ...     time.steps()
        [10, 20]
        """
        now = self._clock.now
        if now is None:
            raise RuntimeError("the timestep is not known: run the layer inside its model (attach), or inside `with context.at(timestep)`")
        return np.atleast_1d(now).tolist()

    def known(self):
        """steps(), or None where no timestep is known, with a warning the first time.

        >>> from arrow_quant_v2.torch import TimeContext
        >>> time = TimeContext()
        >>> with time.at(7):
        ...     time.known()
        [7]
        """
        if self._clock.now is not None:
            return self.steps()
        self._clock.tell(
            "default",
            "a time-aware layer ran at an unknown timestep, with its default group (the widest): run it inside its model (attach), or inside "
            "`with context.at(timestep)`",
        )
        return None

    def __repr__(self):
        return f"TimeContext(num_timesteps={self.num_timesteps}, attached={self._handle is not None})"


def _itself(value):
    return value
