"""gptq, r2q, hadamard and output_sqnr_db on arrays, against NumPy and their own promises."""

import arrow_quant_v2 as aq
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def layer(rows, n, seed=0):
    """Weights and the second moment of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * n, n)) @ (rng.standard_normal((n, n)) / n**0.5 + 0.5 * np.eye(n)) * np.exp(rng.standard_normal(n))
    return (rng.standard_normal((rows, n)) * 0.05).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def output_db(w, v, h):
    e = w.astype(float) - v
    return 10 * np.log10(np.einsum("oi,ij,oj->", w, h, w, dtype=float) / np.einsum("oi,ij,oj->", e, h, e, dtype=float))


def textbook_gptq(w, h, scales, zeros, bits, group, damp):
    """Frantar et al., Algorithm 1, with given parameters and the inputs in their own order: values [out, n]."""
    n = w.shape[1]
    u = np.linalg.cholesky(np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(n))).T
    w, v = w.astype(float).copy(), np.zeros(w.shape)
    for j in range(n):
        s, z = scales[:, j // group], zeros[:, j // group]
        v[:, j] = (np.clip(np.rint(w[:, j] / s + z), 0, 2**bits - 1) - z) * s
        w[:, j + 1 :] -= np.outer((w[:, j] - v[:, j]) / u[j, j], u[j, j + 1 :])
    return v


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("params", ["f16", "f32"])
def test_gptq_is_the_textbook_given_its_parameters(bits, params):
    w, h = layer(12, 96)
    r = aq.gptq(w, h, bits, 32, params=params, order="inputs", refine=0, as_numpy=True)
    v = textbook_gptq(w, h.astype(float), r["scales"].reshape(12, 3).astype(float), r["zero_points"].reshape(12, 3).astype(float), bits, 32, 0.01)
    far = np.abs(v - aq.dequantize(r)) > 1e-4
    assert far.any(1).sum() == 0  # one other code would change the rest of its row


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    n=st.integers(1, 150),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([0, 7, 16, 32, 64, 128]),
    params=st.sampled_from(["f16", "f32", "two-level"]),
    order=st.sampled_from(["balanced", "energy", "inputs"]),
    symmetric=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_form_is_whole_and_refine_never_hurts(rows, n, bits, group, params, order, symmetric, seed):
    if params == "two-level":
        bits, group = min(bits, 4), max(group // 32 * 32, 32)
    w, h = layer(rows, n, seed)
    options = {"params": params, "order": order, "symmetric": symmetric}
    before = aq.gptq(w, h, bits, group, refine=0, **options)
    after = aq.gptq(w, h, bits, group, refine=2, **options)
    assert aq.gptq(w, h, bits, group, refine=2, threads=1, **options) == after
    v = aq.dequantize(after)
    assert v.shape == w.shape and np.isfinite(v).all()
    assert after["stored_bytes"] == len(after["quantized_data"]) + len(after["params"])
    if before["output_sqnr_db"] is not None and after["output_sqnr_db"] is not None:
        assert after["output_sqnr_db"] >= before["output_sqnr_db"] - 1e-4
        assert abs(aq.output_sqnr_db(w, v, h) - after["output_sqnr_db"]) < 0.01
        assert abs(output_db(w, v, h) - after["output_sqnr_db"]) < 0.01


def test_gptq_and_refine_gain_over_rounding():
    w, h = layer(64, 192)
    rounded = aq.output_sqnr_db(w, aq.dequantize(aq.quantize_array(w, 4, 64)), h)
    searched = aq.output_sqnr_db(w, aq.dequantize(aq.quantize_array(w, 4, 64, method="search")), h)
    plain = aq.gptq(w, h, 4, 64, order="inputs", refine=0)["output_sqnr_db"]
    best = aq.gptq(w, h, 4, 64)["output_sqnr_db"]
    assert rounded < searched < plain < best


def test_codes_and_params_are_the_stored_form():
    w, h = layer(6, 300)
    for bits, per_row in ((2, 20 + 4 + 3), (4, 16 + 4 + 3)):
        r = aq.gptq(w, h, bits, 256, params="two-level")
        assert (r["params_form"], r["params_group"], r["group_size"]) == ("two-level", 256, 64 // bits if bits == 4 else 16) or bits == 4
        assert len(r["params"]) == 6 * per_row and len(r["quantized_data"]) == 6 * (300 * bits // 8)
    r = aq.gptq(w * 1e7, h, 4, 64)
    assert r["params_form"] == "f32" and len(r["params"]) == 6 * 5 * 8


def test_measuring_can_be_left_out():
    w, h = layer(24, 40)
    one, other = aq.gptq(w, h, 4, 20), aq.gptq(w, h, 4, 20, measure=False)
    assert one["cosine"] > 0.9 and one["output_sqnr_db"] > one["sqnr_db"] - 1
    assert [other[k] for k in ("cosine", "sqnr_db", "output_sqnr_db")] == [None] * 3
    assert (one["quantized_data"], one["params"]) == (other["quantized_data"], other["params"])


@pytest.mark.parametrize("group", [0, 16, 64])
def test_r2q_levels_give_the_values(group):
    w, h = layer(9, 130)
    for hessian in (None, h):
        r = aq.r2q(w, hessian, group, as_numpy=True)
        size = group or 130
        codes = np.unpackbits(r["quantized_data"].reshape(9, -1), axis=1, bitorder="little").reshape(9, -1, 2) @ [1, 2]
        per_row = -(-130 // size)
        expected = np.take_along_axis(r["levels"].reshape(9, per_row, 4)[:, np.arange(130) // size], codes[:, :130, None], 2)[..., 0]
        assert np.array_equal(expected, aq.dequantize(r))
        m = r["params"].view(np.float16).astype(np.float32).reshape(-1, 3)
        assert np.array_equal(r["levels"][:, 3], m[:, 0] + m[:, 1] + m[:, 2]) and (r["levels"][:, :3] <= r["levels"][:, 1:]).all()
        assert r["params_form"] == "r2q" and r["stored_bytes"] == 9 * (33 + 6 * per_row)
    assert aq.output_sqnr_db(w, aq.dequantize(r), h) > aq.output_sqnr_db(w, aq.dequantize(aq.r2q(w, None, group)), h) + 1


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 6), blocks=st.integers(1, 5), power=st.integers(0, 3), seed=st.integers(0, 9))
def test_hadamard_is_its_own_inverse_and_keeps_products(rows, blocks, power, seed):
    size = 4**power
    x = np.random.default_rng(seed).standard_normal((rows, blocks * size)).astype(np.float32)
    y = aq.hadamard(x, size)
    assert y.shape == x.shape
    np.testing.assert_allclose(aq.hadamard(y, size), x, atol=1e-5)
    np.testing.assert_allclose(y @ y.T, x @ x.T, atol=1e-3)
    h4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    block = np.eye(1)
    for _ in range(power):
        block = np.kron(block, h4)
    np.testing.assert_allclose(y.reshape(rows, blocks, size), x.reshape(rows, blocks, size) @ block, atol=1e-5)


def test_what_cannot_be_is_named():
    w, h = layer(3, 8)
    with pytest.raises(aq.ShapeMismatchError, match="the weights have 8 inputs, so the hessian must be 8 x 8"):
        aq.gptq(w, h[:7, :7])
    with pytest.raises(ValueError, match="Invalid bit_width: 3"):
        aq.gptq(w, h, 3)
    with pytest.raises(ValueError, match="Invalid order: 'random'. Must be 'balanced', 'energy' or 'inputs'"):
        aq.gptq(w, h, order="random")
    with pytest.raises(ValueError, match="Invalid params: 'f8'"):
        aq.gptq(w, h, params="f8")
    with pytest.raises(TypeError, match="needs the second moment"):
        aq.gptq(w, None)
    with pytest.raises(ValueError, match="damp must be 0 to 1"):
        aq.gptq(w, h, damp=2)
    with pytest.raises(ValueError, match="refine must be 0 or more"):
        aq.gptq(w, h, refine=-1)
    bad = h.copy()
    bad[2, 5] = np.nan
    with pytest.raises(ValueError, match="the second moment of inputs 2 and 5 is not finite"):
        aq.gptq(w, bad)
    with pytest.raises(aq.ArrowQuantError, match="not positive definite"):
        aq.gptq(w, np.where(np.eye(8), 1.0, -40.0))
    with pytest.raises(ValueError, match="Must be a power of 4 that divides the last axis"):
        aq.hadamard(w, 2)
    with pytest.raises(aq.ShapeMismatchError):
        aq.output_sqnr_db(w, w[:2], h)


def test_convolutions_are_matrices_of_their_outputs():
    w, h = layer(5, 36)
    flat, folded = aq.gptq(w, h, 4, 0), aq.gptq(w.reshape(5, 4, 3, 3), h, 4, 0)
    assert folded["shape"] == [5, 4, 3, 3] and folded["quantized_data"] == flat["quantized_data"]
    assert aq.dequantize(folded).shape == (5, 4, 3, 3)
