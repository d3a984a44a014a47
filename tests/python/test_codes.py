"""Properties of what every entry gives back, for any shape, dtype, stride, bit width, group size and method: codes within their range and the nearest ones,
parameters that can be used, the shape of the input.

A code of b bits cannot leave [0, 2**b - 1] once it is packed: a value beyond the range that wrapped around would show as a code far from the nearest one, and
one of too many bits in its neighbour or in the padding. So each code is compared with the nearest one, clamped to the range, and padding with zero.
"""

import arrow_quant_v2 as aq
import hypothesis.strategies as st
import numpy as np
import properties
import pytest
from files import write_model
from hypothesis import given, settings

FEW, MANY = settings(deadline=None, max_examples=25), settings(deadline=None, max_examples=100)
BITS = st.sampled_from([2, 4, 8])
GROUPS = st.sampled_from([1, 7, 32, 64, 128, 250, 256, 1000])
Q = aq.ArrowQuantV2()


@MANY
@given(properties.strided, BITS, GROUPS, st.sampled_from(["rtn", "search"]), st.booleans())
def test_one_array(a, bits, group, method, as_numpy):
    result = aq.quantize_array(a, bits, group, method=method, as_numpy=as_numpy)
    assert (result["bit_width"], result["group_size"]) == (bits, group)
    properties.check(result, a)


@MANY
@given(st.dictionaries(st.text(max_size=3), properties.float32, max_size=5), BITS, GROUPS, st.integers(1, 4))
def test_batches(weights, bits, group, threads):
    results = [
        aq.quantize_batch(weights, bits, group=group, threads=threads),
        Q.quantize_batch(weights, bits),
        Q.quantize_batch_with_progress(weights, bits),
        Q.quantize_batch({**weights, "bad": np.float32([np.nan])}, bits, True) if weights and "bad" not in weights else {},
    ]
    for found in results:
        assert not found or list(found) == sorted(weights)
        for name, result in found.items():
            properties.check(result, weights[name])


test_batches = pytest.mark.filterwarnings("ignore:Left out 1 of")(test_batches)


@FEW
@given(st.dictionaries(st.text(max_size=3), properties.strided, max_size=3), BITS)
def test_adapters(weights, bits):
    for name, result in Q.quantize(weights, bits).items():
        properties.check(result, weights[name])
    lists = {name: np.asarray(a, np.float32).tolist() for name, a in weights.items() if a.ndim and a.size}
    for name, result in Q.quantize(lists, bits).items():
        properties.check(result, weights[name])


@FEW
@given(st.lists(properties.float32, min_size=1, max_size=4), BITS)
def test_arrow_tables(arrays, bits):
    pytest.importorskip("pyarrow")
    weights = {f"layer{i}": a for i, a in enumerate(arrays)}
    table = aq.numpy_to_arrow_table(weights)
    for found in (Q.quantize_arrow(table, bits), Q.quantize_arrow_batch(table.to_batches()[0], bits), Q.quantize_batch_arrow(table, bits)):
        for row in found.to_pylist():
            assert row["bit_width"] == bits
            properties.check({**row, "group_size": 128}, weights[row["layer_name"]])


@FEW
@given(properties.matrices(1, 9, 1, 70), BITS, st.sampled_from([16, 32, 64]), st.sampled_from(["f16", "f32"]), st.booleans())
def test_solvers_where_no_error_is_fed_forward(a, bits, group, form, symmetric):
    """With H = I nothing is passed on from column to column: each code is the nearest one of the stored parameters."""
    result = aq.gptq(a, np.eye(a.shape[1]), bits, group, params=form, symmetric=symmetric, refine=0, damp=0)
    assert result["bit_width"] == bits
    properties.check(result, a)


