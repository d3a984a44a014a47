"""What the Python tests share: the formulas of the format, written plainly in NumPy."""

import numpy as np


def unpack(data, bits, n):
    """The first n codes of the bytes of one row: element i lies at bit i * bits."""
    b = np.frombuffer(bytes(data), np.uint8)
    per_byte = 8 // bits
    codes = (b[:, None] >> (np.arange(per_byte) * bits)) & (2**bits - 1)
    return codes.reshape(-1)[:n].astype(np.uint8)


def matrix_shape(shape):
    """[rows, cols] of an array: rows are the first axis; one row for 0-D and 1-D."""
    if len(shape) < 2:
        return 1, int(np.prod(shape))
    return shape[0], int(np.prod(shape[1:]))


def dequantize(result):
    """w = (q - z) * s of one layer result, with one group of 128 after the other along each row."""
    rows, cols = matrix_shape(result["shape"])
    bits, group = result["bit_width"], result["group_size"]
    row_bytes, groups = -(-cols * bits // 8), -(-cols // group)
    data = bytes(result["quantized_data"])
    scales = np.asarray(result["scales"], np.float32).reshape(rows, groups)
    zeros = np.asarray(result["zero_points"], np.float32).reshape(rows, groups)
    assert len(data) == rows * row_bytes
    out = np.zeros((rows, cols), np.float32)
    for r in range(rows):
        q = unpack(data[r * row_bytes : (r + 1) * row_bytes], bits, cols).astype(np.float32)
        g = np.arange(cols) // group
        out[r] = (q - zeros[r, g]) * scales[r, g]
    return out.reshape(result["shape"])


def step_of_each_value(result):
    """The scale of the group that each value belongs to, in the layer's shape."""
    rows, cols = matrix_shape(result["shape"])
    groups = -(-cols // result["group_size"])
    scales = np.asarray(result["scales"], np.float64).reshape(rows, groups)
    return scales[:, np.arange(cols) // result["group_size"]].reshape(result["shape"])


def same(a, b):
    """True when two dicts of layer results are equal, whichever of bytes, lists and arrays they hold."""
    if list(a) != list(b):
        return False
    return all(
        bytes(a[k]["quantized_data"]) == bytes(b[k]["quantized_data"])
        and list(a[k]["scales"]) == list(b[k]["scales"])
        and list(a[k]["zero_points"]) == list(b[k]["zero_points"])
        and a[k]["shape"] == b[k]["shape"]
        for k in a
    )


def layer_inputs(x):
    """What a layer on packed codes multiplies in place of x [..., inputs] (linear.h): of more than 4 rows, each 256 inputs become integers of 16 bits times the
    least power of two that keeps them within 32767."""
    x = np.ascontiguousarray(x, np.float32)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= 4:
        return x
    out = np.empty_like(rows)
    for begin in range(0, rows.shape[1], 256):
        block = rows[:, begin : begin + 256].astype(np.float64)
        largest = np.abs(block).max(1, keepdims=True)
        scale = 2.0 ** (np.frexp(np.maximum(largest, 2.0**-112))[1] - 15)
        scale = np.where(np.rint(largest / scale) > 32767, 2 * scale, scale)
        out[:, begin : begin + 256] = np.rint(block / scale) * scale
    return out.reshape(x.shape)


def decibels(expected, got):
    """Signal-to-noise ratio of `got`."""
    expected, got = (np.asarray(v, np.float64) for v in (expected, got))
    return 10 * np.log10((expected**2).sum() / max(((got - expected) ** 2).sum(), 1e-300))
