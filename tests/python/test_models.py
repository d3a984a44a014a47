"""Whole models through ArrowQuantV2: results, progress, and every error of the table, with its whole text."""

import errno
import inspect
import json
import logging
import math
import pickle
import threading
import warnings

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import SAMPLE, tree_bytes, write_model, write_safetensors

RESULT_KEYS = {
    *("quantized_path", "compression_ratio", "cosine_similarity", "model_size_mb", "modality", "bit_width", "quantization_time_s"),
    *("bits_per_weight", "per_layer", "fallbacks", "calibrated", "target_met", "worst_layer"),
}
LAYER_KEYS = {"bits", "group_size", "method", "cosine", "sqnr_db", "output_sqnr_db", "bytes", "fallback_from", "compared_with"}


def quantize(model, out, config=None, **kwargs):
    return aq.ArrowQuantV2().quantize_diffusion_model(model, out, config, **kwargs)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """(result dict, path) of the sample model at the defaults."""
    out = tmp_path_factory.mktemp("sample") / "out"
    return quantize(SAMPLE, out), out


# ---- the fixed surface ----

RUN = [("config", None), ("progress_callback", None)]
PARAMETERS = {
    aq.ArrowQuantV2: [("mode", "diffusion")],
    aq.ArrowQuantV2.quantize_diffusion_model: ["self", "model_path", "output_path", *RUN, ("use_arrow", None)],
    aq.ArrowQuantV2.quantize_diffusion_model_arrow: ["self", "model_path", "output_path", *RUN],
    aq.ArrowQuantV2.quantize_from_safetensors: ["self", "safetensors_path", "output_path", *RUN],
    aq.ArrowQuantV2.validate_quality: ["self", "original_path", "quantized_path"],
    aq.ArrowQuantV2.get_markov_metrics: ["self"],
    aq.AsyncArrowQuantV2: [],
    aq.AsyncArrowQuantV2.quantize_diffusion_model_async: ["self", "model_path", "output_path", *RUN],
    aq.AsyncArrowQuantV2.quantize_multiple_models_async: ["self", "models", ("progress_callback", None)],
    aq.AsyncArrowQuantV2.validate_quality_async: ["self", "original_path", "quantized_path"],
    aq.ShardedSafeTensorsLoader: ["index_path"],
    aq.load_sharded_safetensors: ["index_path"],
    aq.quantize_diffusion_model: ["model_path", "output_path", *RUN, ("use_arrow", None)],
}


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda f: f.__qualname__)
def test_signatures_show_the_fixed_names_order_and_defaults(function):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name if p.default is p.empty else (p.name, p.default) for p in parameters] == PARAMETERS[function]
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)


# ---- results ----


def test_the_result_has_the_fixed_keys_and_types(sample):
    result, out = sample
    assert set(result) == RESULT_KEYS
    types = {"quantized_path": str, "modality": str, "bit_width": int, "per_layer": dict, "fallbacks": dict, "calibrated": bool, "worst_layer": str}
    floats = dict.fromkeys(("compression_ratio", "cosine_similarity", "model_size_mb", "quantization_time_s", "bits_per_weight"), float)
    for key, kind in (types | floats).items():
        assert type(result[key]) is kind, key
    assert result["quantized_path"] == str(out) and result["modality"] == "image" and result["bit_width"] == 4
    assert result["target_met"] is None and result["calibrated"] is False
    assert len(result["per_layer"]) == 42 and all(set(layer) == LAYER_KEYS for layer in result["per_layer"].values())
    json.dumps(result, allow_nan=False)


def test_the_sizes_are_those_on_disk(sample):
    result, out = sample
    written = sum(p.stat().st_size for p in out.glob("*.parquet"))
    assert result["model_size_mb"] * 2**20 == written
    layers = result["per_layer"].values()
    assert sum(layer["bytes"] for layer in layers) < written
    with aq.open(out) as f:
        weights = {name: math.prod(t.shape) for name, t in f.items() if t.quantized}
        stored = sum(t.codes.nbytes + 4 * t.scales.size for t in f.values() if t.quantized)  # two halves for each group
    assert result["bits_per_weight"] == pytest.approx(8 * stored / sum(weights.values()))
    mean = sum(layer["cosine"] * weights[name] for name, layer in result["per_layer"].items()) / sum(weights.values())
    assert result["cosine_similarity"] == pytest.approx(mean, abs=1e-9)
    assert result["worst_layer"] == min(result["per_layer"], key=lambda name: result["per_layer"][name]["cosine"])