@FEW
@given(properties.sixteenths, st.sampled_from([16, 32, 64]))
def test_four_levels(a, group):
    """R2Q: each of the two-bit codes names one of the four levels of its group, the nearest one."""
    result = aq.r2q(a, group=group)
    codes = properties.unpacked(result)
    assert codes.shape == a.shape and codes.max(initial=0) <= 3
    levels = np.asarray(result["levels"], np.float64).reshape(a.shape[0], -1, 4)[:, np.arange(a.shape[1]) // group]
    distance = np.abs(levels - a.astype(np.float64)[..., None])
    chosen = np.take_along_axis(distance, codes[..., None].astype(np.int64), -1)[..., 0]
    assert (chosen <= distance.min(-1) + 1e-6 * (1e-30 + np.abs(a).max())).all()


@MANY
@given(properties.flat, st.lists(st.tuples(st.floats(1e-3, 10), st.floats(-300, 300)), min_size=1, max_size=5))
def test_time_groups_that_the_caller_gives(a, pairs):
    """Values beyond the parameters' range are clamped to its ends."""
    params = [{"scale": s, "zero_point": z, "group_size": 64, "time_range": (i, i + 1)} for i, (s, z) in enumerate(pairs)]
    result = Q.quantize_layer_auto(a, params)
    codes = np.frombuffer(result["quantized_data"], np.uint8)
    scale, zero = (np.asarray(result[key], np.float64) for key in ("scales", "zero_points"))
    assert codes.size == a.size and np.allclose(scale, [s for s, _ in pairs]) and np.allclose(zero, [z for _, z in pairs])
    part = np.repeat(np.arange(len(pairs)), np.diff([i * a.size // len(pairs) for i in range(len(pairs) + 1)]))
    exact = a.astype(np.float64) / scale[part] + zero[part]
    assert (np.abs(codes - np.clip(np.rint(exact), 0, 255)) <= (np.abs(exact - np.rint(exact)) > 0.499)).all()


@FEW
@given(properties.matrices(1, 9, 1, 40), BITS, st.integers(1, 30))
def test_time_aware_layers(a, bits, count):
    q = aq.TimeAwareQuantizer(count)
    params = q.compute_params_per_group(q.statistics(a, range(len(a))), num_timesteps=50)
    result = q.quantize_layer(a, params, bit_width=bits)
    properties.check(result, a)
    groups = result["time_group_params"]
    assert [t for g in groups for t in range(*g["time_range"])] == list(range(50))
    assert all(np.isfinite([g["scale"], g["zero_point"]]).all() and g["scale"] > 0 and g["group_size"] in (64, 128, 256) for g in groups)


@settings(deadline=None, max_examples=10)
@given(st.lists(properties.matrices(64, 70, 64, 300), min_size=1, max_size=3), BITS, st.sampled_from([32, 64, 128, 256]), st.sampled_from(["rtn", "search"]))
def test_files(tmp_path_factory, arrays, bits, group, method):
    folder = tmp_path_factory.mktemp("codes")
    weights = {f"layers.{i}.weight": a for i, a in enumerate(arrays)}
    model = write_model(folder / "m", weights)
    aq.quantize(model, folder / "out", bits=bits, group=group, method=method, params="f32", min_accuracy=0, spatial=False, time_aware=False)
    with aq.open(folder / "out") as f:
        assert list(f) == list(weights)
        for name, t in f.items():
            assert t.quantized and tuple(t.shape) == weights[name].shape
            result = {"quantized_data": t.codes.tobytes(), "scales": t.scales, "zero_points": t.zeros, "shape": list(t.shape)}
            properties.check({**result, "bit_width": t.bits, "group_size": t.group_size}, weights[name])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_check_finds_a_code_that_wrapped_around_and_bits_in_the_padding(bits):
    a = np.linspace(-1, 2, 3 * 33, dtype=np.float32).reshape(3, 33)
    result = aq.quantize_array(a, bits)
    data = result["quantized_data"]
    for at, mask in [(0, 1 << (bits - 1)), (len(data) // 2, 0x80)] + ([(len(data) - 1, 0x80)] if bits < 8 else []):
        wrong = bytearray(data)
        wrong[at] ^= mask
        with pytest.raises(AssertionError):
            properties.check({**result, "quantized_data": bytes(wrong)}, a)
