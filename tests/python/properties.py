"""Arrays of every kind for Hypothesis, and what must hold of the codes that are made of them."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
from helpers import matrix_shape, unpack

FINITE = st.floats(-(2.0**60), 2.0**60, width=32)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9) | st.tuples(st.integers(1, 3), st.integers(100, 300)) | st.tuples(st.integers(1, 600))

float32 = hnp.arrays(np.float32, SHAPES, elements=FINITE)
flat = hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-1e4, 1e4, width=32))


# Numbers that half precision has: levels of two bits are stored in it.
sixteenths = hnp.arrays(np.int16, st.tuples(st.integers(1, 9), st.integers(1, 70)), elements=st.integers(-999, 999)).map(lambda a: np.float32(a) / 16)


def matrices(least_rows, most_rows, least_cols, most_cols):
    shapes = st.tuples(st.integers(least_rows, most_rows), st.integers(least_cols, most_cols))
    return hnp.arrays(np.float32, shapes, elements=st.floats(-(2.0**10), 2.0**10, width=32))


@st.composite
def strided_arrays(draw):
    """float16, float32 and float64; transposed, reversed and with gaps."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    a = draw(hnp.arrays(dtype, SHAPES, elements=st.floats(-1000, 1000, width=16)))
    a = a.transpose(draw(st.permutations(range(a.ndim))))
    return a[tuple(slice(None, None, draw(st.sampled_from([1, 2, -1]))) for _ in range(a.ndim))]


strided = strided_arrays()


def unpacked(result):
    """Codes [rows, cols] of a layer result; its bytes are those of the shape, and padding is zero."""
    rows, cols = matrix_shape(result["shape"])
    bits, data = result["bit_width"], bytes(result["quantized_data"])
    row_bytes, per_byte = -(-cols * bits // 8), 8 // bits
    assert len(data) == (rows * row_bytes if cols else 0)
    all_codes = unpack(data, bits, len(data) * per_byte).reshape(rows, row_bytes * per_byte)
    assert not all_codes[:, cols:].any()
    return all_codes[:, :cols]


def check(result, a):
    """Shape, parameters and codes of one layer result for the array it was made of."""
    a = np.asarray(a, np.float32)
    assert tuple(result["shape"]) == a.shape
    rows, cols = matrix_shape(a.shape)
    group, highest = result["group_size"], 2 ** result["bit_width"] - 1
    codes, n_groups = unpacked(result), -(-cols // group)
    scales, zeros = (np.asarray(result[key], np.float64) for key in ("scales", "zero_points"))
    assert scales.size == zeros.size == (rows * n_groups if cols else 0)
    assert np.isfinite(scales).all() and np.isfinite(zeros).all() and (scales > 0).all()
    assert codes.min(initial=0) >= 0 and codes.max(initial=0) <= highest
    of = np.arange(cols) // group
    exact = a.reshape(rows, cols) / scales.reshape(rows, n_groups)[:, of] + zeros.reshape(rows, n_groups)[:, of]
    nearest = np.clip(np.rint(exact), 0, highest)
    tie = np.abs(np.abs(exact - np.rint(exact)) - 0.5) < 1e-3  # computed in single precision
    assert (np.abs(codes - nearest) <= tie).all()
