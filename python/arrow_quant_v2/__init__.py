"""ArrowQuant: quantizes diffusion models (INT8, INT4, INT2) after training, on a CPU, and measures the result.

Everything that computes is the C library; nothing beside it is needed to import this module. NumPy and pyarrow are used where arrays or Arrow tables
are asked for, and loaded only then.
"""

from ._core import (
    ArrowQuantError,
    ArrowQuantV2,
    BudgetError,
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
    quantize_array,
    quantize_batch,
    rtn,
    simd_level,
    sqnr_db,
)
from ._pyarrow import numpy_to_arrow_table

__all__ = [
    "ArrowQuantError",
    "ArrowQuantV2",
    "BudgetError",
    "ConfigurationError",
    "DiffusionQuantConfig",
    "FormatError",
    "Interrupted",
    "MetadataError",
    "ModelNotFoundError",
    "PyArrowQuantizedLayer",
    "QuantizationError",
    "ShapeMismatchError",
    "ValidationError",
    "__version__",
    "build_info",
    "cosine_similarity",
    "dequantize",
    "numpy_to_arrow_table",
    "quantize_array",
    "quantize_batch",
    "rtn",
    "simd_level",
    "sqnr_db",
]
