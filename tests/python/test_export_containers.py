"""Exports of containers whose codes are not one plain grid: R2Q, mixed widths, two-level parameters, time groups.

Given such a container, when it is exported to each format with codes, then the file, read by the `gguf` package or undone by the format's definition in NumPy,
differs from the container's weights, which are computed here from the stored codes, by just the error that the export stated; and the codes themselves come
back where the grids agree.
"""

import arrow_quant_v2 as aq
import numpy as np
import pytest
from layouts import undo_comfy, undo_gptq
from program import arrowquant, sqnr_db

gguf = pytest.importorskip("gguf")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
pq = pytest.importorskip("pyarrow.parquet")

CONTAINERS = {
    "r2q": ["--bits", 2, "--method", "r2q", "--group", 64],
    "mixed": ["--bits", 4, "--sym", "--group", 64, "--params", "f16", "--layer", "*ff*=bits:8", "--layer", "*to_k*=bits:2"],
    "two-level": ["--bits", 4, "--params", "two-level", "--group", 256, "--layer", "*ff*=bits:2"],
    "timed": ["--bits", 8, "--sym", "--group", 64, "--params", "f16", "--method", "search", "--act-bits", 8, "--no-spatial"],
}
LAYERS = ["blocks.0.attn.to_q", "blocks.0.attn.to_k", "blocks.0.ff"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(8)
    tensors = {f"{layer}.weight": (rng.standard_t(5, (64, 512)) * 0.05).astype(np.float32) for layer in LAYERS}
    folder = tmp_path_factory.mktemp("containers") / "m"
    folder.mkdir()
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    statistics = aq.Calibration(num_timesteps=1000, groups=2, data_name="noise")
    for layer in LAYERS:
        statistics.add_layer(f"{layer}.weight", 512)
        for timestep in (10, 900):
            statistics.update(f"{layer}.weight", rng.standard_normal((32, 512), np.float32), np.full(32, timestep, np.int32))
    statistics.save(folder.parent / "m.aqcal")
    return folder, tensors


def quantized(model, kind):
    out = model[0].parent / kind
    if not out.exists():
        calib = ["--calib", model[0].parent / "m.aqcal"] if kind == "timed" else []
        arrowquant("quantize", model[0], "-o", out, "--modality", "image", "--min-accuracy", 0, *CONTAINERS[kind], *calib)
    return out


def unpack(data, rows, bits):
    packed = np.frombuffer(data, np.uint8).reshape(rows, -1)
    return np.stack([packed >> k & (1 << bits) - 1 for k in range(0, 8, bits)], -1).reshape(rows, -1)


def two_level_pairs(row):
    """Scale and offset of each sub-group: k S and m O, fields of p bits behind the two halves of a record (docs/format-params.md)."""
    width, p = (16, 4) if row["bit_width"] == 2 else (32, 6)
    n_sub = row["group_size"] // width
    records = np.frombuffer(row["params"], np.uint8).reshape(-1, 4 + n_sub * 2 * p // 8)
    halves = records[:, :4].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(records[:, 4:], axis=1, bitorder="little").reshape(len(records), n_sub, 2, p)
    k, m = np.moveaxis((bits * (1 << np.arange(p))).sum(-1), -1, 0)
    return halves[:, :1] * (k + 1).astype(np.float32), halves[:, 1:] * m.astype(np.float32), width


def meaning(row):
    """The weights of a container's row, from its bytes alone."""
    rows, cols = row["shape"]
    codes = unpack(row["data"], rows, row["bit_width"])[:, :cols]
    if row["quant_type"] == "r2q2":
        m, a1, a2 = np.repeat(np.frombuffer(row["params"], np.float16).astype(np.float32).reshape(rows, -1, 3), row["group_size"], 1)[:, :cols].transpose(
            2, 0, 1
        )
        return (m + np.where(codes & 2, a1, -a1)) + np.where(codes & 1, a2, -a2)
    if row["group_size"] == 256:
        s, o, width = two_level_pairs(row)
    else:
        (s, o), width = np.frombuffer(row["params"], np.float16).astype(np.float32).reshape(-1, 2).T, row["group_size"]
    s, o = (np.repeat(v.reshape(rows, -1), width, 1) for v in (s, o))
    return s * codes.astype(np.float32) + o


def read_gguf(path):
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape.tolist()[::-1]) for t in gguf.GGUFReader(path).tensors}


def exported(model, kind, target, out, *options):
    """The report, and what the file means."""
    container = quantized(model, kind)
    path = out / ("m.gguf" if target == "gguf" else "m.safetensors" if target == "comfy-int8" else "g")
    report = arrowquant("export", container, "--to", target, "-o", path, *options)
    if target == "gguf":
        return report, read_gguf(path)
    file = safetensors_numpy.load_file(path / "model.safetensors" if target == "gptq" else path)
    bits = {row["layer_name"]: row["bit_width"] for p in container.glob("*.parquet") for row in pq.read_table(p).to_pylist()}
    return report, {f"{n}.weight": undo_comfy(file, n)[0] if target == "comfy-int8" else undo_gptq(file, n, bits[f"{n}.weight"]) for n in LAYERS}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("target", ["gguf", "comfy-int8", "gptq"])
