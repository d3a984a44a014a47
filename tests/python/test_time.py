"""SpatialQuantizer, TimeAwareQuantizer and layers on integers: their definitions in NumPy, and properties over random input (python-api 6 and 7)."""

import inspect
import json

import arrow_quant_v2 as aq
import numpy as np
import pytest
from extension import GROUPS, with_extension
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FLOATS = st.floats(-1e4, 1e4, width=32)
FAST = settings(max_examples=60, deadline=None)


SIDES = st.integers(1, 20)


def matrices(rows=SIDES, cols=SIDES):
    return st.tuples(rows, cols).flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=FLOATS))


# ---- SpatialQuantizer ----


@FAST
@given(matrices(st.integers(1, 300), st.integers(1, 6)), st.sampled_from([32, 64, 128, 256]))
@example(np.float32([[1.74e-43, 0]]), 32)
@example(np.full((40, 2), -2.5, np.float32), 32)
def test_per_group_codes_follow_their_definition(w, size):
    coded = aq.SpatialQuantizer(size).per_group_quantize(w)
    n_groups = -(-len(w) // size)
    assert coded.data.shape == w.shape and coded.data.dtype == np.uint8 and coded.group_size == size
    assert coded.scales.shape == coded.zero_points.shape == (n_groups,)
    assert np.isfinite(coded.scales).all() and (coded.scales > 0).all() and np.isfinite(coded.zero_points).all()
    for g in range(n_groups):
        block = w[g * size : (g + 1) * size].astype(np.float64)
        low, high = block.min(), block.max()
        if np.float32((high - low) / 255) == 0:  # one value, or a range below what a scale can express
            assert coded.scales[g] == 1
            np.testing.assert_allclose(coded.dequantize()[g * size : (g + 1) * size], block, rtol=0, atol=high - low)
            continue
        np.testing.assert_allclose(coded.scales[g], (high - low) / 255, rtol=1e-5, atol=1e-42)
        s, z = float(coded.scales[g]), float(coded.zero_points[g])
        np.testing.assert_array_equal(coded.data[g * size : (g + 1) * size], np.clip(np.rint(block / s + z), 0, 255))
    error = np.abs(coded.dequantize() - w)
    step = np.repeat(coded.scales, size)[: len(w), None]
    magnitude = np.abs(np.repeat(coded.zero_points, size)[: len(w), None]) * step
    assert (error <= 0.5 * step + 1e-6 * (magnitude + np.abs(w)) + 1e-7).all()


@FAST
@given(matrices(st.integers(65, 140), st.just(3)))
def test_groups_of_channels_are_independent_and_the_last_may_be_short(w):
    q = aq.SpatialQuantizer(64)
    whole, first, last = q.per_group_quantize(w), q.per_group_quantize(w[:64]), q.per_group_quantize(w[64 * (len(w) // 64) :] if len(w) % 64 else w[-64:])
    np.testing.assert_array_equal(whole.data[:64], first.data)
    np.testing.assert_array_equal(whole.data[-len(last.data) :], last.data)
    assert whole.scales[0] == first.scales[0] and whole.scales[-1] == last.scales[-1]
    assert len(aq.SpatialQuantizer(256).per_group_quantize(w).scales) == 1  # as many channels as a group or fewer: one group


@FAST
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(matrices(cols=st.just(n)), matrices(cols=st.just(n)))))
def test_equalization_preserves_the_product_and_the_shapes(pair):
    w, x = pair
    w_before, x_before = w.copy(), x.copy()
    w2, x2, s = aq.SpatialQuantizer().channel_equalization(w, x)
    assert w2.shape == w.shape and x2.shape == x.shape and s.shape == (w.shape[1],)
    wm, xm = np.abs(w).max(0).astype(np.float64), np.abs(x).max(0).astype(np.float64)
    live = (wm > 0) & (xm > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(live, np.sqrt(wm / xm), 1)
    assert np.isfinite(s).all() and (s > 0).all()
    np.testing.assert_allclose(s, expected, rtol=1e-6)
    assert (s[~live] == 1).all()
    reach = np.abs(x.astype(np.float64)) @ np.abs(w.T.astype(np.float64))
    difference = np.abs(x2.astype(np.float64) @ w2.T.astype(np.float64) - x.astype(np.float64) @ w.T.astype(np.float64))
    assert (difference <= 1e-6 * reach + 1e-30).all()
    np.testing.assert_array_equal(w, w_before)  # inputs are never changed
    np.testing.assert_array_equal(x, x_before)


def test_equalization_with_negative_zero_and_one_sided_activations():
    w = np.float32([[1, -2, 3, 0], [-4, 5, -6, 0]])
    x = np.float32([[-1, 0, -9, 2], [-16, 0, -1, 3]])
    w2, x2, s = aq.SpatialQuantizer().channel_equalization(w, x)
    np.testing.assert_allclose(s, [0.5, 1, (6 / 9) ** 0.5, 1], rtol=1e-6)
    np.testing.assert_allclose(np.abs(w2).max(0)[[0, 2]], np.abs(x2).max(0)[[0, 2]], rtol=1e-6)
    with pytest.raises(aq.ShapeMismatchError, match=r"weights have shape \[2, 4\], activations \[2, 3\]"):
        aq.SpatialQuantizer().channel_equalization(w, x[:, :3])
    with pytest.raises(ValueError, match="^activations contains NaN or Inf at index 1"):
        aq.SpatialQuantizer().channel_equalization(w, np.float32([[0, np.nan, 0, 0]]))


@FAST
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=12), elements=FLOATS), st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
def test_smoothing_never_raises_the_variance(x, alpha):
    out = aq.SpatialQuantizer().activation_smoothing(x, alpha)
    mean = x.astype(np.float64).mean(-1, keepdims=True)
    np.testing.assert_allclose(out, x * (1 - alpha) + mean * alpha, rtol=1e-5, atol=1e-3)
    spread = x.astype(np.float64).var(-1)
    assert out.shape == x.shape and (out.astype(np.float64).var(-1) <= spread * (1 + 1e-5) + 1e-5 * np.abs(x).max() ** 2).all()


def test_smoothing_at_its_ends():
    q, x = aq.SpatialQuantizer(), np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_array_equal(q.activation_smoothing(x, 0), x)
    np.testing.assert_allclose(q.activation_smoothing(x, 1), np.repeat(x.mean(-1, keepdims=True), 5, 1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(q.activation_smoothing(x), q.activation_smoothing(x, 0.5))
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"^Invalid alpha: {bad}. Must be between 0.0 and 1.0$"):
            q.activation_smoothing(x, bad)


def test_group_sizes_are_checked():
    assert [aq.SpatialQuantizer(n).group_size for n in (32, 64, 128, 256)] == [32, 64, 128, 256] and aq.SpatialQuantizer().group_size == 64
    with pytest.raises(ValueError, match="^Invalid group size: 17. Must be 32, 64, 128, or 256$"):
        aq.SpatialQuantizer(17)
    with pytest.raises(aq.ShapeMismatchError, match="two dimensions"):
        aq.SpatialQuantizer().per_group_quantize([1.0, 2.0])


# ---- TimeAwareQuantizer ----


@FAST
@given(st.integers(1, 5000), st.integers(1, 100))
def test_each_timestep_is_in_exactly_one_group(steps, count):
    groups = aq.TimeAwareQuantizer(count).group_timesteps(steps)
    assert len(groups) == min(steps, count)
    assert [t for a, b in groups for t in range(a, b)] == list(range(steps))
    sizes = [b - a for a, b in groups]
    assert max(sizes) - min(sizes) <= 1
    assert groups == [(steps * i // len(groups), steps * (i + 1) // len(groups)) for i in range(len(groups))]


@FAST
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 60), st.integers(1, 8)), elements=FLOATS), st.integers(1, 12), st.data())
def test_parameters_combine_the_statistics_exactly(x, count, data):
    times = data.draw(st.lists(st.integers(0, 30), min_size=len(x), max_size=len(x)))
    q = aq.TimeAwareQuantizer(count)
    stats = q.statistics(x, times)
    assert [s["timestep"] for s in stats] == sorted(set(times)) and sum(s["count"] for s in stats) == x.size
    params = q.compute_params_per_group(stats, num_timesteps=31)
    ranges = q.group_timesteps(31)
    assert [tuple(p["time_range"]) for p in params] == ranges
    assert params[0]["group_size"] == (64 if len(ranges) > 1 else 128) and params[-1]["group_size"] == (256 if len(ranges) > 1 else 128)
    for p, (a, b) in zip(params, ranges, strict=True):
        assert np.isfinite(p["scale"]) and p["scale"] > 0 and np.isfinite(p["zero_point"])
        mine = x[[a <= t < b for t in times]]
        if not mine.size:
            continue
        low, high = min(mine.min(), 0), max(mine.max(), 0)
        if low == high:
            assert (p["scale"], p["zero_point"]) == (1, 0)
        else:
            np.testing.assert_allclose(p["scale"], max((float(high) - float(low)) / 255, 1.1754943e-38), rtol=1e-6)
            np.testing.assert_allclose(p["zero_point"], -float(low) / p["scale"], rtol=1e-5, atol=1e-5)


