"""ArrowQuant: quantizes diffusion models (INT8, INT4, INT2) after training, on a CPU, and measures the result.

Everything that computes is the C library; nothing beside it is needed to import this module. NumPy and pyarrow are used where arrays or Arrow tables
are asked for, and loaded only then.
"""

from ._core import (
    ArrowQuantError,
    BudgetError,
    Calibration,
    ConfigurationError,
    DiffusionQuantConfig,
    FormatError,
    Interrupted,
    MetadataError,
    ModelNotFoundError,
    PyArrowQuantizedLayer,
    QuantizationError,
    ShapeMismatchError,
    ValidationError,
    __version__,
    build_info,
    cosine_similarity,
    dequantize,
    gptq,
    hadamard,
    output_sqnr_db,
    quantize_array,
    quantize_batch,
    r2q,
    rtn,
    simd_level,
    sqnr_db,
)
from ._progress import Progress
from ._pyarrow import numpy_to_arrow_table
from .activations import ChannelGroups, SpatialQuantizer, TimeAwareQuantizer, linear_integer
from .loader import ShardedSafeTensorsLoader, load_sharded_safetensors
from .models import ArrowQuantV2, quantize_diffusion_model
from .reader import Reader, Tensor, open
from .short import diff, export, inspect, quantize, report, verify
from .validation import ValidationSystem

__all__ = [
    "ArrowQuantError",
    "ArrowQuantV2",
    "AsyncArrowQuantV2",
    "BudgetError",
    "Calibration",
    "CalibrationData",
    "CalibrationLoader",
    "ChannelGroups",
    "ConfigurationError",
    "DataSet",
    "DiffusionQuantConfig",
    "EvolutionarySearch",
    "FormatError",
    "GranularityAllocation",
    "GranularityAllocator",
    "GranularityConfig",
    "Interrupted",
    "Layer",
    "LayerSensitivity",
    "MetadataError",
    "ModelNotFoundError",
    "Plan",
    "PlanLayer",
    "Progress",
    "PyArrowQuantizedLayer",
    "QuantizationError",
    "Reader",
    "Result",
    "Sample",
    "ShapeMismatchError",
    "ShardedSafeTensorsLoader",
    "SpatialQuantizer",
    "Tensor",
    "TimeAwareQuantizer",
    "ValidationError",
    "ValidationSystem",
    "__version__",
    "build_info",
    "cosine_similarity",
    "dequantize",
    "diff",
    "export",
    "gptq",
    "hadamard",
    "inspect",
    "linear_integer",
    "load_sharded_safetensors",
    "numpy_to_arrow_table",
    "open",
    "output_sqnr_db",
    "plan",
    "quantize",
    "quantize_array",
    "quantize_async",
    "quantize_batch",
    "quantize_diffusion_model",
    "r2q",
    "report",
    "rtn",
    "simd_level",
    "sqnr_db",
    "verify",
]

# Found when first asked for: asyncio and dataclasses cost more time to import than all of the rest.
_LATER = {
    "AsyncArrowQuantV2": "async_",
    "CalibrationData": "calibration",
    "CalibrationLoader": "calibration",
    "DataSet": "data",
    "Layer": "results",
    "Result": "results",
    "Sample": "data",
    "quantize_async": "async_",
    "EvolutionarySearch": "granularity",
    "GranularityAllocation": "granularity",
    "GranularityAllocator": "granularity",
    "GranularityConfig": "granularity",
    "LayerSensitivity": "granularity",
    "Plan": "planning",
    "PlanLayer": "planning",
    "plan": "planning",
}


TYPE_CHECKING = False
if TYPE_CHECKING:
    from .async_ import AsyncArrowQuantV2, quantize_async
    from .calibration import CalibrationData, CalibrationLoader
    from .data import DataSet, Sample
    from .granularity import EvolutionarySearch, GranularityAllocation, GranularityAllocator, GranularityConfig, LayerSensitivity
    from .planning import Plan, PlanLayer, plan
    from .results import Layer, Result


def __getattr__(name):
    if name in _LATER:
        from importlib import import_module

        value = globals()[name] = getattr(import_module("." + _LATER[name], __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_LATER})
