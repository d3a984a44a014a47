"""Time groups, spatial methods and layers on integers, on arrays: what the pipeline does to activations, piece by piece.

The C library computes; this module checks arguments and gives results their form.
"""

from __future__ import annotations

import os

from . import _core, _jobs
from ._core import ShapeMismatchError

__all__ = ["ChannelGroups", "SpatialQuantizer", "TimeAwareQuantizer", "linear_integer"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from ._types import Array, LayerResult, TimeAwareLayer, TimeGroupParams
    from .reader import Tensor


# ---- spatial ----


class ChannelGroups:
    """8-bit codes of a matrix with one scale and zero point per group of consecutive channels (rows).

    data uint8 [channels, features], scales and zero_points float32 [groups], group_size; value = (code - zero_point) * scale.

    >>> import numpy as np, arrow_quant_v2 as aq
    >>> coded = aq.SpatialQuantizer(group_size=32).per_group_quantize(np.float32([[0, 1], [2, 3]]))
    >>> coded.data.tolist(), coded.scales.shape, coded.dequantize().tolist()[1]
    ([[0, 85], [170, 255]], (1,), [2.0, 3.0])
    """

    __slots__ = ("data", "group_size", "scales", "zero_points")

    def __init__(self, data, scales, zero_points, group_size):
        self.data, self.scales, self.zero_points, self.group_size = data, scales, zero_points, group_size

    def dequantize(self) -> Array:
        """The values that the codes stand for, float32 [channels, features].

        >>> import numpy as np, arrow_quant_v2 as aq
        >>> aq.SpatialQuantizer().per_group_quantize(np.float32([[-1, 0.5]])).dequantize().round(2).tolist()
        [[-1.0, 0.5]]
        """
        import numpy as np

        group = np.arange(self.data.shape[0]) // self.group_size
        return (self.data.astype(np.float32) - self.zero_points[group, None]) * self.scales[group, None]

    def __repr__(self):
        return f"<ChannelGroups {list(self.data.shape)}: {len(self.scales)} groups of {self.group_size}>"


class SpatialQuantizer:
    """The spatial methods of DiTAS (arXiv 2409.07756) on arrays. group_size: channels that share 8-bit parameters: 32 (fine) to 256 (coarse).

    Arrays: float32 (float16, bfloat16, float64 are converted), or nested lists. ValueError names the first NaN or Inf.

    >>> import numpy as np, arrow_quant_v2 as aq
    >>> w, x = np.float32([[1, 4], [2, 0]]), np.float32([[8, 1], [4, -1]])
    >>> w2, x2, scales = aq.SpatialQuantizer().channel_equalization(w, x)
    >>> scales.tolist(), np.allclose(x2 @ w2.T, x @ w.T)
    ([0.5, 2.0], True)
    """

    def __init__(self, group_size: int = 64):
        self.group_size = _jobs.one_of(group_size, (32, 64, 128, 256), "group size")

    def per_group_quantize(self, weights: Array) -> ChannelGroups:
        """8-bit codes of weights [channels, features], each group of consecutive channels for itself; the last group may be short.

        scale = (max - min) / 255, zero_point = -min / scale, code = round(v / scale + zero_point), half to even, clamped to 0..255; a group of one value has
        scale 1 and comes back exactly.

        >>> import numpy as np, arrow_quant_v2 as aq
        >>> coded = aq.SpatialQuantizer(group_size=32).per_group_quantize(np.ones((70, 8), np.float32))
        >>> coded.data.shape, coded.scales.tolist(), coded.zero_points.tolist()
        ((70, 8), [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0])
        """
        return ChannelGroups(*_core._channel_group_u8(weights, self.group_size), self.group_size)

    def channel_equalization(self, weights: Array, activations: Array) -> tuple[Array, Array, Array]:
        """(weights', activations', scales) for weights [out, in] and activations [n, in]: new arrays W / s and X s with the same product.

        s_i = sqrt(max|W_i| / max|X_i|) per input channel; 1 where a channel is never active or its weights are zero.

        >>> import numpy as np, arrow_quant_v2 as aq
        >>> w, x = np.float32([[9, 3]]), np.float32([[1, 0]])
        >>> [a.tolist() for a in aq.SpatialQuantizer().channel_equalization(w, x)]
        [[[3.0, 3.0]], [[3.0, 0.0]], [3.0, 1.0]]
        """
        return _core._channel_equalization(weights, activations)

    def activation_smoothing(self, x: Array, alpha: float = 0.5) -> Array:
        """x (1 - alpha) + mean(x) alpha, the mean along the last axis: alpha 0 gives x, 1 the mean. ValueError for alpha outside 0..1.

        >>> import numpy as np, arrow_quant_v2 as aq
        >>> aq.SpatialQuantizer().activation_smoothing(np.float32([0, 4]), alpha=0.5).tolist()
        [1.0, 3.0]
        """
        alpha = float(alpha)
        if not 0 <= alpha <= 1:
            raise ValueError(f"Invalid alpha: {alpha}. Must be between 0.0 and 1.0")
        return _core._activation_smoothing(x, alpha)

    def __repr__(self):
        return f"SpatialQuantizer(group_size={self.group_size})"


# ---- time ----


class TimeAwareQuantizer:
    """Parameters of activations per group of timesteps. num_time_groups: 1 to 100.

    >>> import arrow_quant_v2 as aq
    >>> aq.TimeAwareQuantizer(num_time_groups=3).group_timesteps(1000)
    [(0, 333), (333, 666), (666, 1000)]
    """

    def __init__(self, num_time_groups: int = 10):
        num_time_groups = _jobs.whole(num_time_groups, "num_time_groups")
        if not 1 <= num_time_groups <= 100:
            raise ValueError(f"Invalid number of time groups: {num_time_groups}. Must be between 1 and 100")
        self.num_time_groups = num_time_groups

    def group_timesteps(self, num_timesteps: int) -> list[tuple[int, int]]:
        """[(start, end), ...]: every timestep 0 <= t < num_timesteps in exactly one range, sizes within one of each other; fewer timesteps than groups give
        that many ranges.

        >>> import arrow_quant_v2 as aq
        >>> aq.TimeAwareQuantizer().group_timesteps(4)
        [(0, 1), (1, 2), (2, 3), (3, 4)]
        """
        num_timesteps = _jobs.whole(num_timesteps, "num_timesteps")
        if num_timesteps < 1:
            raise ValueError(f"Invalid number of timesteps: {num_timesteps}. Must be 1 or more")
        return _core._time_split(num_timesteps, self.num_time_groups)

    def statistics(self, activations: Array, timesteps: Any) -> list[dict[str, Any]]:
        """Statistics by timestep, sorted: list of dict timestep, mean, std, min, max, count.

        activations [n, ...] with one timestep each, or one timestep for all.

        >>> import numpy as np, arrow_quant_v2 as aq
        >>> stats = aq.TimeAwareQuantizer().statistics(np.float32([[0, 2], [1, 1], [4, 8]]), [7, 7, 3])
        >>> [(s['timestep'], s['mean'], s['max'], s['count']) for s in stats]
        [(3, 6.0, 8.0, 2), (7, 1.0, 2.0, 4)]
        """
        import numpy as np

        x = np.ascontiguousarray(activations, np.float32)
        if np.ndim(timesteps) == 0:
            return [_as_dict(_core._time_stats(x, int(timesteps)))]
        times = np.asarray(timesteps)
        if x.ndim < 1 or times.shape != x.shape[:1]:
            raise ShapeMismatchError(f"Shape mismatch: activations have shape {list(x.shape)}, timesteps have shape {list(times.shape)}")
        return [_as_dict(_core._time_stats(x[times == t], int(t))) for t in np.unique(times)]

    def compute_params_per_group(self, stats: Any, *, num_timesteps: int | None = None, clip: bool = False) -> list[TimeGroupParams]:
        """Parameters of each time group from statistics by timestep: list of dict time_range (start, end), scale, zero_point, group_size.

        stats: a list of dict mean, std, min, max, and where they are known timestep (default: its index) and count (default 1); a dict of such arrays; the path
        of a JSONL file with one such object a line, or with data (list of float) and timestep; or a list of such rows. Statistics of the timesteps of a group
        are combined exactly; scale = (max - min) / 255 and zero_point = -min / scale of a range that contains 0; group_size runs from 256 in the noisiest
        group to 64 in the cleanest. clip: narrow the range where that lowers the expected error of the codes. num_timesteps: of the schedule (None: the
        largest timestep + 1). A group that nothing is known of takes the nearest one's scale and zero point.
        Raises ValueError for statistics that cannot be, with the timestep or line.

        >>> import arrow_quant_v2 as aq
        >>> stats = {'mean': [0, 0, 0, 0], 'std': [1, 1, 1, 1], 'min': [-1, -1, -2, -3], 'max': [1, 4, 2, 3]}
        >>> params = aq.TimeAwareQuantizer(num_time_groups=2).compute_params_per_group(stats)
        >>> [(p['time_range'], round(p['scale'] * 255), p['group_size']) for p in params]
        [((0, 2), 5, 64), ((2, 4), 6, 256)]
        """
        rows = [_row(i, place, row) for i, (place, row) in enumerate(_rows_of(stats))]
        if not rows:
            raise ValueError("there are no statistics to compute time groups from")
        last = max(row[0] for row in rows)
        return _core._time_params(rows, last + 1 if num_timesteps is None else _jobs.whole(num_timesteps, "num_timesteps"), self.num_time_groups, bool(clip))

    def smooth(self, params: Sequence[TimeGroupParams], threshold: float = 0.3, window: int = 5, interpolation: str = "linear") -> list[TimeGroupParams]:
        """Limits jumps between neighbouring groups: where the scale jumps by more than threshold, up to `window` groups of the smaller side rise towards the
        larger one along a curve ('linear', 'cubic' or 'sigmoid'). Ranges only grow.

        >>> import arrow_quant_v2 as aq
        >>> params = [{'time_range': (i, i + 1), 'scale': s, 'zero_point': 128.0, 'group_size': 64} for i, s in enumerate((1.0, 1.0, 3.0))]
        >>> [p['scale'] for p in aq.TimeAwareQuantizer(3).smooth(params, window=1)]
        [1.0, 2.0, 3.0]
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"Invalid smoothness_threshold: {threshold}. Must be between 0.0 and 1.0")
        if not 1 <= window <= 20:
            raise ValueError(f"Invalid smoothing_window: {window}. Must be between 1 and 20")
        return _core._time_smooth(params, threshold, window, interpolation)

    def markov_metrics(self, params: Sequence[TimeGroupParams], threshold: float = 0.3) -> dict[str, Any]:
        """Smoothness of parameters over time, as ArrowQuantV2.get_markov_metrics gives it for a model: dict smoothness_score, boundary_scores, violation_count,
        violations, is_valid.

        >>> import arrow_quant_v2 as aq
        >>> params = [{'time_range': (i, i + 1), 'scale': s, 'zero_point': 0.0, 'group_size': 64} for i, s in enumerate((1.0, 1.2, 3.0))]
        >>> m = aq.TimeAwareQuantizer(3).markov_metrics(params)
        >>> m['violation_count'], m['violations'][0]['boundary_idx'], m['violations'][0]['severity'], round(m['boundary_scores'][0], 3)
        (1, 1, 'high', 0.9)
        """
        return _core._time_metrics(params, float(threshold))

    def quantize_layer(self, weights: Array, params: Sequence[TimeGroupParams], *, bit_width: int = 4, group_size: int = 128) -> TimeAwareLayer:
        """A layer result (see ArrowQuantV2.quantize_batch) with time_group_params, a checked copy of params: weights are coded once, for all timesteps; the
        parameters code the layer's input, see linear_integer.

        >>> import numpy as np, arrow_quant_v2 as aq
        >>> q = aq.TimeAwareQuantizer(2)
        >>> params = q.compute_params_per_group([{'mean': 0, 'std': 1, 'min': -2, 'max': 2}] * 10)
        >>> layer = q.quantize_layer(np.eye(4, dtype=np.float32), params)
        >>> layer['bit_width'], [p['time_range'] for p in layer['time_group_params']]
        (4, [(0, 5), (5, 10)])
        """
        groups = _core._time_groups(params)
        result = _core.quantize_array(weights, bit_width, group_size)
        return {**result, "time_group_params": groups}

    def __repr__(self):
        return f"TimeAwareQuantizer(num_time_groups={self.num_time_groups})"


_STATS = ("mean", "std", "min", "max")


def _as_dict(row):
    timestep, count, *figures = row
    return {"timestep": timestep, **dict(zip(_STATS, figures, strict=True)), "count": count}


def _rows_of(stats) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(place for messages, row) of each row of statistics."""
    if isinstance(stats, (str, os.PathLike)):
        yield from _lines_of(os.fspath(stats))
    elif hasattr(stats, "keys"):
        columns = {key: stats[key] for key in ("timestep", "count", *_STATS) if key in stats}
        missing = [key for key in _STATS if key not in columns]
        if missing:
            raise KeyError(f"Missing '{missing[0]}'")
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ShapeMismatchError(f"Shape mismatch: statistics have different lengths: {lengths}")
        for i in range(lengths["mean"]):
            yield f"timestep {i}", {key: column[i] for key, column in columns.items()}
    else:
        if not hasattr(stats, "__iter__"):
            raise TypeError(f"stats must be a list of dicts, a dict of arrays or a path, not {type(stats).__name__}")
        for i, row in enumerate(stats):
            if not hasattr(row, "keys"):
                raise TypeError(f"stats must be a list of dicts, a dict of arrays or a path, not a list of {type(row).__name__}")
            yield f"row {i}", row


def _lines_of(path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}: line {number}"
            try:
                row = _jobs.loads(line.decode("utf-8"))
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{place}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected an object, got {type(row).__name__}")
            yield place, row


def _row(index, place, row):
    """(timestep, count, mean, std, min, max), as the library takes it."""
    timestep = row["timestep"] if row.get("timestep") is not None else index
    if "data" in row and "mean" not in row:
        try:
            return _core._time_stats(row["data"], int(timestep))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    for key in _STATS:
        if key not in row:
            raise KeyError(f"{place}: Missing '{key}'")
    try:
        figures = [float(row[key]) for key in _STATS]
        count, timestep = int(row["count"]) if row.get("count") is not None else 1, int(timestep)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None
    if count < 0 or not 0 <= timestep < 2**31:
        raise ValueError(f"{place}: timestep is {timestep} and count is {count}; neither may be negative or above 2147483647")
    return timestep, count, *figures


# ---- layers on integers ----


def linear_integer(
    x: Array,
    layer: LayerResult | Tensor,
    groups: Any = None,
    *,
    timestep: Any = None,
    mode: str = "time",
    bias: Array | None = None,
    threads: int = 0,
) -> Array:
    """y = x W^T + bias with integers: x is coded with 8 bits, the layer's weights are their 2, 4 or 8-bit codes, sums of products are exact integers.

    x [..., in] float32; layer: a layer result, or a Tensor of an opened container, whose equalization and rotation are applied to x first.
    mode 'time': x is coded under the parameters of the time group that `timestep` falls into: one timestep, or one for each index of x's first axis.
    mode 'static': under one pair for all timesteps, a range that holds those of all groups. mode 'dynamic': each row under its own range.
    groups: list of time groups (None: the layer's time_group_params or time_groups), or for 'static' a pair (scale, zero_point).
    Returns float32 [..., out], the same bits for any number of threads and on every machine.

    >>> import numpy as np, arrow_quant_v2 as aq
    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((64, 128), np.float32), rng.standard_normal((2, 5, 128), np.float32)
    >>> q = aq.TimeAwareQuantizer()
    >>> params = q.compute_params_per_group(q.statistics(x, [100, 900]), num_timesteps=1000)
    >>> layer = q.quantize_layer(w, params, bit_width=8)
    >>> y = aq.linear_integer(x, layer, timestep=[100, 900])
    >>> y.shape, aq.sqnr_db(x @ w.T, y) > 35
    ((2, 5, 64), True)
    """
    if mode not in ("time", "static", "dynamic"):
        raise ValueError(f"Invalid mode: {mode!r}. Must be 'time', 'static', or 'dynamic'")
    if isinstance(layer, dict):
        bits, size, own = layer["bit_width"], layer.get("group_size", 128), layer.get("time_group_params")
        codes, params, form = layer["quantized_data"], (layer["scales"], layer["zero_points"]), "f32"
        shape = tuple(layer["shape"])
    else:
        codes, params, form, bits, size = layer._stored()
        shape, own = layer.shape, layer.time_groups
        x = layer._input_of(x)
    rows = int(shape[0]) if len(shape) > 1 else 1
    cols = 1
    for d in shape[1:] if len(shape) > 1 else shape:
        cols *= int(d)
    scale = zero_point = None
    if mode != "dynamic":
        scale, zero_point = _pairs_of(own if groups is None else groups, timestep, mode, x)
    return _core._linear_integer(x, codes, params, (rows, cols), bits, size, form, scale, zero_point, bias, threads)


def _pairs_of(groups, timestep, mode, x):
    """Scales and zero points for rows of x, as lists: one for all, or one for each index of the first axis."""
    if not groups:
        raise ValueError("the layer has no time groups: give groups=, or mode='dynamic'")
    if mode == "static":
        scale, zero_point = static_pair(groups)
        return [scale], [zero_point]
    groups = _core._time_groups(groups)
    if timestep is None:
        raise ValueError("mode 'time' needs a timestep: one, or one for each index of the first axis of x")
    times = [timestep] if not hasattr(timestep, "__len__") or getattr(timestep, "ndim", 1) == 0 else list(timestep)
    n_first = x.shape[0] if hasattr(x, "shape") else len(x)
    if len(times) not in (1, n_first):
        raise ShapeMismatchError(f"Shape mismatch: {len(times)} timesteps for {n_first} samples")
    found = [groups[find_group(groups, float(t))] for t in times]
    return [g["scale"] for g in found], [g["zero_point"] for g in found]


def static_pair(groups):
    """One pair for all timesteps: `groups` itself where it is a pair, else a range that holds those of all groups."""
    if len(groups) == 2 and not hasattr(groups[0], "keys"):
        return groups
    groups = _core._time_groups(groups)
    low = min(-g["zero_point"] * g["scale"] for g in groups)
    high = max((255 - g["zero_point"]) * g["scale"] for g in groups)
    scale = (high - low) / 255
    return scale, -low / scale


def find_group(groups, timestep):
    """Index of the group of a timestep; beyond the table the nearest."""
    low, high = 0, len(groups) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if groups[middle]["time_range"][0] <= timestep:
            low = middle
        else:
            high = middle - 1
    return low


for _member in (ChannelGroups, SpatialQuantizer, TimeAwareQuantizer, linear_integer):
    _member.__module__ = "arrow_quant_v2"