def test_statistics_come_as_lists_arrays_and_files(tmp_path):
    q, rng = aq.TimeAwareQuantizer(4), np.random.default_rng(1)
    x = rng.standard_normal((40, 5)).astype(np.float32)
    stats = q.statistics(x, list(range(40)))
    expected = q.compute_params_per_group(stats)
    columns = {key: np.array([row[key] for row in stats]) for key in ("mean", "std", "min", "max", "timestep", "count")}
    assert q.compute_params_per_group(columns) == expected
    assert q.compute_params_per_group({key: columns[key] for key in ("mean", "std", "min", "max")}) == expected  # by index
    figures, rows = tmp_path / "stats.jsonl", tmp_path / "rows.jsonl"
    figures.write_text("".join(json.dumps(row) + "\n" for row in stats))
    rows.write_text("".join(json.dumps({"data": row.tolist(), "timestep": t, "shape": [5]}) + "\n" for t, row in enumerate(x)))
    assert q.compute_params_per_group(figures) == expected
    assert q.compute_params_per_group(str(rows)) == expected
    assert [p["time_range"] for p in q.compute_params_per_group(figures, num_timesteps=100)] == [(0, 25), (25, 50), (50, 75), (75, 100)]


def test_clipping_narrows_a_range_that_one_timestep_of_many_stretches():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((400, 500)).astype(np.float32)
    x[7] = rng.laplace(scale=1.5, size=500)
    q = aq.TimeAwareQuantizer(1)
    stats = q.statistics(x, range(400))
    (plain,), (clipped,) = q.compute_params_per_group(stats), q.compute_params_per_group(stats, clip=True)
    assert clipped["scale"] < 0.95 * plain["scale"]

    def error(p):
        codes = np.clip(np.rint(x / np.float32(p["scale"]) + np.float32(p["zero_point"])), 0, 255)
        return (((codes - p["zero_point"]) * p["scale"] - x) ** 2).mean()

    assert error(clipped) < 0.95 * error(plain)


