"""Whole models with calibration: the settings reach the run, the result says what was used, memory stays within the limit."""

import json
import os
import struct
import subprocess

import arrow_quant_v2 as aq
import numpy as np
import pytest

PROGRAM = os.environ.get("ARROWQUANT_PROGRAM", "")
MIB = 1 << 20


def write_model(path, layers, rows, n):
    """BF16 weights with random mantissas and exponents near 2^-6."""
    size = 2 * rows * n
    names = [f"blocks.{i}.ff.weight" for i in range(layers)]
    header = {name: {"dtype": "BF16", "shape": [rows, n], "data_offsets": [i * size, (i + 1) * size]} for i, name in enumerate(names)}
    text = json.dumps(header).encode()
    random = np.random.default_rng(1)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _ in range(layers):
            bits = random.integers(0, 256, rows * n, dtype=np.uint16) | random.choice(np.array([0x3C00, 0xBC00], np.uint16), rows * n)
            f.write(bits.astype("<u2").tobytes())
    return names


def write_calibration(path, names, n):
    collection = aq.Calibration(num_timesteps=1000, groups=2, hessian=True, data_name="noise")
    x = np.random.default_rng(0).standard_normal((64, n)).astype(np.float32)
    x[:, 1:] += 0.9 * x[:, :-1]
    for name in names:
        collection.add_layer(name, n)
        for timestep in (10, 900):
            collection.update(name, x, np.full(64, timestep, np.int32))
    collection.save(path)


def test_results_tell_of_calibration(tmp_path):
    names = write_model(tmp_path / "m.safetensors", 3, 96, 128)
    write_calibration(tmp_path / "m.aqcal", names, 128)
    config = aq.DiffusionQuantConfig(modality="image", min_accuracy=0.0)
    config.calibration_path = tmp_path / "m.aqcal"
    result = aq.ArrowQuantV2().quantize_diffusion_model(tmp_path / "m.safetensors", tmp_path / "out", config)
    assert result["calibrated"] is True
    for layer in result["per_layer"].values():
        assert layer["method"] == "gptq"
        assert layer["output_sqnr_db"] > 15
        assert "search" in layer["compared_with"]
    assert aq.ArrowQuantV2().validate_quality(tmp_path / "m.safetensors", tmp_path / "out")["passed"]
    base = aq.ArrowQuantV2("base").quantize_diffusion_model(tmp_path / "m.safetensors", tmp_path / "base", config)
    assert base["calibrated"] is True  # the statistics serve the solver; no time-aware and no spatial parts
    short = aq.quantize(tmp_path / "m.safetensors", tmp_path / "short", calib=tmp_path / "m.aqcal", modality="image", method="search")
    assert short.layers[names[0]].method == "search"
    assert short.layers[names[0]].output_sqnr_db < result["per_layer"][names[0]]["output_sqnr_db"]


def test_base_stores_no_time_groups_and_no_spatial_parts(tmp_path):
    names = write_model(tmp_path / "m.safetensors", 1, 96, 128)
    write_calibration(tmp_path / "m.aqcal", names, 128)
    config = aq.DiffusionQuantConfig(modality="image", min_accuracy=0.0)
    config.calibration_path = str(tmp_path / "m.aqcal")
    for mode, groups in (("diffusion", 2), ("base", 0)):
        aq.ArrowQuantV2(mode).quantize_diffusion_model(tmp_path / "m.safetensors", tmp_path / mode, config)
        with aq.open(tmp_path / mode) as container:
            assert len(container[names[0]].time_groups or ()) == groups


def test_a_calibration_of_another_model_is_refused(tmp_path):
    write_model(tmp_path / "m.safetensors", 1, 96, 128)
    write_calibration(tmp_path / "other.aqcal", ["elsewhere.weight"], 128)
    with pytest.raises(aq.ArrowQuantError, match="elsewhere"):
        aq.quantize(tmp_path / "m.safetensors", tmp_path / "out", calib=tmp_path / "other.aqcal", modality="image")


@pytest.mark.skipif(not os.path.exists(PROGRAM), reason="ARROWQUANT_PROGRAM names no program")
def test_P7_solving_keeps_within_the_memory_limit(tmp_path):
    """Twelve layers whose second moments and factors take 2 and 7 MiB each while they are worked on: far more than the limit for all."""
    names = write_model(tmp_path / "m.safetensors", 12, 512, 768)
    write_calibration(tmp_path / "m.aqcal", names, 768)
    words = ["quantize", tmp_path / "m.safetensors", "-o", tmp_path / "out", "--modality", "image", "--calib", tmp_path / "m.aqcal", "--method", "gptq"]
    words += ["--no-spatial", "--refine-sweeps", "0", "--max-memory", "96MiB", "--threads", "2", "--json"]
    done = subprocess.run([PROGRAM, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert all(layer["method"] == "gptq" for layer in report["layers"])
    memory = report["memory"]
    assert memory["peak_rss_bytes"] <= memory["predicted_peak_bytes"]
    assert memory["peak_rss_bytes"] <= 96 * MIB + 16 * MIB  # the program itself and its libraries come on top