@pytest.mark.parametrize("with_source", [False, True])
def test_the_stated_error_is_that_of_the_file(model, tmp_path, kind, target, with_source):
    report, got = exported(model, kind, target, tmp_path, *(["--source", model[0]] if with_source else []))
    stored = {row["layer_name"]: row for p in quantized(model, kind).glob("*.parquet") for row in pq.read_table(p).to_pylist()}
    entries, noise, power = report["recoding"]["tensors"], 0.0, 0.0
    assert len(entries) == 3
    for entry in entries:
        name = entry["name"]
        own, file = meaning(stored[name]), got[name]
        assert 5 < sqnr_db(model[1][name], own) < 60, name  # the formulas here are those of the format
        if entry["added_sqnr_db"] is None:
            assert entry["codes_kept"] == 1 and np.array_equal(own, file.astype(np.float32)), name
        elif entry["added_sqnr_db"] > 120:  # the rounding of F32 arithmetic
            assert entry["from"] == "codes" and sqnr_db(own, file) > 120, name
        else:
            assert entry["added_sqnr_db"] == pytest.approx(sqnr_db(own, file), abs=0.01), name
        assert entry["from"] == ("codes" if entry["codes_kept"] == 1 else "source" if with_source else "dequantized")
        if with_source:
            assert entry["sqnr_db"] == pytest.approx(sqnr_db(model[1][name], file), abs=0.01), name
            assert entry["container_sqnr_db"] == pytest.approx(sqnr_db(model[1][name], own), abs=0.01), name
        noise += np.square(model[1][name].astype(np.float64) - file).sum()
        power += np.square(model[1][name].astype(np.float64)).sum()
    if with_source:
        assert report["recoding"]["sqnr_db"] == pytest.approx(10 * np.log10(power / noise), abs=0.01)
    assert any("added error" in w for w in report["warnings"]) == (report["recoding"]["n_dequantized"] > 0)
    assert any("time groups" in w for w in report["warnings"]) == (kind == "timed")


@pytest.mark.parametrize(
    ("kind", "target", "options", "n_codes"),
    [
        ("r2q", "gguf", [], 0),  # four levels that are no line
        ("mixed", "gguf", [], 2),  # a line of two bits is coded anew as Q2_K: Q4_0 would take 4.5 bits
        ("mixed", "gguf", ["--type", "q8_0"], 3),
        ("mixed", "gptq", [], 3),
        ("mixed", "gguf", ["--type", "q4_0"], 2),  # eight bits do not fit four
        ("two-level", "gguf", [], 3),  # Q4_K and Q2_K
        ("two-level", "gguf", ["--type", "q4_k"], 2),
        ("two-level", "gguf", ["--type", "q2_k"], 1),
        ("timed", "gguf", [], 3),
        ("timed", "gptq", [], 3),
    ],
)
def test_codes_are_taken_over_where_the_grids_agree(model, tmp_path, kind, target, options, n_codes):
    report, _ = exported(model, kind, target, tmp_path, *options)
    assert report["recoding"]["n_codes"] == n_codes, [(t["name"], t["stored_as"], t["type"], t["codes_kept"]) for t in report["recoding"]["tensors"]]


def test_ggml_itself_reads_the_blocks_alike(model, tmp_path):
    """The library that llama.cpp and stable-diffusion.cpp dequantize with, where one is installed: bit for bit what the gguf package says."""
    import ctypes
    import ctypes.util
    import os

    found = os.environ.get("GGML_BASE_LIBRARY") or ctypes.util.find_library("ggml-base")
    if not found:
        pytest.skip("no libggml-base; GGML_BASE_LIBRARY may name one")
    ggml = ctypes.CDLL(found)
    quantized(model, "two-level")
    for word in ("q8_0", "q4_0", "q4_1", "q4_k", "q2_k"):
        path = tmp_path / f"{word}.gguf"
        arrowquant("export", quantized(model, "two-level"), "--to", "gguf", "--type", word, "-o", path, "--source", model[0])
        dequantize = ggml[f"dequantize_row_{word.replace('k', 'K')}"]
        dequantize.argtypes, dequantize.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        for name, values in read_gguf(path).items():
            tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
            blocks, out = np.ascontiguousarray(tensor.data), np.empty(values.shape, np.float32)
            dequantize(blocks.ctypes.data, out.ctypes.data, out.size)
            assert np.array_equal(out, values), (word, name)
