"""quantize, open, verify, diff, export, inspect: arguments, results, progress and errors."""

import errno
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import threading

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import tree_bytes, write_model, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("small") / "m", cols=300)


@pytest.fixture(scope="module")
def container(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("container") / "out"
    aq.quantize(small, out)
    return out


# ---- quantize ----


def test_a_result_tells_what_was_written(small, tmp_path):
    r = aq.quantize(small, tmp_path / "out", bits=8, group=64, params="f32")
    assert r.path == str(tmp_path / "out") and r.size == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.parquet"))
    assert list(r.layers) == [f"blocks.{i}.linear.weight" for i in range(3)] and r.kept == {} and r.warnings == []
    layer = r.layers["blocks.0.linear.weight"]
    assert (layer.shape, layer.dtype, layer.bits, layer.group_size, layer.params) == ((64, 300), "F32", 8, 64, "f32") and layer.cosine > 0.999
    assert r.bpw == pytest.approx(8 * (300 + 8 * math.ceil(300 / 64)) / 300)  # codes, and a pair of floats for each group
    assert r.cosine == pytest.approx(np.mean([x.cosine for x in r.layers.values()]), abs=1e-9)


def test_a_result_is_plain_data(small, tmp_path):
    r = aq.quantize(small, tmp_path / "out")
    assert pickle.loads(pickle.dumps(r)) == r and json.loads(r.to_json()) == r.report and r.report["schema"] == "arrowquant.quantize/1"
    with pytest.raises(AttributeError):
        r.size = 0


def test_the_default_output_lies_beside_the_source(tmp_path):
    model = write_model(tmp_path / "dit")
    assert aq.quantize(model).path == str(tmp_path / "dit-int4") and aq.quantize(model, bits=8).path == str(tmp_path / "dit-int8")


@pytest.mark.parametrize(
    "keyword, suggestion",
    [
        ("bitz", "bits"),
        ("gruop", "group"),
        ("target_sise", "target_size"),
        ("overwrit", "overwrite"),
        ("min_acuracy", "min_accuracy"),
        ("bit_widht", "bit_width"),
    ],
)
def test_an_unknown_keyword_is_a_type_error_with_a_suggestion(small, tmp_path, keyword, suggestion):
    with pytest.raises(TypeError) as e:
        aq.quantize(small, tmp_path / "out", **{keyword: 4})
    assert str(e.value) == f"quantize() got an unexpected keyword argument '{keyword}'; did you mean '{suggestion}'?"
    with pytest.raises(TypeError, match=r"inspect\(\) got an unexpected keyword argument 'xyzzyxyz'$"):
        aq.inspect(small, xyzzyxyz=1)
    for function, wrong, right in [(aq.verify, "min_acuracy", "min_accuracy"), (aq.export, "overwrit", "overwrite"), (aq.report, "agianst", "against")]:
        with pytest.raises(TypeError) as e:
            function(small, **{wrong: 1})
        assert str(e.value) == f"{function.__name__}() got an unexpected keyword argument '{wrong}'; did you mean '{right}'?"
    with pytest.raises(TypeError, match=r"diff\(\) got an unexpected keyword argument 'xyzzyxyz'$"):
        aq.diff(small, small, xyzzyxyz=1)


def test_field_names_and_short_names_mean_the_same(small, tmp_path):
    aq.quantize(small, tmp_path / "a", bits=2, group=64, threads=1, min_accuracy=0.5, max_memory="1GiB")
    aq.quantize(small, tmp_path / "b", bit_width=2, group_size=64, num_threads=2, min_accuracy=0.5, max_memory_limit_mb=1024)
    config = aq.DiffusionQuantConfig(bit_width=2, group_size=64, min_accuracy=0.5)
    aq.quantize(small, tmp_path / "c", config=config)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b") == tree_bytes(tmp_path / "c")
    assert config == aq.DiffusionQuantConfig(bit_width=2, group_size=64, min_accuracy=0.5)


def test_a_profile_brings_its_values_and_keywords_change_them(small, tmp_path):
    r = aq.quantize(small, tmp_path / "out", profile="edge", group=64, params="f16")
    assert {(x.bits, x.group_size) for x in r.layers.values()} == {(2, 64)} and r.report["config"]["min_accuracy"] == 0.65
    with pytest.raises(ValueError, match="Invalid deployment profile"):
        aq.quantize(small, tmp_path / "x", profile="desktop")
    with pytest.raises(TypeError, match="config or profile, not both"):
        aq.quantize(small, tmp_path / "x", profile="edge", config=aq.DiffusionQuantConfig())


@pytest.mark.parametrize("words, size", [("6.5GB", 6.5e9), ("4GiB", 2**32), ("100 MB", 1e8), (1e6, 1e6), ("12kB", 12000), ("1TiB", 2**40), ("17", 17)])
def test_size_words(words, size):
    from arrow_quant_v2._jobs import bytes_of

    assert bytes_of(words) == size


@pytest.mark.parametrize("words", ["big", "4 apples", "", "GB", "1.2.3MB", True, None])
def test_other_words_are_no_sizes(words):
    from arrow_quant_v2._jobs import bytes_of

    with pytest.raises(ValueError, match="Invalid size"):
        bytes_of(words)


def test_a_target_size_that_cannot_be_met_is_a_budget_error(small, tmp_path):
    with pytest.raises(aq.BudgetError) as e:
        aq.quantize(small, tmp_path / "out", target_size="1kB")
    assert isinstance(e.value, aq.ConfigurationError) and e.value.code == 5 and not (tmp_path / "out").exists()


def test_an_existing_output_needs_overwrite(small, tmp_path):
    aq.quantize(small, tmp_path / "out")
    before = tree_bytes(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists already") as e:
        aq.quantize(small, tmp_path / "out", bits=8)
    assert e.value.errno == errno.EEXIST and e.value.filename == str(tmp_path / "out") and tree_bytes(tmp_path / "out") == before
    assert aq.quantize(small, tmp_path / "out", bits=8, overwrite=True).report["summary"]["bit_width"] == 8


def test_a_missing_parent_needs_mkdir(small, tmp_path):
    with pytest.raises(FileNotFoundError):
        aq.quantize(small, tmp_path / "a" / "b")
    assert aq.quantize(small, tmp_path / "a" / "b", mkdir=True).path == str(tmp_path / "a" / "b")


def test_the_memory_limit_is_a_memory_error(tmp_path):
    model = write_model(tmp_path / "m", n_layers=1, rows=2048, cols=4096)
    with pytest.raises(MemoryError, match="memory limit of 1 MiB is too small"):
        aq.quantize(model, tmp_path / "out", max_memory="1MiB")


def test_a_model_without_modality_is_quantized_with_a_warning(tmp_path):
    r = aq.quantize(write_model(tmp_path / "m", modality=None), tmp_path / "out")
    text = "the modality cannot be told from the model's files; give it with modality='text|code|image|audio' to record it"
    assert text in r.warnings and r.report["warnings"] == r.warnings and not any("--" in w for w in r.warnings)
    with pytest.raises(aq.ValidationError, match="strict=True"):
        aq.quantize(tmp_path / "m", tmp_path / "strict", strict=True)


def test_patterns_that_match_nothing_are_errors_unless_allowed(small, tmp_path):
    with pytest.raises(aq.ConfigurationError, match="blocks.9"):
        aq.quantize(small, tmp_path / "out", exclude=["blocks.9*"])
    r = aq.quantize(small, tmp_path / "out", exclude=("blocks.9*", "blocks.1*"), allow_unmatched=True)
    assert list(r.kept) == ["blocks.1.linear.weight"]


# ---- progress ----


def test_a_progress_callable_sees_the_state(tmp_path):
    model = write_model(tmp_path / "m", n_layers=10, rows=256, cols=1024)
    seen = []
    aq.quantize(model, tmp_path / "out", progress=seen.append)
    assert all(type(p) is aq.Progress for p in seen) and {"check", "quantize", "verify"} <= {p.stage for p in seen}
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert seen[-1].n_total == 10 and all(p.elapsed_s >= 0 and (p.eta_s is None or p.eta_s >= 0) for p in seen)


def test_false_cancels_and_none_does_not(tmp_path):
    model = write_model(tmp_path / "m", n_layers=30, rows=512, cols=1024)
    with pytest.raises(aq.Interrupted) as e:
        aq.quantize(model, tmp_path / "out", progress=lambda p: p.n_done == 0)
    assert e.value.code == 130 and not (tmp_path / "out").exists()
    r = aq.quantize(model, tmp_path / "out", progress=lambda p: None)
    aq.quantize(model, tmp_path / "whole")
    assert len(r.layers) == 30 and tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_what_a_progress_callable_raises_is_raised(small, tmp_path):
    with pytest.raises(ZeroDivisionError):
        aq.quantize(small, tmp_path / "out", progress=lambda p: 1 / 0)
    with pytest.raises(TypeError, match="progress must be True, a callable or None"):
        aq.quantize(small, tmp_path / "out", progress="yes")


def test_progress_true_prints_nothing_where_there_is_no_terminal(small, tmp_path, capfd):
    aq.quantize(small, tmp_path / "out", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_progress_true_shows_a_bar_on_a_terminal(small, tmp_path):
    pytest.importorskip("tqdm")
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    code = "import sys, arrow_quant_v2 as aq; aq.quantize(*sys.argv[1:], progress=True)"
    with subprocess.Popen([sys.executable, "-c", code, small, tmp_path / "out"], stderr=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # the other side is closed
            pass
        assert process.stdout.read() == b"" and process.wait() == 0
    os.close(ours)
    assert b"3/3: 100%" in shown and shown.endswith(b"\r")


# ---- open ----


def test_a_reader_is_a_mapping_and_a_context_manager(container):
    with aq.open(container) as f:
        assert len(f) == 3 and list(f) == list(f.keys()) == [t.name for t in f.values()] and "blocks.0.linear.weight" in f and "x" not in f
        assert f.modality == "image" and f.schema_version == "2.1" and f.path == str(container) and f.metadata["format"] == "arrowquant"
        with pytest.raises(KeyError):
            f["x"]
        t = f["blocks.0.linear.weight"]
        assert t.shape == (64, 300) and t.dtype == "F32" and t.quantized and t.method == "search" and t.time_groups is None and 0.9 < t.cosine < 1
    with pytest.raises(ValueError, match="the file is closed"):
        t.dequantize()
    f.close()


@pytest.mark.parametrize(
    "settings",
    [{"bits": 8}, {"bits": 4, "group": 32}, {"bits": 2}, {"bits": 2, "params": "f32"}, {"bits": 4, "group_size": "row"}, {"bits": 4, "params": "two-level"}],
)
def test_codes_scales_and_zeros_give_the_values(small, tmp_path, settings):
    aq.quantize(small, tmp_path / "out", min_accuracy=0.1, **settings)
    with aq.open(tmp_path / "out") as f:
        for t in f.values():
            rows, cols = t.shape
            bits = np.unpackbits(t.codes, axis=1, bitorder="little")[:, : cols * t.bits].reshape(rows, cols, t.bits)
            q = (bits * (1 << np.arange(t.bits))).sum(axis=2).astype(np.float32)
            width = t.result()["group_size"]
            g = np.arange(cols) // width
            expected = (q - t.zeros[:, g]) * t.scales[:, g]
            assert np.array_equal(t.dequantize(), expected) and np.array_equal(aq.dequantize(t.result()), expected)
            assert np.array_equal(t.dequantize("float16"), expected.astype(np.float16))


def test_codes_are_borrowed_read_only_and_stay_valid(container):
    f = aq.open(container)
    codes = f["blocks.0.linear.weight"].codes
    copy = codes.copy()
    with pytest.raises(ValueError, match="read-only"):
        codes[0, 0] = 1
    f.close()
    del f
    assert np.array_equal(codes, copy)


def test_kept_tensors_have_values_and_no_codes(tmp_path):
    tensors = {
        "w.weight": np.ones((64, 128), np.float32),
        "bias": np.linspace(0, 1, 5).astype(np.float16),
        "n": np.arange(4, dtype=np.int64),
        "s": np.float32(3).reshape(()),
    }
    aq.quantize(write_model(tmp_path / "m", tensors), tmp_path / "out")
    with aq.open(tmp_path / "out") as f:
        with pytest.raises(ValueError, match="it has no codes"):
            f["bias"].result()
        assert f["bias"].codes is None and f["bias"].scales is None and f["bias"].bits is None and f["bias"].quant_type == "f16"
        assert np.array_equal(f["bias"].dequantize(), tensors["bias"].astype(np.float32)) and f["s"].dequantize().shape == () and f["s"].dequantize() == 3
        with pytest.raises(TypeError, match="tensor 'n' is stored as i64"):
            f["n"].dequantize()
        with pytest.raises(ValueError, match="Invalid dtype: 'int8'"):
            f["bias"].dequantize("int8")


def test_open_refuses_what_is_no_container(small, tmp_path):
    with pytest.raises(aq.ModelNotFoundError, match="Model not found"):
        aq.open(tmp_path / "nowhere")
    for path in (small, write_safetensors(tmp_path / "x.safetensors", {"a": [1.0]})):
        with pytest.raises(aq.FormatError):
            aq.open(path)


def test_threads_may_share_a_reader_that_is_closed_under_them(container):
    expected = {}
    with aq.open(container) as f:
        expected = {name: t.dequantize() for name, t in f.items()}
    for _ in range(20):
        f, wrong = aq.open(container), []

        def read(f=f, wrong=wrong):
            try:
                while True:
                    for name, value in expected.items():
                        if not np.array_equal(f[name].dequantize(threads=1), value):
                            wrong.append(name)
            except ValueError as error:
                if "closed" not in str(error):
                    wrong.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for t in threads:
            t.start()
        f.close()
        for t in threads:
            t.join()
        assert wrong == []


# ---- verify, diff, export, inspect ----


def test_verify_with_and_without_the_source(small, container):
    alone, against = aq.verify(container), aq.verify(container, small)
    assert alone["ok"] and against["ok"] and against["summary"]["max_error"] > 0 and alone["summary"]["max_error"] is None
    assert aq.verify(container, small, min_accuracy=1)["ok"] is False
    with pytest.raises(ValueError, match="Invalid accuracy threshold: 2. Must be between 0.0 and 1.0"):
        aq.verify(container, min_accuracy=2)
    with pytest.raises(aq.FormatError, match="is a source model"):
        aq.verify(small)
    with pytest.raises(aq.Interrupted):
        aq.verify(container, small, progress=lambda p: False)


def test_diff_measures_each_tensor(small, container):
    report = aq.diff(container, small)
    assert report["equal"] is False and report["summary"]["n_compared"] == 3 and report["summary"]["n_equal"] == 0
    assert aq.diff(small, small)["equal"] is True


def as_bf16(values):
    """Bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype, word, convert", [(None, "F32", np.asarray), ("f32", "F32", np.asarray), ("f16", "F16", np.float16), ("bf16", "BF16", as_bf16)])
def test_an_export_holds_the_dequantized_values(container, tmp_path, dtype, word, convert):
    report = aq.export(container, tmp_path / "plain.safetensors", dtype=dtype)
    assert report["n_tensors"] == 3
    data = (tmp_path / "plain.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    with aq.open(container) as f:
        assert set(f.keys()) == set(header) - {"__metadata__"}
        for name, t in f.items():
            begin, end = header[name]["data_offsets"]
            assert header[name]["dtype"] == word and header[name]["shape"] == list(t.shape)
            assert data[8 + size + begin : 8 + size + end] == convert(t.dequantize()).tobytes()


def test_an_export_that_cannot_be_is_refused(container, tmp_path):
    with pytest.raises(aq.ConfigurationError, match="unknown export format 'onnx'"):
        aq.export(container, tmp_path / "x", to="onnx")
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        aq.export(container, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_inspect_tells_what_a_run_would_do(small, container):
    report = aq.inspect(small, bits=8, exclude=["blocks.2*"])
    decisions = {t["name"]: t["decision"] for t in report["tensors"]}
    assert decisions["blocks.0.linear.weight"]["bits"] == 8 and decisions["blocks.2.linear.weight"]["action"] == "keep"
    assert aq.inspect(container)["schema"] == "arrowquant.inspect/1"


@pytest.mark.parametrize("function", [aq.quantize, aq.verify, aq.export, aq.inspect, aq.open])
def test_a_missing_path_is_not_found_for_every_function(function, tmp_path):
    with pytest.raises(aq.ModelNotFoundError, match=f"Model not found: {tmp_path}/x"):
        function(tmp_path / "x")
    with pytest.raises(TypeError):
        function(3)


# ---- properties ----


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    dtype=st.sampled_from(["float32", "float16", "float64"]),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([32, 64, 128, 256]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_type_comes_back_close_and_in_its_shape(tmp_path_factory, shape, dtype, bits, group, seed):
    folder = tmp_path_factory.mktemp("property")
    w = np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)
    model = write_model(folder / "m", {"layer.weight": w})
    aq.quantize(model, folder / "out", bits=bits, group=group, min_accuracy=0, include=["*"], method="rtn")
    with aq.open(folder / "out") as f:
        t = f["layer.weight"]
        v = t.dequantize()
        assert t.quantized and v.shape == tuple(shape)
        assert t.codes.shape == (shape[0], math.ceil(math.prod(shape[1:]) * bits / 8))
        # min-max over a group that spans less than 2: half a step, and what the rounding of scale and offset to their stored form adds
        step = 2 / (2**bits - 1)
        assert np.abs(v - w.astype(np.float32)).max() <= (step if bits == 2 else 0.6 * step)
