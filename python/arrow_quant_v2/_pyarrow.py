"""What needs pyarrow's own constructors; pyarrow is imported when it is used."""

from __future__ import annotations

from ._core import check_arrays

TYPE_CHECKING = False  # typing is not imported for it
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def numpy_to_arrow_table(weights_dict: Mapping[str, Any]) -> Any:
    """A pyarrow.Table of layer_name, weights and shape over float32 arrays, as the Arrow entries take it.

    weights_dict: dict of name to float32 C-contiguous array of any shape; rows stand in its order, each in a chunk of its own, values are not copied.
    Raises ValueError with the texts of quantize_batch for what is no such array.

    >>> import numpy as np
    >>> import arrow_quant_v2 as aq
    >>> aq.numpy_to_arrow_table({'w': np.zeros((2, 3), np.float32)})['shape'].to_pylist()
    [[2, 3]]
    """
    checked = check_arrays(weights_dict)
    import pyarrow as pa  # type: ignore[import-untyped]

    weights_type = pa.list_(pa.float32())
    rows = []
    for name, shape in checked:
        values = pa.py_buffer(weights_dict[name])
        n = values.size // 4
        if n > 2**31 - 1:
            raise ValueError(f"Array for layer '{name}' holds {n} values; a list of an Arrow table holds 2147483647 at most")
        flat = pa.Array.from_buffers(pa.float32(), n, [None, values])
        rows.append((name, shape, pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), flat)))
    return pa.table(
        {
            "layer_name": pa.array([name for name, _, _ in rows], pa.string()),
            "weights": pa.chunked_array([row for _, _, row in rows], weights_type),
            "shape": pa.array([shape for _, shape, _ in rows], pa.list_(pa.int64())),
        }
    )