@pytest.mark.parametrize(
    ("stats", "kind", "words"),
    [
        ([], ValueError, "there are no statistics"),
        ([{"mean": 0, "std": 1, "min": -1}], KeyError, "row 0: Missing 'max'"),
        ({"mean": [0], "std": [1], "min": [0]}, KeyError, "Missing 'max'"),
        ({"mean": [0], "std": [1, 2], "min": [0], "max": [0]}, aq.ShapeMismatchError, "different lengths"),
        ([{"mean": float("nan"), "std": 1, "min": 0, "max": 1}], ValueError, "timestep 0 are not finite"),
        ([{"mean": 0, "std": 1, "min": 0, "max": float("inf"), "timestep": 4}], ValueError, "timestep 4 are not finite"),
        ([{"mean": 0, "std": -1, "min": 0, "max": 1}], ValueError, "negative standard deviation"),
        ([{"mean": 0, "std": 1, "min": 2, "max": 1}], ValueError, "minimum above the maximum"),
        ([{"mean": "x", "std": 1, "min": 2, "max": 1}], ValueError, "row 0: "),
        ([3], TypeError, "not a list of int"),
    ],
)
def test_CA02_statistics_that_cannot_be_are_refused(stats, kind, words):
    with pytest.raises(kind, match=words):
        aq.TimeAwareQuantizer().compute_params_per_group(stats)


