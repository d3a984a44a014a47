"""The type Calibration: what goes in by the buffer protocol comes out as NumPy computes it."""

import ctypes
import functools
import signal
import threading

import arrow_quant_v2 as aq
import numpy as np
import pytest
from calibration_checks import check, rows_of
from files import SAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 70),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    groups=st.integers(1, 7),
    total=st.integers(7, 1000),
    seed=st.integers(0, 2**32 - 1),
)
def test_statistics_are_those_of_numpy_for_any_split_into_calls(width, sizes, groups, total, seed):
    x, at = rows_of(seed, sum(sizes), width), 0
    timesteps = np.random.default_rng(seed).integers(0, total, len(x))
    calibration = aq.Calibration(num_timesteps=total, groups=groups)
    layer = calibration.add_layer("fc.weight", width)
    for n in sizes:
        calibration.update(layer, x[at : at + n], timesteps[at : at + n])
        at += n
    check(calibration, "fc.weight", x, timesteps, groups, total)
    per_step = {row["timestep"]: row for row in calibration.timesteps(layer)}
    assert sorted(per_step) == sorted(set(timesteps.tolist()))
    for t, row in per_step.items():
        values = x[timesteps == t].astype(np.float64)
        assert row["count"] == values.size and row["min"] == values.min() and row["max"] == values.max()
        assert row["mean"] == pytest.approx(values.mean(), abs=1e-9) and row["std"] == pytest.approx(values.std(), rel=1e-6, abs=1e-7)


