"""Types of the C part; arrow_quant_v2 shows all of it."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Final, Self, final

from typing_extensions import disjoint_base

from ._types import Array, ArrowTable, LayerAutoResult, LayerResult, TimeGroupParams

__version__: Final[str]

# ---- exceptions ----

class ArrowQuantError(Exception):
    file: str | None
    tensor: str | None
    hint: str | None
    code: int

class QuantizationError(ArrowQuantError): ...
class ConfigurationError(ArrowQuantError): ...
class ValidationError(ArrowQuantError): ...
class ModelNotFoundError(ArrowQuantError, FileNotFoundError): ...
class MetadataError(ArrowQuantError): ...
class ShapeMismatchError(ArrowQuantError, ValueError): ...
class FormatError(QuantizationError): ...

class BudgetError(ConfigurationError):
    minimum: int | None

class Interrupted(ArrowQuantError): ...

# ---- the library ----

def simd_level() -> str: ...
def build_info() -> dict[str, str]: ...

# ---- configuration ----

@disjoint_base
class DiffusionQuantConfig:
    bit_width: int
    modality: str | None
    num_time_groups: int
    group_size: int
    enable_time_aware: bool
    enable_spatial: bool
    min_accuracy: float
    calibration_samples: int
    deployment_profile: str
    fail_fast: bool
    enable_entropy_adaptation: bool
    enable_transition_optimization: bool
    markov_weight: float
    entropy_weight: float
    learning_rate: float
    max_iterations: int
    convergence_threshold: float
    beta_schedule: str
    num_threads: int
    enable_streaming: bool
    enable_memory_aware_scheduling: bool
    max_memory_limit_mb: int | None
    enable_mixed_precision: bool
    skip_sensitive_layers: bool
    enable_simd: bool
    simd_threshold: int
    sensitive_layer_names: list[str]
    sensitive_layer_patterns: list[str]
    layer_bit_widths: dict[str, int]
    target_model_size_mb: float | None
    calibration_path: str | None
    seed: int
    smoothness_threshold: float
    smoothing_window: int
    smoothing_interpolation: str
    def __init__(
        self,
        bit_width: int = 4,
        modality: str | None = None,
        num_time_groups: int = 10,
        group_size: int = 128,
        enable_time_aware: bool = True,
        enable_spatial: bool = True,
        min_accuracy: float = 0.85,
        calibration_samples: int = 128,
        deployment_profile: str = "local",
        fail_fast: bool = False,
        enable_entropy_adaptation: bool = True,
        enable_transition_optimization: bool = False,
        markov_weight: float = 0.1,
        entropy_weight: float = 0.05,
        learning_rate: float = 0.01,
        max_iterations: int = 50,
        convergence_threshold: float = 0.0001,
        beta_schedule: str = "linear",
        num_threads: int = 0,
        enable_streaming: bool = True,
        enable_memory_aware_scheduling: bool = True,
        max_memory_limit_mb: int | None = None,
        enable_mixed_precision: bool = False,
        skip_sensitive_layers: bool = False,
        enable_simd: bool = True,
        simd_threshold: int = 128,
    ) -> None: ...
    @classmethod
    def from_profile(cls, profile: str) -> Self: ...
    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> Self: ...
    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self: ...
    def to_yaml(self, path: str | PathLike[str]) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...
    def validate(self) -> None: ...
    def apply_env_overrides(self) -> None: ...

# ---- arrays ----

@disjoint_base
class ArrowQuantV2:
    def __init__(self, mode: str = "diffusion") -> None: ...
    @property
    def mode(self) -> str: ...
    def quantize(self, weights: Mapping[str, Array], bit_width: int | None = None, *, as_numpy: bool = False) -> dict[str, LayerResult]: ...
    def quantize_batch(
        self, weights_dict: Mapping[str, Any], bit_width: int | None = None, continue_on_error: bool | None = None, *, as_numpy: bool = False
    ) -> dict[str, LayerResult]: ...
    def quantize_batch_with_progress(
        self,
        weights_dict: Mapping[str, Any],
        bit_width: int | None = None,
        progress_callback: Callable[[str, float], object] | None = None,
        continue_on_error: bool | None = None,
        *,
        as_numpy: bool = False,
    ) -> dict[str, LayerResult]: ...
    def quantize_layer_auto(self, weights: Any, params: Sequence[TimeGroupParams], enable_simd: bool = True) -> LayerAutoResult: ...
    def dequantize(self, result: Any, *, as_numpy: bool = True, threads: int = 0) -> Any: ...
    def quantize_arrow(self, weights_table: ArrowTable, bit_width: int | None = None) -> Any: ...
    def quantize_arrow_batch(self, record_batch: ArrowTable, bit_width: int | None = None) -> Any: ...
    def quantize_batch_arrow(self, weights_table: ArrowTable, bit_width: int | None = None, continue_on_error: bool | None = None) -> Any: ...

def quantize_array(a: Array, bits: int = 4, group: int = 128, *, method: str = "rtn", as_numpy: bool = False, threads: int = 0) -> LayerResult: ...
def quantize_batch(
    weights_dict: Mapping[str, Any],
    bit_width: int | None = None,
    continue_on_error: bool | None = None,
    *,
    progress_callback: Callable[[str, float], object] | None = None,
    as_numpy: bool = False,
    threads: int = 0,
) -> dict[str, LayerResult]: ...
def dequantize(result: Any, *, as_numpy: bool = True, threads: int = 0) -> Any: ...
def rtn(weights: Array, bits: int = 4, group: int = 128, *, as_numpy: bool = False) -> LayerResult: ...
def cosine_similarity(a: Array, b: Array) -> float: ...
def sqnr_db(a: Array, b: Array) -> float: ...
def check_arrays(weights_dict: Mapping[str, Any], /) -> list[tuple[str, list[int]]]: ...

# ---- Arrow ----

@final
class PyArrowQuantizedLayer:
    def __new__(cls, data: ArrowTable, *, time_group_params: Sequence[TimeGroupParams] | None = None) -> PyArrowQuantizedLayer: ...
    def __len__(self) -> int: ...
    @property
    def layers(self) -> list[str]: ...
    def to_pyarrow(self) -> Any: ...
    def dequantize(self, name: str, *, as_numpy: bool = False) -> Any: ...
    def dequantize_group(self, group_id: int, *, as_numpy: bool = False) -> Any: ...
    def dequantize_all_groups(self, *, as_numpy: bool = False) -> list[Any]: ...
    def get_time_group_params(self) -> list[TimeGroupParams]: ...
    def __arrow_c_array__(self, requested_schema: object | None = None) -> tuple[object, object]: ...
    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...
