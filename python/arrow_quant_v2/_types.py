"""Shapes of arguments and results, for type checkers; nothing imports this at run time."""

from collections.abc import Callable
from os import PathLike
from typing import Any, TypeAlias, TypedDict

Path: TypeAlias = str | PathLike[str]

ProgressCallback: TypeAlias = Callable[[str, float], object]
"""Called with (message, fraction)."""

ProgressLike: TypeAlias = bool | Callable[[Any], object] | None
"""True for a bar on a terminal, or a callable that takes a Progress."""

Array: TypeAlias = Any
"""float32, float16, bfloat16 or float64 of any shape and strides: NumPy, torch on the CPU, DLPack, or nested lists of numbers."""

ArrowTable: TypeAlias = Any
"""A pyarrow.Table, a pyarrow.RecordBatch, or any object with __arrow_c_stream__ or __arrow_c_array__."""


class LayerResult(TypedDict):
    quantized_data: Any
    """bytes, or with as_numpy=True a uint8 array"""
    scales: Any
    """list of float, or with as_numpy=True a float32 array; so are the zero points"""
    zero_points: Any
    shape: list[int]
    bit_width: int
    group_size: int


class StoredLayer(TypedDict):
    """What gptq and r2q say beside codes and parameters."""

    quantized_data: Any
    shape: list[int]
    bit_width: int
    group_size: int
    """inputs that share a scale and a zero point (levels)"""
    params: Any
    """the stored parameters: bytes, or with as_numpy=True a uint8 array"""
    params_form: str
    """'f16', 'f32', 'two-level' or 'r2q'"""
    params_group: int
    """the group that was asked for; two-level groups hold several of group_size"""
    method: str
    stored_bytes: int
    cosine: float | None
    """None, as sqnr_db and output_sqnr_db, with measure=False"""
    sqnr_db: float | None
    output_sqnr_db: float | None
    damping: float | None


class SolvedLayer(StoredLayer):
    scales: Any
    zero_points: Any


class R2QLayer(StoredLayer):
    levels: Any
    """four values a group, of the codes 0 to 3"""


class TimeGroupParams(TypedDict):
    scale: float
    zero_point: float
    group_size: int
    time_range: tuple[int, int]


class TimeAwareLayer(LayerResult):
    time_group_params: list[TimeGroupParams]


class LayerAutoResult(TypedDict):
    quantized_data: bytes
    scales: list[float]
    zero_points: list[float]
