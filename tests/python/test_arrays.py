"""Arrays in, codes out, and back."""

import array
import ctypes
import gc
import os
import subprocess
import sys
import threading
import warnings

import arrow_quant_v2 as aq
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import dequantize, same, step_of_each_value
from hypothesis import given, settings

RNG = np.random.default_rng(1)
finite = st.floats(-(2.0**100), 2.0**100, width=32)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9) | st.tuples(st.integers(1, 3), st.integers(100, 300)) | st.tuples(st.integers(1, 700))
arrays32 = hnp.arrays(np.float32, shapes, elements=finite)
bit_widths = st.sampled_from([2, 4, 8])


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def assert_within_half_a_step(result, a):
    back = dequantize(result).astype(np.float64)
    a = np.asarray(a, np.float64)
    assert back.shape == a.shape
    largest = float(np.abs(a).max(initial=0))
    assert np.all(np.abs(back - a) <= 0.5 * step_of_each_value(result) * (1 + 1e-4) + 1e-6 * largest)


@settings(deadline=None)
@given(arrays32, bit_widths)
def test_round_trip_is_within_half_a_step_for_any_shape_and_bit_width(a, bits):
    r = aq.ArrowQuantV2().quantize_batch({"w": a}, bits)["w"]
    assert (r["shape"], r["bit_width"], r["group_size"]) == (list(a.shape), bits, 128)
    assert [type(r[k]) for k in ("quantized_data", "scales", "zero_points")] == [bytes, list, list]
    assert np.all(np.isfinite(r["scales"])) and np.all(np.isfinite(r["zero_points"])) and all(s > 0 for s in r["scales"])
    assert_within_half_a_step(r, a)
    back = aq.dequantize(r)
    assert back.dtype == np.float32 and back.shape == a.shape
    assert np.array_equal(back, dequantize(r))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ends", [(-3.4e38, 3.4e38), (-3.4028235e38, 3.4028235e38), (-1e38, 3.4e38), (-3.4e38, 0.1e38), (-2e38, 2.1e38)])
def test_a_range_of_more_than_float32_holds_comes_back_within_half_a_step(ends, bits):
    a = np.linspace(*np.array(ends, np.float64), 128).astype(np.float32)
    r = aq.quantize_array(a, bits)
    back, step = aq.dequantize(r), r["scales"][0]
    assert np.all(np.isfinite(back)) and np.all(np.abs(back.astype(np.float64) - a) <= 0.5 * step * (1 + 1e-5))


@pytest.mark.parametrize("group", [1, 32, 50, 128, 200, 250, 1000])
def test_a_batch_in_groups_of_any_length_is_what_each_array_gives_alone(group):
    rng = np.random.default_rng(1)
    weights = {f"w{i}": rng.standard_normal((3 + i, 40 * i + 1), dtype=np.float32) for i in range(6)}
    batch = aq.quantize_batch(weights, 4, group=group)
    assert batch == {name: aq.quantize_array(a, 4, group) for name, a in weights.items()} and batch["w1"]["group_size"] == group
    with pytest.raises(ValueError, match="^Invalid group: 0. Must be 1 or more$"):
        aq.quantize_batch(weights, group=0)


@settings(deadline=None)
@given(hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64]), (6, 11, 5), elements=st.floats(-1000, 1000, width=16)), bit_widths, st.data())
def test_any_dtype_and_stride_gives_the_bytes_of_the_contiguous_float32_array(a, bits, data):
    view = a.transpose(data.draw(st.permutations(range(3))))[:: data.draw(st.sampled_from([1, 2, -1]))]
    plain = np.ascontiguousarray(view, dtype=np.float32)
    expected = aq.quantize_array(plain, bits)
    assert aq.quantize_array(view, bits) == expected
    assert aq.ArrowQuantV2().quantize({"w": view}, bits)["w"] == aq.ArrowQuantV2().quantize_batch({"w": plain}, bits)["w"] == expected
    assert aq.quantize_array(plain.tolist(), bits) == expected


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.text(max_size=5), arrays32, max_size=6), bit_widths, st.integers(1, 9))
def test_thread_count_changes_nothing_and_names_come_back_sorted(weights, bits, threads):
    one = aq.quantize_batch(weights, bits, threads=1)
    assert list(one) == sorted(weights)
    assert same(one, aq.quantize_batch(weights, bits, threads=threads))
    assert same(one, aq.quantize_batch(weights, bits, threads=threads, as_numpy=True))