@pytest.mark.parametrize(
    ("line", "words"),
    [(b"{", "line 2: "), (b"[1]", "line 2: expected an object"), (b"\xff", "line 2: "), (b'{"data": [1, NaN]}', "line 2: .*NaN or Inf at index 1")],
)
def test_CA03_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "stats.jsonl"
    path.write_bytes(b'{"mean": 0, "std": 1, "min": -1, "max": 1}\r\n' + line)
    with pytest.raises(ValueError, match=words):
        aq.TimeAwareQuantizer().compute_params_per_group(path)


def test_a_group_that_was_never_seen_takes_the_nearest_ones_parameters():
    stats = [{"timestep": t, "mean": 0, "std": 1, "min": -1 - t, "max": 1} for t in (0, 1, 9)]
    params = aq.TimeAwareQuantizer(5).compute_params_per_group(stats)
    pairs = [(p["scale"], p["zero_point"]) for p in params]
    assert pairs[0] == pairs[1] == pairs[2] and pairs[3] == pairs[4] and pairs[0] != pairs[4]
    assert [p["group_size"] for p in params] == [64, 128, 128, 256, 256]


def test_numbers_of_groups_are_checked():
    assert aq.TimeAwareQuantizer().num_time_groups == 10
    for bad in (0, 101, -1):
        with pytest.raises(ValueError, match=f"^Invalid number of time groups: {bad}. Must be between 1 and 100$"):
            aq.TimeAwareQuantizer(bad)
    with pytest.raises(ValueError, match="timesteps"):
        aq.TimeAwareQuantizer().group_timesteps(0)


def params_of(scales, zeros=None, width=10):
    zeros = zeros or [128.0] * len(scales)
    return [
        {"time_range": (i * width, (i + 1) * width), "scale": s, "zero_point": z, "group_size": 64} for i, (s, z) in enumerate(zip(scales, zeros, strict=True))
    ]


@FAST
@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 255)), min_size=1, max_size=12), st.floats(0, 1))
def test_smoothness_figures_follow_their_definition(pairs, threshold):
    params = params_of([np.float32(s).item() for s, _ in pairs], [np.float32(z).item() for _, z in pairs])
    m = aq.TimeAwareQuantizer().markov_metrics(params, threshold)
    jumps = [(abs(r["scale"] - a["scale"]) / a["scale"], abs(r["zero_point"] - a["zero_point"]) / 255) for a, r in zip(params, params[1:], strict=False)]
    assert sorted(m) == sorted(["smoothness_score", "boundary_scores", "violation_count", "violations", "is_valid"])
    np.testing.assert_allclose(m["boundary_scores"], [1 - min(1, (s + z) / 2) for s, z in jumps], atol=1e-12)
    total = 1 - min(1, sum(s + z for s, z in jumps) / (2 * len(jumps))) if jumps else 1.0
    assert m["smoothness_score"] == pytest.approx(total, abs=1e-12)
    expected = [i for i, (s, _) in enumerate(jumps) if s > threshold]
    assert [v["boundary_idx"] for v in m["violations"]] == expected and m["violation_count"] == len(expected) and m["is_valid"] is (not expected)
    for v in m["violations"]:
        s = jumps[v["boundary_idx"]][0]
        assert v["scale_jump"] == pytest.approx(s) and v["severity"] == ("high" if s > 0.5 else "medium" if s > 0.3 else "low")
    json.dumps(m)


@FAST
@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 255)), min_size=1, max_size=12), st.integers(1, 20), st.sampled_from(["linear", "cubic", "sigmoid"])
)
def test_smoothing_only_widens_ranges(pairs, window, curve):
    before = aq.TimeAwareQuantizer().smooth(params_of(*map(list, zip(*pairs, strict=True))), threshold=1.0, window=1)  # values as float32
    after = aq.TimeAwareQuantizer().smooth(before, window=window, interpolation=curve)
    assert [p["time_range"] for p in after] == [p["time_range"] for p in before]
    for p, o in zip(after, before, strict=True):
        assert p["scale"] >= o["scale"]
        assert p["zero_point"] * p["scale"] >= o["zero_point"] * o["scale"] * (1 - 1e-5) - 1e-4 * p["scale"]
        assert (255 - p["zero_point"]) * p["scale"] >= (255 - o["zero_point"]) * o["scale"] * (1 - 1e-5) - 1e-4 * p["scale"]


