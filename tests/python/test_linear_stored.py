"""Products with weights in stored form: _core._linear_stored, which arrow_quant_v2.torch stands on."""

import numpy as np
import pytest
from arrow_quant_v2 import _core
from helpers import layer_inputs

OUTPUTS, INPUTS = 37, 200


def stored(bits, params):
    weight = np.random.default_rng(1).standard_normal((OUTPUTS, INPUTS), dtype=np.float32)
    codes, parameters, form = _core._quantize_stored(weight, bits, 64, params, "rtn")
    values = np.frombuffer(_core._dequantize_stored(codes, parameters, OUTPUTS, INPUTS, bits, 64, form), np.float32).reshape(OUTPUTS, INPUTS)
    return codes, parameters, form, values


@pytest.mark.parametrize(("bits", "params"), [(8, "f16"), (4, "f16"), (4, "f32"), (2, "f16"), (4, "two-level"), (2, "two-level")])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
def test_it_is_the_product_with_the_dequantized_weight(bits, params, rows):
    codes, parameters, form, values = stored(bits, params)
    rng = np.random.default_rng(2)
    x, bias = rng.standard_normal((rows, INPUTS), dtype=np.float32), rng.standard_normal(OUTPUTS, dtype=np.float32)
    out = np.full((rows, OUTPUTS), np.nan, np.float32)
    for threads in (1, 2):
        assert _core._linear_stored(x, codes, parameters, bias, out, rows, OUTPUTS, INPUTS, bits, 64, form, threads) is None
        np.testing.assert_allclose(out, layer_inputs(x).astype(np.float64) @ values.T.astype(np.float64) + bias, rtol=0, atol=1e-4)


def test_sizes_that_disagree_are_refused():
    codes, parameters, form, _ = stored(4, "f16")
    x, bias, out = np.zeros((2, INPUTS), np.float32), np.zeros(OUTPUTS, np.float32), np.zeros((2, OUTPUTS), np.float32)
    good = [x, codes, parameters, bias, out, 2, OUTPUTS, INPUTS, 4, 64, form, 1]
    _core._linear_stored(*good)
    small = np.zeros(3, np.uint8)
    for position, bad, what in ((0, x[:1], "x"), (1, small, "codes"), (2, small, "parameters"), (3, bias[1:].copy(), "bias"), (4, out[:1], "out")):
        with pytest.raises(ValueError, match=f"^{what} must be"):
            _core._linear_stored(*good[:position], bad, *good[position + 1 :])
    for position, bad in ((5, 2**63), (6, 2**62), (7, 2**62), (8, 3), (10, "f99")):
        with pytest.raises((ValueError, _core.ArrowQuantError)):
            _core._linear_stored(*good[:position], bad, *good[position + 1 :])
    read_only = np.zeros((2, OUTPUTS), np.float32)
    read_only.flags.writeable = False
    with pytest.raises((BufferError, ValueError)):
        _core._linear_stored(*good[:4], read_only, *good[5:])