@pytest.mark.parametrize("shape", [(300, 1000), (1, 500_000), (500_000,), (3, 200_001), (30_000, 3), (30_000, 1), (2, 3, 50_000)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_large_layers_are_cut_into_pieces_that_cannot_be_seen(shape, bits):
    a = normal(*shape)
    one, many = aq.quantize_array(a, bits, threads=1, as_numpy=True), aq.quantize_array(a, bits, threads=7, as_numpy=True)
    assert all(np.array_equal(one[k], many[k]) for k in ("quantized_data", "scales", "zero_points"))
    assert_within_half_a_step(one, a)
    assert np.array_equal(aq.dequantize(one), aq.dequantize(one, threads=5))
    # the last row, quantized alone
    if len(shape) > 1:
        last = aq.quantize_array(a[-1].reshape(1, -1), bits)
        assert bytes(one["quantized_data"])[-len(last["quantized_data"]) :] == last["quantized_data"]


@pytest.mark.parametrize("group", [1, 3, 32, 100, 128, 250, 256, 100_000, 200_000])
def test_groups_of_any_size(group):
    a = normal(2, 150_001)
    r = aq.quantize_array(a, 2, group, as_numpy=True)
    assert r["group_size"] == group and len(r["scales"]) == 2 * -(-150_001 // group)
    assert_within_half_a_step(r, a)
    assert np.array_equal(aq.dequantize(r), dequantize(r))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, -1e30])
def test_a_constant_group_is_finite_and_exact(bits, value):
    a = np.full((2, 200), value, np.float32)
    assert np.array_equal(aq.dequantize(aq.quantize_array(a, bits)), a)


def test_search_is_never_worse_than_rtn():
    a = normal(20, 500)
    for bits in (2, 4):
        assert aq.sqnr_db(a, aq.dequantize(aq.quantize_array(a, bits, method="search"))) > aq.sqnr_db(a, aq.dequantize(aq.rtn(a, bits)))


def test_empty_input_gives_an_empty_dict():
    q, calls = aq.ArrowQuantV2(), []
    assert q.quantize({}) == q.quantize_batch({}) == q.quantize_batch_with_progress({}, progress_callback=lambda *c: calls.append(c)) == {}
    assert calls == []


def test_arrays_of_size_zero_have_no_codes_and_no_groups():
    for shape in [(0,), (0, 5), (5, 0), (2, 0, 3)]:
        r = aq.ArrowQuantV2().quantize_batch({"w": np.zeros(shape, np.float32)})["w"]
        assert (r["quantized_data"], r["scales"], r["zero_points"], r["shape"]) == (b"", [], [], list(shape))
        assert aq.dequantize(r).shape == shape


@pytest.mark.parametrize("name", ["", "a b", "\x00", "é", "\U0001f600", "\ud800", "x" * 10_000])
def test_any_str_is_a_name(name):
    assert list(aq.ArrowQuantV2().quantize_batch({name: np.ones(3, np.float32)})) == [name]
    with pytest.raises(ValueError) as e:
        aq.ArrowQuantV2().quantize_batch({name: 3})
    assert str(e.value).startswith(f"Expected numpy array for layer '{name}', got int.")


def test_input_is_not_changed_and_may_be_read_only():
    a = normal(50, 70)
    before = a.copy()
    a.flags.writeable = False
    aq.ArrowQuantV2().quantize_batch({"w": a})
    assert np.array_equal(a, before)


def test_buffers_of_other_kinds_count_as_arrays():
    values = [0.5, -1.0, 2.0]
    expected = aq.quantize_array(np.array(values, np.float32))
    assert aq.ArrowQuantV2().quantize_batch({"w": array.array("f", values)})["w"] == expected
    assert aq.ArrowQuantV2().quantize_batch({"w": memoryview(array.array("f", values))})["w"] == expected
    assert aq.quantize_array(array.array("d", values)) == expected

    class Interface:
        def __init__(self):
            self.values = (ctypes.c_float * 3)(*values)
            self.__array_interface__ = {"version": 3, "shape": (3,), "typestr": "<f4", "data": (ctypes.addressof(self.values), False)}

    assert aq.ArrowQuantV2().quantize_batch({"w": Interface()})["w"] == expected


def test_torch_tensors_come_in_by_dlpack():
    torch = pytest.importorskip("torch")
    a = normal(6, 40)
    t = torch.from_numpy(a)
    assert aq.quantize_array(t) == aq.quantize_array(a)
    assert aq.quantize_array(t.T) == aq.quantize_array(np.ascontiguousarray(a.T))
    half = t.to(torch.bfloat16)
    assert aq.quantize_array(half) == aq.quantize_array(half.float().numpy())


def test_as_numpy_gives_arrays_that_own_the_memory():
    r = aq.ArrowQuantV2().quantize_batch({"w": normal(100, 100)}, as_numpy=True)["w"]
    assert [r[k].dtype for k in ("quantized_data", "scales", "zero_points")] == [np.uint8, np.float32, np.float32]
    scales, copy = r["scales"], r["scales"].copy()
    del r
    gc.collect()
    junk = [np.full(100, 7, np.float32) for _ in range(1000)]
    assert np.array_equal(scales, copy) and len(junk) == 1000


def test_the_input_is_never_copied():
    """The largest resident size grows by the result, not by the input: measured in a process of its own."""
    code = """
import resource, numpy as np, arrow_quant_v2 as aq
weights = {f"l{i}": np.ones((1000, 1000), np.float32) for i in range(60)}
q = aq.ArrowQuantV2()
q.quantize_batch({"w": weights["l0"]}, as_numpy=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
r = q.quantize_batch(weights, 4, as_numpy=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    result = 60 * (1000 * 500 + 2 * 4 * 8000) / 2**20
    assert grown < result + 16  # the input is 229 MiB


def test_progress_is_called_once_for_each_layer_from_the_calling_thread():
    weights = {f"l{i}": normal(40, 40) for i in range(50)}
    calls, threads = [], set()

    def progress(name, fraction):
        calls.append((name, fraction))
        threads.add(threading.get_ident())

    r = aq.ArrowQuantV2().quantize_batch_with_progress(weights, 4, progress)
    assert sorted(name for name, _ in calls) == sorted(weights)
    assert [f for _, f in calls] == pytest.approx([(i + 1) / 50 for i in range(50)])
    assert threads == {threading.get_ident()}
    assert r == aq.ArrowQuantV2().quantize_batch(weights, 4)


def test_callbacks_that_raise_change_nothing():
    weights = {f"l{i}": normal(10, 10) for i in range(5)}

    def progress(name, fraction):
        raise RuntimeError("no")

    with pytest.warns(RuntimeWarning, match="progress_callback raised RuntimeError"):
        r = aq.ArrowQuantV2().quantize_batch_with_progress(weights, 4, progress)
    assert r == aq.ArrowQuantV2().quantize_batch(weights, 4)


def test_keyboard_interrupt_in_a_callback_stops_the_work():
    def progress(name, fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aq.ArrowQuantV2().quantize_batch_with_progress({"a": normal(5), "b": normal(5)}, 4, progress)


def test_a_callback_may_quantize():
    inner = []

    def progress(name, fraction):
        inner.append(aq.ArrowQuantV2().quantize_batch({"x": weights["a"]})["x"])

    weights = {"a": normal(30, 30), "b": normal(30, 30)}
    outer = aq.ArrowQuantV2().quantize_batch_with_progress(weights, 4, progress)
    assert inner == [outer["a"], outer["a"]]


def test_ctrl_c_stops_a_long_call():
    code = """
import os, signal, threading, time, numpy as np, arrow_quant_v2 as aq
a = np.random.default_rng(0).standard_normal((8192, 4096), dtype=np.float32)
weights = {str(i): a for i in range(200)}  # the same memory 200 times: 26 GB of work
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    aq.ArrowQuantV2().quantize_batch(weights, 2, as_numpy=True)
    print("finished")
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n", done.stderr


def test_eight_threads_at_once_agree_with_one():
    weights = {f"l{i}": normal(64, 300) for i in range(10)}
    quantizer = aq.ArrowQuantV2()
    expected = quantizer.quantize_batch(weights)
    results = [None] * 8

    def work(i):
        for _ in range(5):
            results[i] = quantizer.quantize_batch(weights)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(r == expected for r in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_FA17_a_forked_child_quantizes():
    weights = {f"l{i}": normal(200, 300) for i in range(10)}
    expected = aq.quantize_batch(weights, threads=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if aq.quantize_batch(weights, threads=4) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert aq.quantize_batch(weights, threads=4) == expected


def resident_kib():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_ten_thousand_calls_leak_nothing():
    a, bad = normal(30, 40), np.full(10, np.nan, np.float32)
    quantizer = aq.ArrowQuantV2()

    def calls(n):
        for _ in range(n):
            aq.dequantize(quantizer.quantize_batch({"w": a}, as_numpy=True)["w"])
            quantizer.quantize({"w": [1.0, 2.0]})
            with pytest.raises(ValueError):
                quantizer.quantize_batch({"w": a, "bad": bad})

    calls(500)
    gc.collect()
    before = resident_kib()
    calls(10_000)
    gc.collect()
    assert resident_kib() - before < 4096


def test_a_thousand_quantizers_come_and_go():
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        aq.ArrowQuantV2().quantize_batch({"w": np.ones(3, np.float32)})
    gc.collect()
    assert len(gc.get_objects()) - before < 50


def test_quantize_layer_auto_codes_each_part_with_its_parameters():
    a = normal(100_003)
    params = [{"scale": 0.01 * (g + 1), "zero_point": 100.5 + g, "group_size": 64, "time_range": (g * 10, g * 10 + 10)} for g in range(7)]
    r = aq.ArrowQuantV2().quantize_layer_auto(a, params)
    scale, zero = (np.array([p[k] for p in params], np.float32) for k in ("scale", "zero_point"))
    part = np.repeat(np.arange(7), np.diff([g * len(a) // 7 for g in range(8)]))
    expected = np.clip(np.rint(a / scale[part] + zero[part]), 0, 255).astype(np.uint8)
    assert r["quantized_data"] == expected.tobytes()
    assert (r["scales"], r["zero_points"]) == (scale.tolist(), zero.tolist())
    assert aq.ArrowQuantV2().quantize_layer_auto(a, params, enable_simd=False) == r
    assert aq.ArrowQuantV2().quantize_layer_auto(a[:3], params)["quantized_data"] != b""


def test_metrics_follow_their_formulas():
    a, b = normal(1000), normal(1000)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    assert aq.cosine_similarity(a, b) == pytest.approx(a64 @ b64 / np.linalg.norm(a64) / np.linalg.norm(b64), rel=1e-9)
    assert aq.sqnr_db(a, b) == pytest.approx(10 * np.log10((a64**2).sum() / ((a64 - b64) ** 2).sum()), rel=1e-6)
    assert aq.cosine_similarity(np.zeros(3), np.zeros(3)) == 0.0 and aq.sqnr_db(a, a) == float("inf")


def test_importing_needs_neither_numpy_nor_pyarrow():
    code = "import sys, arrow_quant_v2 as aq; q = aq.quantize_array([1.0, 2.0]); print([m for m in ('numpy', 'pyarrow') if m in sys.modules]); "
    code += "print(aq.dequantize(q, as_numpy=False).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0] == "[]"
    assert len(out.splitlines()[1].split(",")) == 2


def test_FA17_sub_interpreters_have_a_module_of_their_own():
    """In a process of its own: once there was a sub-interpreter, Python's GIL check is off for good, which torch relies on."""
    code = """
try:
    import _interpreters as interpreters  # 3.13
except ImportError:
    import _xxsubinterpreters as interpreters
import arrow_quant_v2 as aq
text = "import arrow_quant_v2 as aq\\nassert aq.quantize_array([0.0, 1.0, 3.0], bits=2)['quantized_data'] == b'\\\\x34'"
text += f"\\nassert id(aq.ArrowQuantV2) != {id(aq.ArrowQuantV2)}"
sub = interpreters.create()
failed = interpreters.run_string(sub, text)
interpreters.destroy(sub)
assert failed is None, failed
print(aq.quantize_array([0.0, 1.0, 3.0], bits=2)["quantized_data"].hex())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "34\n", done.stderr


def test_codes_are_those_of_the_plain_formula():
    """Minimum and maximum of the group widened to contain 0, an integer zero point, half to even; ties may fall to either side of the float32 division."""
    a = normal(40, 300)
    for bits in (2, 4, 8):
        r = aq.rtn(a, bits, as_numpy=True)
        scales, zeros = r["scales"].reshape(40, 3), r["zero_points"].reshape(40, 3)
        for g in range(3):
            x = a[:, 128 * g : 128 * (g + 1)].astype(np.float64)
            low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
            s = (high - low) / (2**bits - 1)
            assert np.allclose(scales[:, g], s, rtol=1e-6)
            assert np.array_equal(zeros[:, g], np.rint(-low / s))
            q = np.clip(x / scales[:, g : g + 1] + zeros[:, g : g + 1], 0, 2**bits - 1)
            back = dequantize(r)[:, 128 * g : 128 * (g + 1)].astype(np.float64) / scales[:, g : g + 1] + zeros[:, g : g + 1]
            assert np.abs(back - q).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("shape", [(3, 1_700_000), (1_700_000, 3), (5_000_001,)])
def test_a_conversion_of_several_blocks_gives_the_bytes_of_the_contiguous_float32_array(shape):
    view = RNG.standard_normal(tuple(reversed(shape))).T[::-1]
    assert aq.quantize_array(view)["quantized_data"] == aq.quantize_array(np.ascontiguousarray(view, np.float32))["quantized_data"]


def test_one_call_crosses_into_the_library_once_whatever_the_number_of_layers():
    def calls_of(n):
        calls, weights, q = [], {str(i): np.ones((4, 8), np.float32) for i in range(n)}, aq.ArrowQuantV2()
        gc.disable()  # whose callbacks, of other tools, are no part of the call
        sys.setprofile(lambda frame, event, callee: calls.append((event, getattr(callee, "__name__", None))) if event in ("call", "c_call") else None)
        try:
            q.quantize_batch(weights)
        finally:
            sys.setprofile(None)
            gc.enable()
        return [name for event, name in calls if event == "c_call" and name != "setprofile"], sum(event == "call" for event, _ in calls)

    calls_of(1)  # what is imported when it is first needed
    assert calls_of(1) == calls_of(100) and calls_of(100)[0].count("quantize_batch") == 1


def test_the_level_of_the_kernels_and_the_build_are_told():
    info = aq.build_info()
    assert info["simd"] == aq.simd_level() and aq.simd_level() in ("scalar", "avx2", "avx512", "neon")
    assert info["version"] == aq.__version__ and set(info) == {"version", "schema_version", "compiler", "abi", "simd"}
