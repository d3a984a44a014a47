"""No leak: every public entry, called ten thousand times, leaves resident memory and the number of objects where they were.

Entries that take a millisecond or more are called AQ_LEAK_CALLS times, 1,000 unless it is set, within a bound that is as tight for one call.
"""

import asyncio
import gc
import logging
import os
import pickle
import tempfile
from pathlib import Path

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import write_model, write_sharded

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")

CALLS, SLOW_CALLS, BYTES_A_CALL = 10_000, int(os.environ.get("AQ_LEAK_CALLS", "1000")), 420


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stays_flat(calls, n):
    """Runs each of the calls n times after a warm-up; at the end resident memory has grown by less than BYTES_A_CALL for each round. Up to three times: a leak
    grows each time, what the allocator of a large process keeps does not."""
    calls = list(calls)

    def rounds(count):
        for _ in range(count):
            for call in calls:
                call()
        gc.collect()

    rounds(300)
    for _ in range(3):
        before, objects = resident_bytes(), len(gc.get_objects())
        rounds(n)
        grown, more = resident_bytes() - before, len(gc.get_objects()) - objects
        if grown < max(BYTES_A_CALL * n, 1 << 20) and more < 500:
            return
    pytest.fail(f"{grown} bytes and {more} objects more after {n} rounds, three times")


@pytest.fixture(autouse=True)
def unheard(monkeypatch):
    """pytest keeps every log record that it hears of."""
    monkeypatch.setattr(logging.getLogger("arrow_quant_v2"), "disabled", True)