@settings(max_examples=15, deadline=None)
@given(parts=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_merging_in_any_order_gives_the_same_to_rounding(parts, seed):
    pieces = [rows_of(seed + i, 30, 12) for i in range(4)]
    timesteps = [np.random.default_rng(seed + i).integers(0, 100, 30) for i in range(4)]

    def collection(i):
        c = aq.Calibration(num_timesteps=100, groups=5)
        c.update(c.add_layer("a.weight", 12), pieces[i], timesteps[i])
        return c

    whole = aq.Calibration(num_timesteps=100, groups=5)
    for i in parts:
        whole.merge(collection(i))
    check(whole, "a.weight", np.concatenate(pieces), np.concatenate(timesteps), 5, 100)


def test_rows_are_read_where_they_lie_with_any_distance():
    wide = rows_of(0, 20, 40)
    timesteps = np.arange(20, dtype=np.int32)
    spaced, whole = aq.Calibration(num_timesteps=20, groups=2), aq.Calibration(num_timesteps=20, groups=2)
    for c, x in ((spaced, wide[::2, 3:30]), (whole, np.ascontiguousarray(wide[::2, 3:30]))):
        c.update(c.add_layer("a.weight", 27), x, timesteps[::2])
    assert np.array_equal(spaced.hessian(0), whole.hessian(0))
    assert np.array_equal(spaced.stats(0, 1)["sum"], whole.stats(0, 1)["sum"])
    readonly = np.ascontiguousarray(wide)
    readonly.flags.writeable = False
    whole.update(whole.add_layer("b.weight", 40), readonly, 3)


def test_one_timestep_holds_for_equal_numbers_of_rows():
    x = rows_of(1, 12, 5)
    by_sample, by_row = aq.Calibration(num_timesteps=10, groups=10), aq.Calibration(num_timesteps=10, groups=10)
    for c, t in ((by_sample, np.array([2, 7, 9])), (by_row, np.repeat(np.array([2, 7, 9], np.int32), 4))):
        c.update(c.add_layer("a.weight", 5), x, t)
    for g in range(10):
        a, b = by_sample.stats(0, g), by_row.stats(0, g)
        assert (a is None) == (b is None) == (g not in (2, 7, 9))
        assert a is None or np.array_equal(a["sum_sq"], b["sum_sq"])
    with pytest.raises(ValueError, match="5 timesteps for 12 rows"):
        by_row.update(0, x, np.arange(5))


def test_layers_that_share_an_input_share_its_statistics():
    c = aq.Calibration(groups=1)
    c.add_layer("to_q.weight", 4)
    k = c.add_layer("to_k.weight", 4, same_input_as="to_q.weight")
    c.update("to_q.weight", np.ones((3, 4), np.float32), 0)
    assert c.stats(k, 0)["count"] == 3 and c.source(k) == "to_q.weight" and c.n_inputs(k) == 4
    with pytest.raises(aq.ConfigurationError, match="to_k.weight.*to_q.weight"):
        c.update(k, np.ones((3, 4), np.float32), 0)


def unfolded(x, kernel, stride, padding, dilation, groups):
    """Rows that a convolution's weight multiplies, written plainly for any number of dimensions."""
    n_dims = len(kernel)
    x = np.pad(x, [(0, 0), (0, 0), *[(p, p) for p in padding]])
    out = [(x.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(n_dims)]
    per_group, rows = x.shape[1] // groups, []
    for b in range(len(x)):
        for place in np.ndindex(*out):
            where = tuple(slice(place[d] * stride[d], place[d] * stride[d] + dilation[d] * (kernel[d] - 1) + 1, dilation[d]) for d in range(n_dims))
            for g in range(groups):
                rows.append(x[(b, slice(g * per_group, (g + 1) * per_group), *where)].reshape(-1))
    return np.array(rows), int(np.prod(out)) * groups


CONVOLUTIONS = [
    ((2, 4, 9), (3,), (1,), (1,), (1,), 1),
    ((2, 4, 9), (3,), (2,), (0,), (2,), 2),
    ((3, 2, 6, 7), (3, 2), (1, 2), (1, 0), (1, 1), 1),
    ((2, 6, 5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    ((2, 2, 4, 5, 3), (2, 3, 1), (1, 1, 1), (0, 1, 0), (1, 1, 1), 1),
]


@pytest.mark.parametrize("shape, kernel, stride, padding, dilation, groups", CONVOLUTIONS)
def test_convolutions_are_seen_through_their_unfolded_inputs(shape, kernel, stride, padding, dilation, groups):
    x = rows_of(3, shape[0], int(np.prod(shape[1:]))).reshape(shape)
    timesteps = np.arange(shape[0]) * 3
    rows, each = unfolded(x, kernel, stride, padding, dilation, groups)
    c = aq.Calibration(num_timesteps=10, groups=5)
    layer = c.add_layer("conv.weight", rows.shape[1])
    c.update_conv(layer, x, kernel, stride, padding, dilation, groups, timesteps)
    check(c, layer, rows, np.repeat(timesteps, each), 5, 10)


def test_gradients_are_kept_as_mean_squares_by_row_and_column():
    c = aq.Calibration()
    layer = c.add_layer("a.weight", 6)
    gradients = [rows_of(i, 4, 6) for i in range(3)]
    for g in gradients:
        c.add_gradient(layer, g)
    c.add_gradient(c.add_layer("conv.weight", 6), gradients[0].reshape(4, 2, 3))
    rows, columns = c.gradient(layer)
    squares = np.array(gradients, np.float64) ** 2
    np.testing.assert_allclose(rows, squares.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(columns, squares.mean((0, 1)), rtol=1e-12)
    with pytest.raises(aq.ShapeMismatchError, match="'a.weight' has 6 inputs"):
        c.add_gradient(layer, np.zeros((4, 7), np.float32))


def test_weights_choose_among_the_time_groups():
    c = aq.Calibration(num_timesteps=2, groups=2)
    layer = c.add_layer("a.weight", 3)
    early, late = rows_of(5, 40, 3), rows_of(6, 10, 3)
    c.update(layer, early, 0)
    c.update(layer, late, 1)
    moments = [(x.T.astype(np.float64) @ x) / len(x) for x in (early, late)]
    np.testing.assert_allclose(c.hessian(layer, [0, 1]), moments[1], rtol=1e-4)
    np.testing.assert_allclose(c.hessian(layer, [3, 1]), (3 * moments[0] + moments[1]) / 4, rtol=1e-4)
    np.testing.assert_allclose(c.diagonal(layer, [3, 1]), np.diag(3 * moments[0] + moments[1]) / 4, rtol=1e-6)
    for weights in ([1], [1, -1], [1, float("nan")], [1, "x"]):
        with pytest.raises((ValueError, TypeError)):
            c.hessian(layer, weights)


def test_CA02_values_that_are_not_finite_are_refused_and_nothing_is_added():
    for bad in (np.nan, np.inf, -np.inf):
        c = aq.Calibration(num_timesteps=10)
        x = rows_of(0, 8, 4)
        c.update(c.add_layer("fc.weight", 4), x, 1)
        before = c.stats("fc.weight", 1)
        x[5, 2] = bad
        with pytest.raises(aq.FormatError, match="fc.weight.*row 5, channel 2"):
            c.update("fc.weight", x, 1)
        assert c.stats("fc.weight", 1)["count"] == before["count"] == 8


def test_CA02_timesteps_outside_the_schedule_are_refused():
    c = aq.Calibration(num_timesteps=10)
    layer = c.add_layer("fc.weight", 2)
    for timestep in (10, -2, 2**40, -(2**40)):
        with pytest.raises(aq.FormatError, match="schedule"):
            c.update(layer, np.ones((1, 2), np.float32), timestep)
        with pytest.raises(aq.FormatError, match="schedule"):
            c.update(layer, np.ones((1, 2), np.float32), np.array([timestep]))
    c.update(layer, np.ones((1, 2), np.float32))  # unknown: group 0
    assert c.stats(layer, 0)["count"] == 1


ARGUMENTS = [
    (TypeError, lambda c: c.update("a.weight", [[1.0, 2.0]])),
    (ValueError, lambda c: c.update("a.weight", np.ones((2, 2)))),
    (ValueError, lambda c: c.update("a.weight", np.ones((2, 2), np.int32))),
    (ValueError, lambda c: c.update("a.weight", np.ones(2, np.float32))),
    (ValueError, lambda c: c.update("a.weight", np.ones((2, 2), np.float32, order="F"))),
    (ValueError, lambda c: c.update("a.weight", np.ones((2, 2), np.float32)[:, ::-1])),
    (ValueError, lambda c: c.update("a.weight", np.ones((2, 2), np.float32)[::-1])),
    (ValueError, lambda c: c.update("a.weight", np.ones((2, 2), np.float32), np.ones(2, np.float32))),
    (TypeError, lambda c: c.update("a.weight", np.ones((2, 2), np.float32), "late")),
    (aq.ShapeMismatchError, lambda c: c.update("a.weight", np.ones((2, 3), np.float32))),
    (KeyError, lambda c: c.update("b.weight", np.ones((2, 2), np.float32))),
    (IndexError, lambda c: c.update(1, np.ones((2, 2), np.float32))),
    (IndexError, lambda c: c.stats(-1, 0)),
    (TypeError, lambda c: c.stats(1.5, 0)),
    (ValueError, lambda c: c.stats(0, 10)),
    (ValueError, lambda c: c.group_range(-1)),
    (aq.ConfigurationError, lambda c: c.add_layer("a.weight", 2)),
    (aq.ConfigurationError, lambda c: c.add_layer("k.weight", 3, same_input_as="a.weight")),
    (aq.ConfigurationError, lambda c: c.add_layer("k.weight", 2, same_input_as="no.weight")),
    (ValueError, lambda c: c.add_layer("k.weight", 0)),
    (TypeError, lambda c: c.merge(c.layers)),
    (ValueError, lambda c: c.merge(c)),
    (aq.ConfigurationError, lambda c: c.merge(aq.Calibration(num_timesteps=5))),
    (ValueError, lambda c: c.update_conv("a.weight", np.ones((2, 2), np.float32), 1)),
    (ValueError, lambda c: c.update_conv("a.weight", np.ones((1, 2, 4, 4), np.float32), (1, 1, 1))),
    (ValueError, lambda c: c.update_conv("a.weight", np.ones((1, 2, 4, 4), np.float32), 1, stride=0)),
    (aq.ConfigurationError, lambda c: c.update_conv("a.weight", np.ones((1, 2, 4, 4), np.float32), 7)),
    (TypeError, lambda c: c.update(layers=0)),
]


@pytest.mark.parametrize("error, call", ARGUMENTS)
def test_wrong_arguments_are_named_and_change_nothing(error, call):
    c = aq.Calibration(num_timesteps=10)
    c.add_layer("a.weight", 2)
    with pytest.raises(error):
        call(c)
    assert c.layers == ["a.weight"] and all(c.stats(0, g) is None for g in range(10))


@pytest.mark.parametrize(
    "settings",
    [{"groups": 0}, {"num_timesteps": -1}, {"max_memory": -1}, {"modality": "smell"}, {"data_sha256": "12"}, {"groups": 2**33}],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises((ValueError, aq.ConfigurationError)):
        aq.Calibration(**settings)


def test_a_layer_without_second_moment_says_so():
    c = aq.Calibration(hessian=False)
    layer = c.add_layer("a.weight", 2)
    assert not c.has_hessian(layer) and not c.hessian_kept
    with pytest.raises(aq.ConfigurationError, match=r"'a.weight' has no second moment.*diagonal"):
        c.hessian(layer)


def test_eight_threads_at_once_agree_with_one():
    x, c, alone = rows_of(0, 64, 48), aq.Calibration(groups=1), aq.Calibration(groups=1)
    for i in range(4):
        c.add_layer(f"{i}.weight", 48)
    alone.add_layer("0.weight", 48)
    for _ in range(16):
        alone.update(0, x, 0)

    def work(k):
        for _ in range(8):
            c.update(k % 4, x, 0, threads=1)
            c.hessian(k % 4)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        assert c.stats(i, 0)["count"] == 16 * 64
        assert np.array_equal(c.stats(i, 0)["sum"], alone.stats(0, 0)["sum"])
        np.testing.assert_allclose(c.hessian(i), alone.hessian(0), rtol=0, atol=1e-4)  # summed in blocks that reading cuts


def test_a_file_gives_back_what_was_saved(tmp_path):
    c = aq.Calibration(num_timesteps=100, groups=4, data_name="set", data_sha256="ab" * 32, seed=7, synthetic=True, modality="image")
    x, timesteps = rows_of(2, 50, 9), np.arange(50) * 2
    c.update(c.add_layer("to_q.weight", 9), x, timesteps)
    c.add_layer("to_k.weight", 9, same_input_as="to_q.weight")
    c.add_gradient("to_k.weight", rows_of(3, 5, 9))
    c.save(tmp_path / "a.aqcal")
    with pytest.raises(FileExistsError):
        c.save(tmp_path / "a.aqcal")
    c.save(tmp_path / "a.aqcal", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.aqcal"]
    again = aq.Calibration.open(tmp_path / "a.aqcal")
    for name in ("layers", "num_timesteps", "groups", "data_name", "data_sha256", "seed", "synthetic", "modality", "hessian_kept"):
        assert getattr(again, name) == getattr(c, name), name
    assert again.source("to_k.weight") == "to_q.weight" and again.fingerprint() == aq.Calibration.open(tmp_path / "a.aqcal").fingerprint()
    check(again, "to_q.weight", x, timesteps, 4, 100)
    assert np.allclose(again.gradient("to_k.weight")[1], c.gradient("to_k.weight")[1]) and again.timesteps(0) == c.timesteps(0)
    again.update("to_q.weight", x, timesteps)  # an opened collection goes on
    check(again, "to_q.weight", np.concatenate([x, x]), np.concatenate([timesteps, timesteps]), 4, 100)


def test_damaged_files_are_refused_in_words(tmp_path):
    c = aq.Calibration(num_timesteps=10, groups=2)
    c.update(c.add_layer("a.weight", 40), rows_of(0, 30, 40), 3)
    c.save(tmp_path / "a.aqcal")
    good = (tmp_path / "a.aqcal").read_bytes()
    for bad in (b"", b"PAR1", good[:-7], good[: len(good) // 2], b"x" * 1000, good[:100] + bytes([good[100] ^ 1]) + good[101:]):
        (tmp_path / "b.aqcal").write_bytes(bad)
        try:
            opened = aq.Calibration.open(tmp_path / "b.aqcal")
            opened.hessian("a.weight")
        except aq.FormatError as error:
            assert "b.aqcal" in str(error) or "a.weight" in str(error)
    with pytest.raises(FileNotFoundError):
        aq.Calibration.open(tmp_path / "none.aqcal")


def test_CA01_a_collection_of_another_model_is_refused():
    c = aq.Calibration()
    c.add_layer("transformer_blocks.0.attn1.to_q.weight", 191)
    c.add_layer("decoder.weight", 4)
    with pytest.raises(aq.FormatError, match="(?s)to_q.weight.*191.*192.*decoder.weight"):
        c.check(SAMPLE)


def test_threads_change_nothing():
    x = rows_of(0, 700, 96)
    results = []
    for threads in (1, 2, 5):
        c = aq.Calibration(num_timesteps=70, groups=3)
        c.update(c.add_layer("a.weight", 96), x, np.arange(70), threads=threads)
        results.append((c.hessian(0).tobytes(), c.stats(0, 0)["sum"].tobytes()))
    assert len(set(results)) == 1


# ---- Ctrl-C ----


def pending(slot):
    """An object that has SIGINT pending, and no line of Python run since, when a call reads its arguments."""
    ask = functools.partial(ctypes.pythonapi.PyErr_SetInterruptEx, int(signal.SIGINT))  # returns 0
    return type("Pending", (), {slot: ask})()


@pytest.mark.parametrize("call", ["update", "update_conv"])
def test_FA10_ctrl_c_stops_a_long_call_and_nothing_of_it_is_added(call):
    c = aq.Calibration(num_timesteps=10, groups=1)
    c.add_layer("a.weight", 4096)
    c.update("a.weight", np.ones((3, 4096), np.float32), 5)
    before = c.fingerprint()
    with pytest.raises(KeyboardInterrupt):
        if call == "update":
            c.update("a.weight", np.zeros((8192, 4096), np.float32), 5, threads=pending("__index__"))
        else:
            c.update_conv("a.weight", np.zeros((2, 4096, 64, 64), np.float32), 1, timesteps=5, threads=pending("__index__"))
    assert c.fingerprint() == before and c.stats("a.weight", 0)["count"] == 3


def test_FA10_a_handler_that_raises_nothing_may_use_the_collection_and_the_call_is_made_whole():
    c, seen = aq.Calibration(), []
    c.add_layer("a.weight", 4096)
    old = signal.signal(signal.SIGINT, lambda *_: seen.append(c.stats("a.weight", 0)))
    try:
        c.update("a.weight", np.ones((8192, 4096), np.float32), threads=pending("__index__"))
    finally:
        signal.signal(signal.SIGINT, old)
    assert seen == [None] and c.stats("a.weight", 0)["count"] == 8192
    assert c.hessian("a.weight").min() == c.hessian("a.weight").max() == 1


def test_FA10_ctrl_c_stops_a_save_and_leaves_no_file(tmp_path):
    c = aq.Calibration()
    c.add_layer("a.weight", 8)
    c.update("a.weight", np.ones((3, 8), np.float32))
    with pytest.raises(KeyboardInterrupt):
        c.save(tmp_path / "a.aqcal", overwrite=pending("__len__"))
    assert not list(tmp_path.iterdir())