def test_smoothing_arguments_are_checked():
    q = aq.TimeAwareQuantizer()
    with pytest.raises(ValueError, match="^Invalid smoothing_window: 21"):
        q.smooth(params_of([1.0]), window=21)
    with pytest.raises(ValueError, match="^Invalid smoothing_interpolation: 'spline'"):
        q.smooth(params_of([1.0]), interpolation="spline")
    with pytest.raises(ValueError, match="^Invalid smoothness_threshold: 2"):
        q.smooth(params_of([1.0]), threshold=2)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"time_range": (11, 20)}, ValueError, "it starts at 11, the one before ends at 10"),
        ({"time_range": (9, 20)}, ValueError, "it starts at 9"),
        ({"time_range": (10, 10)}, ValueError, "time_range"),
        ({"scale": 0.0}, ValueError, "Must be above 0"),
        ({"scale": float("nan")}, ValueError, "finite"),
        ({"zero_point": float("inf")}, ValueError, "finite"),
        ({"group_size": 0}, ValueError, "group_size"),
    ],
)
def test_PQ10_time_groups_with_faults_are_refused(change, kind, words):
    params = params_of([1.0, 2.0])
    params[1] |= change
    with pytest.raises(kind, match=words):
        aq.TimeAwareQuantizer().quantize_layer(np.eye(4, dtype=np.float32), params)


def test_missing_keys_and_other_types_are_refused():
    q, w = aq.TimeAwareQuantizer(), np.eye(4, dtype=np.float32)
    for key in ("time_range", "scale", "zero_point"):
        with pytest.raises(KeyError, match=f"Missing '{key}'"):
            q.quantize_layer(w, [{k: v for k, v in params_of([1.0])[0].items() if k != key}])
    with pytest.raises(TypeError, match="^Params must be a list of dictionaries$"):
        q.quantize_layer(w, [3])
    with pytest.raises(ValueError, match="at least one"):
        q.quantize_layer(w, [])


def test_quantize_layer_codes_the_weights_once():
    w = np.random.default_rng(3).standard_normal((20, 300)).astype(np.float32)
    params = params_of([0.5, 0.25])
    layer = aq.TimeAwareQuantizer(2).quantize_layer(w, params)
    plain = aq.ArrowQuantV2().quantize_batch({"w": w})["w"]
    assert {k: v for k, v in layer.items() if k != "time_group_params"} == plain
    assert layer["time_group_params"] == params and layer["time_group_params"][0] is not params[0]
    np.testing.assert_array_equal(aq.dequantize(layer), aq.dequantize(plain))
    assert aq.TimeAwareQuantizer().quantize_layer(w, params, bit_width=2, group_size=32)["group_size"] == 32


# ---- layers on integers ----


def by_definition(x, w, scale, zero):
    """x [rows, in] coded with one pair a row, times dequantized weights, in double."""
    scale, zero = (np.broadcast_to(np.float32(v), (len(x),))[:, None] for v in (scale, zero))
    codes = np.clip(np.rint(x / scale + zero), 0, 255)
    return (codes.astype(np.float64) - zero) * scale.astype(np.float64) @ w.T.astype(np.float64)