def test_the_compression_ratio_is_source_bytes_by_written_bytes(tmp_path):
    model = write_model(tmp_path / "m", rows=256, cols=1024)
    result = quantize(model, tmp_path / "out")
    with aq.open(tmp_path / "out") as f:
        stored = sum(t.bytes for t in f.values())
    assert result["compression_ratio"] == pytest.approx(3 * 256 * 1024 * 4 / stored)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_bit_width_is_really_stored(tmp_path, bits):
    model = write_model(tmp_path / "m")
    result = quantize(model, tmp_path / "out", aq.DiffusionQuantConfig(bit_width=bits, min_accuracy=0.5))
    assert result["bit_width"] == bits and not result["fallbacks"]
    with aq.open(tmp_path / "out") as f:
        for layer in f.values():
            assert layer.bits == bits and layer.codes.shape == (64, 256 * bits // 8)


def test_every_layer_is_as_close_as_the_result_says(tmp_path):
    rng = np.random.default_rng(5)
    w = rng.standard_normal((128, 512)).astype(np.float32)
    result = quantize(write_model(tmp_path / "m", {"a.weight": w}), tmp_path / "out")
    with aq.open(tmp_path / "out") as f:
        v = f["a.weight"].dequantize().astype(np.float64)
    cosine = float((w * v).sum() / np.sqrt((w.astype(np.float64) ** 2).sum() * (v**2).sum()))
    sqnr = 10 * math.log10(float((w.astype(np.float64) ** 2).sum() / ((w - v) ** 2).sum()))
    assert result["per_layer"]["a.weight"]["cosine"] == pytest.approx(cosine, abs=1e-7)
    assert result["per_layer"]["a.weight"]["sqnr_db"] == pytest.approx(sqnr, abs=1e-4)


def test_parents_are_created_and_paths_may_be_path_objects(tmp_path):
    model = write_model(tmp_path / "m")
    result = aq.ArrowQuantV2().quantize_diffusion_model(
        model_path=model, output_path=tmp_path / "a" / "b" / "out", config=None, progress_callback=None, use_arrow=None
    )
    assert result["quantized_path"] == str(tmp_path / "a" / "b" / "out") and (tmp_path / "a/b/out/metadata.json").exists()


def test_the_module_function_gives_the_same(tmp_path):
    model = write_model(tmp_path / "m")
    a, b = quantize(model, tmp_path / "a"), aq.quantize_diffusion_model(str(model), str(tmp_path / "b"))
    assert a["per_layer"] == b["per_layer"] and tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_what_a_run_writes_does_not_depend_on_what_the_object_did_before(tmp_path):
    model = write_model(tmp_path / "m")
    fresh = quantize(model, tmp_path / "fresh")
    used = aq.ArrowQuantV2()
    used.quantize_diffusion_model(model, tmp_path / "other", aq.DiffusionQuantConfig(bit_width=8))
    again = used.quantize_diffusion_model(model, tmp_path / "again")
    assert again["per_layer"] == fresh["per_layer"] and tree_bytes(tmp_path / "again") == tree_bytes(tmp_path / "fresh")


def test_threads_and_simd_change_no_byte(tmp_path):
    model = write_model(tmp_path / "m", n_layers=5, rows=96, cols=333)
    trees = []
    for i, (threads, simd) in enumerate([(1, True), (2, True), (7, True), (3, False)]):
        config = aq.DiffusionQuantConfig(num_threads=threads, enable_simd=simd)
        quantize(model, tmp_path / str(i), config)
        trees.append(tree_bytes(tmp_path / str(i)))
    assert all(tree == trees[0] for tree in trees)


def test_a_run_leaves_the_configuration_and_the_source_alone(tmp_path):
    model = write_model(tmp_path / "m")
    before, config = tree_bytes(model), aq.DiffusionQuantConfig(bit_width=8)
    aq.ArrowQuantV2("base").quantize_diffusion_model(model, tmp_path / "out", config)
    assert config == aq.DiffusionQuantConfig(bit_width=8) and tree_bytes(model) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_an_existing_container_is_replaced_and_nothing_else_is(tmp_path):
    model = write_model(tmp_path / "m")
    quantize(model, tmp_path / "out", aq.DiffusionQuantConfig(bit_width=8))
    (tmp_path / "empty").mkdir()
    for out in ("out", "empty"):
        assert quantize(model, tmp_path / out)["bit_width"] == 4
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match="is no quantized model folder"):
        quantize(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_profile_target_is_a_wish_and_reported(tmp_path):
    model = write_model(tmp_path / "m")
    result = quantize(model, tmp_path / "out", aq.DiffusionQuantConfig.from_profile("local"))
    assert result["target_met"] is True
    config = aq.DiffusionQuantConfig.from_profile("local")
    config.target_model_size_mb = 0.001
    with pytest.raises(aq.BudgetError, match="the smallest size") as caught:
        quantize(model, tmp_path / "small", config)
    assert caught.value.minimum > 1048
    assert not (tmp_path / "small").exists()


def test_from_safetensors_takes_a_file_an_index_and_a_folder(tmp_path):
    model = write_model(tmp_path / "m")
    a = aq.ArrowQuantV2()
    config = aq.DiffusionQuantConfig(modality="image")
    results = [a.quantize_from_safetensors(path, tmp_path / f"out{i}", config) for i, path in enumerate([model / "model.safetensors", model])]
    assert set(results[0]) == RESULT_KEYS and results[0]["per_layer"] == results[1]["per_layer"]


def test_markov_metrics_are_none_before_a_time_aware_run():
    assert aq.ArrowQuantV2().get_markov_metrics() is None


# ---- fallback ----


def hard_model(folder):
    """One layer that 2 bits cannot carry, and one that they can."""
    rng = np.random.default_rng(1)
    hard = rng.standard_normal((64, 256)).astype(np.float32)
    easy = np.sign(rng.standard_normal((64, 256))).astype(np.float32)
    return write_model(folder, {"easy.weight": easy, "hard.weight": hard})


def test_a_layer_below_the_floor_goes_up_the_ladder_and_is_counted(tmp_path, caplog):
    config = aq.DiffusionQuantConfig(bit_width=2, min_accuracy=0.985)
    with caplog.at_level(logging.WARNING, "arrow_quant_v2"):
        result = quantize(hard_model(tmp_path / "m"), tmp_path / "out", config)
    hard, easy = result["per_layer"]["hard.weight"], result["per_layer"]["easy.weight"]
    assert (easy["bits"], easy["fallback_from"]) == (2, None) and hard["bits"] == 4 and hard["cosine"] >= 0.985
    assert hard["fallback_from"].startswith("int2: cosine 0.") and result["fallbacks"] == {"int4": 1}
    assert any("hard.weight" in r.getMessage() and r.name == "arrow_quant_v2" for r in caplog.records)
    with aq.open(tmp_path / "out") as f:
        assert f["hard.weight"].bits == 4


def test_beyond_the_ladder_a_layer_keeps_its_type(tmp_path):
    config = aq.DiffusionQuantConfig(bit_width=8, min_accuracy=1.0)
    result = quantize(hard_model(tmp_path / "m"), tmp_path / "out", config)
    hard = result["per_layer"]["hard.weight"]
    assert hard["method"] == "keep" and hard["bits"] == 32 and "int8" in hard["fallback_from"] and result["fallbacks"]["keep"] >= 1
    assert hard["cosine"] is None
    with aq.open(tmp_path / "out") as f:
        assert not f["hard.weight"].quantized


def test_fail_fast_raises_validation_error_with_the_numbers(tmp_path):
    config = aq.DiffusionQuantConfig(bit_width=2, min_accuracy=0.985, fail_fast=True)
    with pytest.raises(aq.ValidationError, match=r"hard\.weight.*cosine similarity 0\.\d+ at 2 bits is below the floor 0\.985") as e:
        quantize(hard_model(tmp_path / "m"), tmp_path / "out", config)
    assert e.value.tensor == "hard.weight" and e.value.code == 4 and not (tmp_path / "out").exists()


# ---- errors ----


@pytest.mark.parametrize("method", ["quantize_diffusion_model", "quantize_diffusion_model_arrow", "quantize_from_safetensors"])
@pytest.mark.parametrize("kind", ["missing", "empty folder", "dangling link"])
def test_a_missing_or_empty_model_is_not_found(tmp_path, method, kind):
    path = tmp_path / "model"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(aq.ModelNotFoundError) as e:
        getattr(aq.ArrowQuantV2(), method)(path, tmp_path / "out")
    assert str(e.value).startswith(f"Model not found: {path}") and isinstance(e.value, FileNotFoundError) and e.value.file == str(path)
    assert (e.value.errno, e.value.filename) == (errno.ENOENT, str(path)) and "Errno" not in str(e.value)
    again = pickle.loads(pickle.dumps(e.value))
    assert (str(again), again.errno, again.filename, again.hint) == (str(e.value), errno.ENOENT, str(path), e.value.hint)


def test_an_empty_path_is_not_found_and_a_wrong_type_is_a_type_error(tmp_path):
    with pytest.raises(aq.ModelNotFoundError, match=r"Model not found: 'a\\x1b\[31mb'"):
        aq.quantize("a\x1b[31mb", tmp_path / "x")
    with pytest.raises(aq.ModelNotFoundError, match="Model not found: ''"):
        quantize("", tmp_path / "out")
    with pytest.raises(TypeError):
        quantize(17, tmp_path / "out")
    with pytest.raises(TypeError, match="config must be a DiffusionQuantConfig or None, not dict"):
        quantize(SAMPLE, tmp_path / "out", {"bit_width": 4})
    with pytest.raises(TypeError, match="progress_callback must be callable or None, not int"):
        quantize(SAMPLE, tmp_path / "out", progress_callback=3)


def test_validate_quality_names_the_missing_path(tmp_path, sample):
    a = aq.ArrowQuantV2()
    for pair in [(tmp_path / "nowhere", sample[1]), (SAMPLE, tmp_path / "nowhere")]:
        with pytest.raises(aq.ModelNotFoundError, match=f"Model not found: {tmp_path}/nowhere"):
            a.validate_quality(*pair)


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("bit_width", 3, "Invalid bit width: 3. Must be 2, 4, or 8"),
        ("group_size", 17, "Invalid group size: 17. Must be 32, 64, 128, or 256"),
        ("num_time_groups", 0, "Invalid number of time groups: 0. Must be between 1 and 100"),
        ("min_accuracy", 1.5, "Invalid accuracy threshold: 1.5. Must be between 0.0 and 1.0"),
    ],
)
def test_an_invalid_configuration_stops_a_run_at_its_start(tmp_path, field, value, text):
    with pytest.raises(aq.ConfigurationError) as e:
        quantize(SAMPLE, tmp_path / "out", aq.DiffusionQuantConfig(**{field: value}))
    assert str(e.value).startswith(text) and not (tmp_path / "out").exists()