@pytest.fixture
def folder():
    """In memory, where there is such a folder: files are flushed ten thousand times."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture
def tiny(folder):
    """The smallest model whose layer is quantized, and its container."""
    write_model(folder / "m", n_layers=1, rows=64, cols=64)
    assert aq.quantize(folder / "m", folder / "q").layers
    return folder


def fails(call, kind):
    try:
        call()
    except kind:
        return
    raise AssertionError


W = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
BAD = np.full(8, np.nan, np.float32)


def test_arrays():
    q, flat, second = aq.ArrowQuantV2(), W.ravel().copy(), np.eye(8)
    time, spatial = aq.TimeAwareQuantizer(4), aq.SpatialQuantizer()
    statistics = time.statistics(W, range(8))
    params = time.compute_params_per_group(statistics)
    layer, coded = time.quantize_layer(W, params), q.quantize_batch({"w": W})
    calls = [
        lambda: aq.ArrowQuantV2("base"),
        lambda: q.quantize_batch({"w": W}, as_numpy=True),
        lambda: q.quantize_batch_with_progress({"w": W}, 4, lambda *told: None),
        lambda: q.quantize({"w": [1.0, 2.0]}),
        lambda: q.quantize_layer_auto(flat, params),
        lambda: q.dequantize(coded),
        lambda: aq.quantize_array(W.T, method="search"),
        lambda: aq.quantize_batch({"w": W}),
        lambda: aq.dequantize(coded["w"], as_numpy=False),
        lambda: (aq.rtn(W), aq.gptq(W, second), aq.r2q(W, second), aq.r2q(W), aq.hadamard(W, 4)),
        lambda: (aq.cosine_similarity(W, W), aq.sqnr_db(W, W), aq.output_sqnr_db(W, W, second)),
        lambda: (spatial.per_group_quantize(W).dequantize(), spatial.channel_equalization(W, W), spatial.activation_smoothing(W)),
        lambda: time.markov_metrics(time.smooth(time.compute_params_per_group(statistics))),
        lambda: (time.group_timesteps(10), time.statistics(W, range(8)), time.quantize_layer(W, params)),
        lambda: (aq.linear_integer(W, layer, timestep=1), aq.linear_integer(W, layer, mode="dynamic")),
        lambda: (aq.ValidationSystem().cosine_similarity_batch([W], [W]), aq.simd_level(), aq.build_info()),
        lambda: fails(lambda: q.quantize_batch({"w": W, "bad": BAD}), ValueError),
        lambda: fails(lambda: q.quantize_batch({"w": W}, 3), ValueError),
        lambda: fails(lambda: q.quantize_layer_auto(flat, [{}]), KeyError),
        lambda: fails(lambda: aq.gptq(W, np.full((8, 8), np.nan)), ValueError),
    ]
    stays_flat(calls, CALLS)


def test_arrow():
    pytest.importorskip("pyarrow")
    q, table = aq.ArrowQuantV2(), aq.numpy_to_arrow_table({"w": W})
    batch, bad = table.to_batches()[0], aq.numpy_to_arrow_table({"w": W}).rename_columns(["layer_name", "w", "shape"])

    def layer():
        one = aq.PyArrowQuantizedLayer(q.quantize_arrow(table))
        one.to_pyarrow(), one.dequantize("w"), one.dequantize_all_groups(), one.get_time_group_params(), one.layers
        return one.__arrow_c_array__(), one.__arrow_c_stream__()

    calls = [
        lambda: q.quantize_arrow_batch(batch),
        lambda: q.quantize_batch_arrow(table, 8, True),
        lambda: aq.dequantize(q.quantize_arrow(table)),
        lambda: aq.numpy_to_arrow_table({"w": W}),
        lambda: fails(lambda: q.quantize_arrow(bad), ValueError),
        lambda: fails(lambda: q.quantize_arrow(None), TypeError),
        layer,
    ]
    stays_flat(calls, CALLS)


def test_configurations(folder):
    config = aq.DiffusionQuantConfig(bit_width=8)
    config.layer_bit_widths, config.sensitive_layer_names = {"a": 2}, ["b"]
    config.to_yaml(folder / "c.yaml")
    (folder / "bad.yaml").write_text("bit_width: [")
    calls = [
        lambda: aq.DiffusionQuantConfig(bit_width=8).validate(),
        lambda: aq.DiffusionQuantConfig.from_yaml(folder / "c.yaml"),
        lambda: config.to_yaml(folder / "c.yaml"),
        lambda: aq.DiffusionQuantConfig.from_dict(config.to_dict()) == config,
        lambda: (repr(config), config.layer_bit_widths, config.sensitive_layer_names),
        lambda: pickle.loads(pickle.dumps(config)),
        lambda: aq.DiffusionQuantConfig.from_profile("edge").apply_env_overrides(),
        lambda: fails(lambda: aq.DiffusionQuantConfig.from_yaml(folder / "bad.yaml"), aq.ConfigurationError),
        lambda: fails(lambda: aq.DiffusionQuantConfig(bit_width=3).validate(), aq.ConfigurationError),
        lambda: fails(lambda: aq.DiffusionQuantConfig(bits=3), TypeError),
    ]
    stays_flat(calls, CALLS)


def test_calibration(folder):
    (folder / "rows.jsonl").write_text('{"data": [1, 2], "timestep": 1}\n' * 4)
    kept = aq.Calibration(num_timesteps=10, groups=2)
    kept.update(kept.add_layer("w", 8), W, 3)
    kept.save(folder / "c.aqcal")
    loader = aq.CalibrationLoader()

    def collect():
        c = aq.Calibration(num_timesteps=10, groups=2)
        layer = c.add_layer("w", 8)
        c.update(layer, W, np.arange(8))
        c.merge(kept)
        return c.stats(layer, 0), c.hessian(layer), c.diagonal(layer), c.timesteps(layer), c.fingerprint()

    calls = [
        collect,
        lambda: kept.save(folder / "d.aqcal", overwrite=True),
        lambda: aq.Calibration.open(folder / "c.aqcal").hessian("w"),
        lambda: fails(lambda: kept.update(0, BAD, 3), ValueError),
        lambda: fails(lambda: aq.Calibration.open(folder / "rows.jsonl"), aq.ArrowQuantError),
        lambda: list(aq.DataSet(folder / "rows.jsonl")),
        lambda: loader.load_from_file(folder / "rows.jsonl"),
        lambda: loader.generate_synthetic_data(32, 4, 10),
    ]
    stays_flat(calls, CALLS)


def test_files(tiny):
    bad = tiny / "bad.safetensors"
    bad.write_bytes(b"\xff" * 100)
    (tiny / "sharded").mkdir()
    write_sharded(tiny / "sharded", {"m.safetensors": {"a": W}})

    def read():
        with aq.open(tiny / "q") as f:
            t = f["blocks.0.linear.weight"]
            return t.codes, t.scales, t.zeros, t.dequantize(threads=1), t.time_groups

    calls = [
        read,
        lambda: aq.inspect(tiny / "m"),
        lambda: aq.load_sharded_safetensors(tiny / "sharded").get_all_tensors(),
        lambda: fails(lambda: aq.quantize(bad, tiny / "x"), aq.FormatError),
        lambda: fails(lambda: aq.quantize(tiny / "nowhere", tiny / "x"), aq.ModelNotFoundError),
        lambda: fails(lambda: aq.open(bad), aq.FormatError),
        lambda: fails(lambda: aq.quantize(tiny / "m", tiny / "q"), FileExistsError),
    ]
    stays_flat(calls, CALLS)


SLOW = {
    "a run": lambda f: aq.ArrowQuantV2().quantize_diffusion_model(f / "m", f / "out", None, lambda m, p: None),
    "a run that gives Arrow": lambda f: aq.ArrowQuantV2().quantize_diffusion_model_arrow(f / "m", f / "out"),
    "a run of the short function": lambda f: aq.quantize(f / "m", f / "out", overwrite=True, bits=2, progress=lambda p: True),
    "validate": lambda f: aq.ArrowQuantV2().validate_quality(f / "m", f / "q"),
    "verify": lambda f: aq.verify(f / "q"),
    "diff": lambda f: aq.diff(f / "q", f / "m"),
    "report": lambda f: aq.report(f / "q", f / "r.html", overwrite=True),
    "export": lambda f: aq.export(f / "q", f / "e", overwrite=True),
    "export gguf": lambda f: aq.export(f / "q", f / "e.gguf", to="gguf", overwrite=True),
    "export gptq": lambda f: aq.export(f / "q", f / "e", to="gptq", source=f / "m", overwrite=True),
    "export comfy": lambda f: aq.export(f / "q", f / "e.safetensors", to="comfy-int8", overwrite=True),
    "plan": lambda f: aq.plan(f / "m", target_bpw=5, generations=1),
    "granularity": lambda f: aq.GranularityAllocator(aq.GranularityConfig("variance")).analyze_layer_sensitivity(f / "m", "blocks.0.linear", None),
    "evolution": lambda f: aq.EvolutionarySearch(2, 1, max_evaluations=3).search(f / "m", None, None),
}


@pytest.mark.parametrize("name", SLOW)
def test_jobs(tiny, name):
    stays_flat([lambda: SLOW[name](tiny)], SLOW_CALLS)


@pytest.mark.parametrize("name", ["quantize", "models", "validate"])
def test_awaitables(tiny, name):
    q, loop = aq.AsyncArrowQuantV2(), asyncio.new_event_loop()
    calls = {
        "quantize": lambda: aq.quantize_async(tiny / "m", tiny / "out", overwrite=True),
        "models": lambda: q.quantize_multiple_models_async([(tiny / "m", tiny / "out", None)], lambda i, m, f: None),
        "validate": lambda: q.validate_quality_async(tiny / "m", tiny / "q"),
    }
    try:
        stays_flat([lambda: loop.run_until_complete(calls[name]())], SLOW_CALLS)
    finally:
        loop.close()