@FAST
@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(1, 70), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_integer_layers_follow_their_definition(bits, out, n_in, samples, tokens, seed):
    rng = np.random.default_rng(seed)
    w, x = rng.standard_normal((out, n_in)).astype(np.float32), rng.standard_normal((samples, tokens, n_in)).astype(np.float32)
    bias = rng.standard_normal(out).astype(np.float32)
    layer = aq.quantize_array(w, bits, 32) | {"time_group_params": params_of([0.02, 0.03, 0.01], [100.0, 128.5, 127.0])}
    values = aq.dequantize(layer)
    times = rng.integers(0, 30, samples).tolist()
    picked = [layer["time_group_params"][t // 10] for t in times]
    scale, zero = (np.repeat([p[key] for p in picked], tokens) for key in ("scale", "zero_point"))
    y = aq.linear_integer(x, layer, timestep=times, bias=bias)
    assert y.shape == (samples, tokens, out) and y.dtype == np.float32
    np.testing.assert_allclose(y.reshape(-1, out), by_definition(x.reshape(-1, n_in), values, scale, zero) + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y, aq.linear_integer(x, layer, timestep=np.array(times), bias=bias, threads=3))
    for i, t in enumerate(times):  # a sample alone gives the same bits as in the batch
        np.testing.assert_array_equal(aq.linear_integer(x[i], layer, timestep=t, bias=bias), y[i])
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    scale = np.where(high > low, (high.astype(np.float64) - low) / 255, 1).astype(np.float32)
    y = aq.linear_integer(x, layer, mode="dynamic")
    np.testing.assert_allclose(y.reshape(-1, out), by_definition(x.reshape(-1, n_in), values, scale.ravel(), (-low / scale).ravel()), rtol=1e-4, atol=1e-4)


def test_one_static_pair_holds_the_ranges_of_all_groups():
    w, x = np.float32([[1, 0], [0, 1]]), np.float32([[3.0, -1.0]])
    layer = aq.TimeAwareQuantizer().quantize_layer(w, params_of([4 / 255, 2 / 255], [255 / 4, 255.0]), bit_width=8)
    y = aq.linear_integer(x, layer, mode="static")  # -1..3 and -2..0: -2..3
    np.testing.assert_allclose(y, x, atol=5 / 255)
    np.testing.assert_array_equal(y, aq.linear_integer(x, layer, (5 / 255, 2 * 51.0), mode="static"))
    np.testing.assert_array_equal(y, aq.linear_integer(x, layer, params_of([4 / 255, 2 / 255], [255 / 4, 255.0]), mode="static"))


def test_timesteps_beyond_the_table_take_the_nearest_group():
    layer = aq.TimeAwareQuantizer().quantize_layer(np.eye(3, dtype=np.float32), params_of([0.1, 0.2]))
    x = np.float32([[1, 2, 3]])
    np.testing.assert_array_equal(aq.linear_integer(x, layer, timestep=1000), aq.linear_integer(x, layer, timestep=19))
    np.testing.assert_array_equal(aq.linear_integer(x, layer, timestep=-1), aq.linear_integer(x, layer, timestep=0))
    np.testing.assert_array_equal(aq.linear_integer(x, layer, timestep=9.99), aq.linear_integer(x, layer, timestep=0))


def test_integer_layers_refuse_what_does_not_fit():
    layer = aq.TimeAwareQuantizer().quantize_layer(np.eye(4, dtype=np.float32), params_of([0.1]))
    x = np.ones((2, 4), np.float32)
    for arguments, kind, words in (
        ({}, ValueError, "needs a timestep"),
        ({"timestep": [1, 2, 3]}, aq.ShapeMismatchError, "3 timesteps for 2 samples"),
        ({"mode": "x"}, ValueError, "Invalid mode: 'x'"),
        ({"timestep": 0, "bias": [1.0]}, aq.ShapeMismatchError, "bias has 1 values, expected 4"),
        ({"mode": "static", "groups": (0.0, 1.0)}, ValueError, "Must be above 0"),
    ):
        with pytest.raises(kind, match=words):
            aq.linear_integer(x, layer, **arguments)
    with pytest.raises(aq.ShapeMismatchError, match=r"x has shape \[2, 3\], expected 4"):
        aq.linear_integer(x[:, :3], layer, timestep=0)
    with pytest.raises(ValueError, match="^x contains NaN or Inf at index 5"):
        aq.linear_integer(np.where(np.arange(8).reshape(2, 4) == 5, np.nan, 1).astype(np.float32), layer, timestep=0)
    with pytest.raises(aq.ShapeMismatchError, match="scales has 1 values"):
        aq.linear_integer(x, layer | {"scales": [1.0]}, timestep=0)
    with pytest.raises(ValueError, match="no time groups"):
        aq.linear_integer(x, aq.quantize_array(np.eye(4, dtype=np.float32)), timestep=0)


# ---- containers ----


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    """A written model whose layers have equalization, rotation, time groups and statistics."""
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("time")
    rng = np.random.default_rng(5)
    save_file({f"blocks.{i}.weight": rng.standard_normal((64, 128)).astype(np.float32) for i in range(2)}, folder / "model.safetensors")
    config = aq.DiffusionQuantConfig(modality="image", enable_time_aware=False, enable_spatial=False, min_accuracy=0)
    aq.ArrowQuantV2().quantize_from_safetensors(folder / "model.safetensors", folder / "plain", config)
    (source,) = (folder / "plain").glob("*.parquet")
    for name, folded in (("extended", False), ("folded", True)):
        (folder / name).mkdir()
        pq.write_table(with_extension(pq.read_table(source), hadamard=64, folded=folded), folder / name / source.name)
    return folder


def test_time_groups_and_statistics_of_a_container_read_back(container):
    with aq.open(container / "extended") as f:
        t = f["blocks.0.weight"]
        expected = [{"time_range": (g["start"], g["end"]), **{k: g[k] for k in ("scale", "zero_point", "group_size")}} for g in GROUPS]
        assert t.time_groups == expected and t.hadamard_group == 64 and not t.equalization_folded
        np.testing.assert_array_equal(t.equalization_scales, np.float32([0.5 + 0.25 * (i % 5) for i in range(128)]))
        np.testing.assert_array_equal(t.activation_stats["max"], [3, 5])
        x = np.random.default_rng(0).standard_normal((7, 128)).astype(np.float32)
        y = x @ t.dequantize().T
        assert aq.sqnr_db(y, aq.linear_integer(x, t, mode="dynamic")) > 30  # equalization and rotation are undone on the way
        assert aq.linear_integer(x, t, timestep=20).shape == (7, 64)
    with aq.open(container / "folded") as f:
        t = f["blocks.0.weight"]
        y = x @ t.dequantize().T
        assert t.equalization_folded and aq.sqnr_db(y, aq.linear_integer(x, t, mode="dynamic")) > 30
    with aq.open(container / "plain") as f:
        t = f["blocks.0.weight"]
        assert t.time_groups is None and t.equalization_scales is None and t.hadamard_group == 0 and t.activation_stats is None


def test_an_arrow_layer_knows_its_time_groups_and_gives_back_weights(container):
    from arrow_quant_v2.models import layer_of

    layer = layer_of(container / "extended")
    params = layer.get_time_group_params()
    assert [p["time_range"] for p in params] == [(0, 300), (300, 1000)] and params == layer.get_time_group_params("blocks.1.weight")
    with pytest.raises(KeyError, match="No layer 'x'"):
        layer.get_time_group_params("x")
    groups = layer.dequantize_all_groups(as_numpy=True)
    assert len(groups) == 2 and np.array_equal(layer.dequantize_group(1, as_numpy=True), groups[1])
    with pytest.raises(ValueError, match="^Invalid group_id: 2. Must be between 0 and 1$"):
        layer.dequantize_group(2)
    with aq.open(container / "extended") as f:
        weights = {name: f[name].dequantize() for name in f}
    np.testing.assert_array_equal(np.concatenate(groups), np.concatenate([weights[name].ravel() for name in layer.layers]))
    for name, values in aq.dequantize(layer).items():
        np.testing.assert_array_equal(values, weights[name])
        np.testing.assert_array_equal(layer.dequantize(name, as_numpy=True), weights[name])
    assert layer_of(container / "plain").get_time_group_params() == []


def test_markov_metrics_are_those_of_the_worst_stored_layer(container):
    from arrow_quant_v2.models import markov_of

    m = json.loads(markov_of(str(container / "extended"), 0.3))
    assert m["violation_count"] == 1 and m["violations"][0]["scale_jump"] == 0.5 and m["violations"][0]["severity"] == "medium"
    assert m["smoothness_score"] == pytest.approx(1 - (0.5 + 115.5 / 255) / 2)
    assert json.loads(markov_of(str(container / "extended"), 0.6))["is_valid"] is True
    assert markov_of(str(container / "plain"), 0.3) is None
    quantizer = aq.ArrowQuantV2()
    assert quantizer.get_markov_metrics() is None


def test_signatures_are_introspectable():
    assert list(inspect.signature(aq.SpatialQuantizer.activation_smoothing).parameters) == ["self", "x", "alpha"]
    assert inspect.signature(aq.SpatialQuantizer).parameters["group_size"].default == 64
    assert inspect.signature(aq.TimeAwareQuantizer).parameters["num_time_groups"].default == 10
    assert list(inspect.signature(aq.TimeAwareQuantizer.quantize_layer).parameters)[:3] == ["self", "weights", "params"]
    assert list(inspect.signature(aq.PyArrowQuantizedLayer.get_time_group_params).parameters) == ["self", "layer"]