def metadata_error(model, out, **kwargs):
    with pytest.raises(aq.MetadataError) as e:
        quantize(model, out, **kwargs)
    text = str(e.value)
    assert "metadata" in text and all(f"'{word}'" in text for word in ("text", "code", "image", "audio"))
    return text


def test_a_model_without_metadata_is_a_metadata_error(tmp_path):
    model = write_model(tmp_path / "m", modality=None)
    assert str(model) in metadata_error(model, tmp_path / "out")
    assert quantize(model, tmp_path / "given", aq.DiffusionQuantConfig(modality="audio"))["modality"] == "audio"
    base = aq.ArrowQuantV2("base").quantize_diffusion_model(model, tmp_path / "base")
    assert base["modality"] == "unknown"


@pytest.mark.parametrize("content", ['{"modality": "video"}', '{"modality": 3}', "{broken", "[]"])
def test_unreadable_metadata_or_an_unknown_modality_is_a_metadata_error(tmp_path, content):
    model = write_model(tmp_path / "m")
    (model / "metadata.json").write_text(content)
    assert "metadata.json" in metadata_error(model, tmp_path / "out")


def test_a_damaged_model_file_is_a_quantization_error_that_names_file_and_place(tmp_path):
    model = write_model(tmp_path / "m")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(aq.QuantizationError, match="model.safetensors") as e:
        quantize(model, tmp_path / "out")
    assert isinstance(e.value, aq.FormatError) and e.value.file == str(path) and e.value.code == 3
    assert not (tmp_path / "out").exists()


def test_a_model_of_pickles_is_refused_with_the_reason(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.ckpt").write_bytes(b"\x80\x04N.")
    with pytest.raises(aq.QuantizationError, match="pickle"):
        quantize(tmp_path / "m", tmp_path / "out", aq.DiffusionQuantConfig(modality="image"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_failing_layer_is_named(tmp_path, value):
    w = np.ones((64, 256), np.float32)
    w[3, 7] = value
    model = write_model(tmp_path / "m", {"good.weight": np.ones((64, 256), np.float32), "bad.weight": w})
    with pytest.raises(aq.QuantizationError) as e:
        quantize(model, tmp_path / "out")
    assert str(e.value).startswith("Quantization failed for layer 'bad.weight': ") and f"index {3 * 256 + 7}" in str(e.value)
    assert e.value.tensor == "bad.weight" and not (tmp_path / "out").exists()


def test_the_source_is_never_the_output(tmp_path):
    model = write_model(tmp_path / "m")
    before = tree_bytes(model)
    with pytest.raises(aq.ConfigurationError, match="the source model"):
        quantize(model, model)
    assert tree_bytes(model) == before


# ---- validation ----


def test_validation_measures_the_written_container(sample):
    result, out = sample
    v = aq.ArrowQuantV2().validate_quality(SAMPLE, out)
    assert set(v) == {"cosine_similarity", "compression_ratio", "model_size_mb", "per_layer_accuracy", "passed", "problems"}
    assert v["passed"] is True and v["problems"] == [] and v["model_size_mb"] == result["model_size_mb"]
    assert v["cosine_similarity"] == pytest.approx(result["cosine_similarity"], abs=1e-9)
    assert v["compression_ratio"] == pytest.approx(result["compression_ratio"])
    assert {n: pytest.approx(layer["cosine"], abs=1e-9) for n, layer in result["per_layer"].items()} == v["per_layer_accuracy"]


def test_a_missing_layer_another_shape_and_other_values_do_not_pass(tmp_path):
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal((64, 128)).astype(np.float32) for _ in range(3))
    model = write_model(tmp_path / "m", {"a.weight": a, "b.weight": b, "c.weight": c})
    quantize(model, tmp_path / "out")
    other = write_model(tmp_path / "other", {"a.weight": a, "b.weight": -b, "c.weight": c.reshape(128, 64), "d.weight": a})
    v = aq.ArrowQuantV2().validate_quality(other, tmp_path / "out")
    assert v["passed"] is False and len(v["problems"]) == 3
    assert all(any(f'"{name}.weight"' in p for p in v["problems"]) for name in "bcd")
    assert v["per_layer_accuracy"]["b.weight"] < 0 and "c.weight" not in v["per_layer_accuracy"]


def test_a_flipped_bit_does_not_pass(tmp_path):
    model = write_model(tmp_path / "m")
    quantize(model, tmp_path / "out")
    with aq.open(tmp_path / "out") as f:
        codes = bytes(f["blocks.1.linear.weight"].codes.reshape(-1)[:64])
    (path,) = (tmp_path / "out").glob("*.parquet")
    data = bytearray(path.read_bytes())
    data[data.index(codes) + 5] ^= 0x10
    path.write_bytes(data)
    v = aq.ArrowQuantV2().validate_quality(model, tmp_path / "out")
    assert v["passed"] is False and any("blocks.1.linear.weight" in p for p in v["problems"])


def test_the_stored_configuration_gives_the_threshold(tmp_path):
    model = write_model(tmp_path / "m")
    quantize(model, tmp_path / "low", aq.DiffusionQuantConfig(bit_width=2, min_accuracy=0.5))
    assert aq.ArrowQuantV2().validate_quality(model, tmp_path / "low")["passed"] is True
    report = aq.verify(tmp_path / "low", model, min_accuracy=0.999)
    assert report["ok"] is False and len(report["problems"]) == 3


# ---- progress ----


def test_progress_begins_ends_and_never_falls(tmp_path):
    model = write_model(tmp_path / "m", n_layers=40, rows=512, cols=512)
    calls = []
    quantize(model, tmp_path / "out", progress_callback=lambda message, fraction: calls.append((message, fraction, threading.current_thread())))
    assert calls[0][:2] == ("Starting quantization...", 0.0) and calls[-1][:2] == ("Quantization complete", 1.0)
    fractions = [fraction for _, fraction, _ in calls]
    assert fractions == sorted(fractions) and all(0 <= f <= 1 for f in fractions) and all(type(m) is str and type(f) is float for m, f, _ in calls)
    assert all(thread is threading.current_thread() for *_, thread in calls)


def test_the_first_call_comes_before_the_paths_are_looked_at(tmp_path):
    for method, message in [("quantize_diffusion_model", "Starting quantization..."), ("quantize_from_safetensors", "Starting SafeTensors quantization...")]:
        calls = []
        with pytest.raises(aq.ModelNotFoundError):
            getattr(aq.ArrowQuantV2(), method)(tmp_path / "nowhere", tmp_path / "out", progress_callback=lambda *call, calls=calls: calls.append(call))
        assert calls == [(message, 0.0)]


def test_progress_is_told_at_most_ten_times_a_second(monkeypatch):
    from arrow_quant_v2 import _progress

    now = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    calls = []
    tick = _progress.Callback(lambda message, fraction: calls.append(fraction))
    for i in range(1000):  # a layer every 10 ms
        assert tick("quantize", f"layer{i}", i + 1, 1000, 0, 0, (i + 1) / 1001, 0.0, None, None) is True
        now[0] += 0.01
    assert 95 <= len(calls) <= 101
    now[0] += 1
    tick("quantize", None, 1000, 1000, 0, 0, 0.9, 0.0, None, None)
    calls.clear()
    for _ in range(1000):  # no layer is finished any more
        tick("verify", None, 1000, 1000, 0, 0, 0.999, 0.0, None, None)
        now[0] += 0.01
    assert calls == []


def test_an_exception_in_the_callback_is_a_warning_and_changes_nothing(tmp_path):
    model = write_model(tmp_path / "m")

    def bad(message, fraction):
        raise RuntimeError("no thanks")

    with pytest.warns(RuntimeWarning, match="no thanks"):
        a = quantize(model, tmp_path / "a", progress_callback=bad)
    b = quantize(model, tmp_path / "b")
    assert a["per_layer"] == b["per_layer"] and tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(model, tmp_path / "c", progress_callback=bad)
    assert tree_bytes(tmp_path / "c") == tree_bytes(tmp_path / "b")


def test_keyboard_interrupt_in_the_callback_stops_and_the_same_call_continues(tmp_path):
    model = write_model(tmp_path / "m", n_layers=30, rows=512, cols=1024)
    quantize(model, tmp_path / "whole")

    def stop(message, fraction):
        if 0 < fraction < 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", progress_callback=stop)
    assert not (tmp_path / "out").exists()
    quantize(model, tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out", "whole"]


def test_an_interrupted_run_of_other_settings_is_discarded_and_never_mixed(tmp_path, caplog):
    model = write_model(tmp_path / "m", n_layers=30, rows=512, cols=1024)
    with pytest.raises(aq.Interrupted):
        aq.quantize(model, tmp_path / "out", bits=2, min_accuracy=0.1, progress=lambda p: p.stage != "verify")
    with pytest.raises(aq.ConfigurationError) as e:
        aq.quantize(model, tmp_path / "out", bits=8)
    assert "restart=True" in e.value.hint and "--" not in str(e.value)
    with caplog.at_level(logging.WARNING, "arrow_quant_v2"):
        quantize(model, tmp_path / "out", aq.DiffusionQuantConfig(bit_width=8))
    assert any("starts anew" in r.getMessage() for r in caplog.records)
    aq.quantize(model, tmp_path / "fresh", bits=8)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "fresh") and sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "m", "out"]


# ---- concurrency ----


def test_calls_from_eight_threads_at_once_agree_with_one(tmp_path):
    model = write_model(tmp_path / "m")
    quantizer, results = aq.ArrowQuantV2(), {}

    def work(i):
        results[i] = quantizer.quantize_diffusion_model(model, tmp_path / f"out{i}")["per_layer"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    one = quantizer.quantize_diffusion_model(model, tmp_path / "one")["per_layer"]
    assert [results[i] for i in range(8)] == [one] * 8
    assert all(tree_bytes(tmp_path / f"out{i}") == tree_bytes(tmp_path / "one") for i in range(8))


def test_two_runs_on_one_output_never_mix(tmp_path):
    model = write_model(tmp_path / "m", n_layers=10, rows=256, cols=512)
    outcomes = []

    def work(bits):
        try:
            outcomes.append(quantize(model, tmp_path / "out", aq.DiffusionQuantConfig(bit_width=bits))["bit_width"])
        except (OSError, aq.ArrowQuantError) as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work, args=(bits,)) for bits in (4, 8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    bits = [o for o in outcomes if isinstance(o, int)]
    assert bits
    with aq.open(tmp_path / "out") as f:
        assert len({t.bits for t in f.values()}) == 1


# ---- Arrow ----


@pytest.mark.parametrize(
    "bits, fields",
    [
        (4, {}),
        (8, {"group_size": 64}),
        (2, {}),
        (2, {"params": "f16", "group_size": 256}),
        (4, {"group_size": "row"}),
        (2, {"params": "two-level", "min_accuracy": 0.985}),
    ],
)
@pytest.mark.parametrize("method", ["quantize_diffusion_model", "quantize_diffusion_model_arrow"])
def test_an_arrow_layer_holds_what_was_really_written(tmp_path, method, bits, fields):
    config = aq.DiffusionQuantConfig(bit_width=bits, min_accuracy=0.1)
    for name, value in fields.items():
        setattr(config, name, value)
    kwargs = {"use_arrow": True} if method == "quantize_diffusion_model" else {}
    layer = getattr(aq.ArrowQuantV2(), method)(hard_model(tmp_path / "m"), tmp_path / "out", config, **kwargs)
    assert type(layer) is aq.PyArrowQuantizedLayer and layer.layers == ["easy.weight", "hard.weight"] and len(layer) == 2 * 64 * 256
    with aq.open(tmp_path / "out") as f:
        for name, t in f.items():
            assert np.array_equal(layer.dequantize(name, as_numpy=True), t.dequantize())
            row = layer.to_pyarrow().to_pydict()
            at = row["layer_name"].index(name)
            assert row["quantized_data"][at] == bytes(t.codes) and row["bit_width"][at] == t.bits and row["shape"][at] == [64, 256]
        everything = np.concatenate([t.dequantize().reshape(-1) for t in f.values()])
    assert np.array_equal(layer.dequantize_group(0, as_numpy=True), everything)
    assert layer.get_time_group_params() == []


def test_an_arrow_layer_takes_widths_that_do_not_divide_each_other(tmp_path):
    """Groups of 96 beside groups of 64, as another writer may choose them: the result has groups of 32, and the same values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(5)
    weights = {"a.weight": rng.normal(size=(32, 192)).astype(np.float32), "b.weight": rng.normal(size=(32, 192)).astype(np.float32)}
    config = aq.DiffusionQuantConfig(bit_width=4, min_accuracy=0.0)
    config.params, config.group_size = "f32", 64
    quantize(write_model(tmp_path / "m", weights), tmp_path / "out", config)
    (source,) = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(source)
    rows = table.to_pylist()
    wide = aq.quantize_array(weights["b.weight"], 4, 96)
    for row in rows:
        if row["layer_name"] == "b.weight":
            row.update(group_size=96, data=wide["quantized_data"], scales=wide["scales"], zero_points=wide["zero_points"])
    (tmp_path / "mixed").mkdir()
    mixed = pa.Table.from_pylist(rows, schema=table.schema).drop_columns(["hash"])
    pq.write_table(mixed, tmp_path / "mixed" / source.name)
    from arrow_quant_v2 import _core

    layer = _core.Container(str(tmp_path / "mixed")).arrow()
    with aq.open(tmp_path / "mixed") as f:
        assert [t.group_size for t in f.values()] == [64, 96]
        for name, t in f.items():
            assert np.array_equal(layer.dequantize(name, as_numpy=True), t.dequantize())
    assert np.array_equal(layer.dequantize("b.weight", as_numpy=True), aq.dequantize(wide))


def test_a_container_without_quantized_layers_is_an_empty_arrow_layer(tmp_path):
    model = write_model(tmp_path / "m", {"bias": np.zeros(8, np.float32)})
    layer = quantize(model, tmp_path / "out", use_arrow=True)
    assert layer.layers == [] and len(layer) == 0 and layer.to_pyarrow().num_rows == 0


def test_kept_tensors_and_names_of_any_kind_survive(tmp_path):
    odd = {"ünï/cödé \u202e.weight": np.ones((64, 128), np.float32), "counter": np.arange(5), "b.bias": np.zeros(7, np.float32)}
    model = write_model(tmp_path / "m", odd)
    quantize(model, tmp_path / "out")
    with aq.open(tmp_path / "out") as f:
        assert set(f.keys()) == set(odd)
        assert np.array_equal(f["ünï/cödé \u202e.weight"].dequantize(), odd["ünï/cödé \u202e.weight"])
    assert write_safetensors(tmp_path / "x.safetensors", odd).exists()
