"""`arrowquant calib`: what it shows is what the file holds, merging adds, another model is refused by name, synthetic data say that they are."""

import json
import shutil
import struct

import pytest
from conftest import ROOT, floats, write_safetensors

FIXTURES = ROOT / "tests/fixtures/calibration"
BLOCKS = FIXTURES / "blocks.aqcal"  # three layers of 128 inputs, 20 rows at timestep 750, synthetic
SMALL = FIXTURES / "small.aqcal"  # four layers with second moments, one of them shared, one never seen
SAMPLE = ROOT / "examples/dit-fashion"


def test_show_tells_what_was_recorded(cli):
    shown = cli("calib", "show", BLOCKS)
    assert shown.code == 0
    assert "SYNTHETIC" in shown.out
    assert "blocks.2.attn.to_q.weight" in shown.out
    assert "1000 timesteps in 2 groups" in shown.out
    assert "the statistics are synthetic" in shown.err
    detailed = cli("calib", "show", BLOCKS, "-v")
    assert "timesteps 500 to 1000" in detailed.out
    assert "timesteps 0 to 500" not in detailed.out  # nothing was seen there


def test_show_as_json(cli):
    report = cli("calib", "show", SMALL, BLOCKS, "--json").json
    assert report["schema"] == "arrowquant.calib.show/1"
    small, blocks = report["files"]
    layers = {layer["name"]: layer for layer in small["layers"]}
    assert layers["blocks.0.attn.to_k.weight"]["same_input_as"] == "blocks.0.attn.to_q.weight"
    assert layers["blocks.0.attn.to_k.weight"]["gradient"] is True
    assert layers["blocks.0.attn.to_q.weight"]["count"] == 60
    assert layers["blocks.0.attn.to_q.weight"]["hessian_count"] == 60
    assert layers["never.weight"]["count"] == 0
    assert layers["never.weight"]["min"] is None
    assert [g["count"] for g in layers["wide.weight"]["groups"]] == [40, 10, 10]
    assert small["data_name"] == "fashion é"
    assert small["synthetic"] is False
    assert blocks["synthetic"] is True
    assert len(blocks["fingerprint"]) == 64
    assert any("saw no input" in w for w in small["warnings"])


def test_merge_adds(cli, tmp_path):
    assert cli("calib", "merge", BLOCKS, BLOCKS, "-o", tmp_path / "both.aqcal").code == 0
    once, twice = cli("calib", "show", BLOCKS, tmp_path / "both.aqcal", "--json").json["files"]
    for a, b in zip(once["layers"], twice["layers"], strict=True):
        assert b["count"] == 2 * a["count"]
        assert (b["min"], b["max"], b["mean"]) == (a["min"], a["max"], pytest.approx(a["mean"]))
    assert twice["data_name"] == "noise"
    # In any order, and with little memory, the file is the same.
    (tmp_path / "x").mkdir()
    assert cli("calib", "merge", SMALL, tmp_path / "both.aqcal", "-o", "no.aqcal").code == 3
    assert cli("calib", "merge", SMALL, SMALL, SMALL, "-o", "a.aqcal").code == 0
    assert cli("calib", "merge", SMALL, SMALL, SMALL, "-o", "b.aqcal", "--max-memory", "20kB").code == 0
    assert (tmp_path / "a.aqcal").read_bytes() == (tmp_path / "b.aqcal").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.aqcal", "b.aqcal", "both.aqcal", "x"]


def test_merge_refuses_what_disagrees_and_keeps_what_is_there(cli, tmp_path):
    refused = cli("calib", "merge", SMALL, BLOCKS, "-o", tmp_path / "out.aqcal")
    assert refused.code == 3
    assert "the schedules differ: 100 and 1000 timesteps" in refused.err
    assert not (tmp_path / "out.aqcal").exists()
    (tmp_path / "out.aqcal").write_text("mine")
    assert cli("calib", "merge", BLOCKS, BLOCKS, "-o", tmp_path / "out.aqcal").code == 6
    assert (tmp_path / "out.aqcal").read_text() == "mine"
    assert cli("calib", "merge", BLOCKS, BLOCKS, "-o", tmp_path / "out.aqcal", "--overwrite").code == 0
    assert cli("calib", "merge", BLOCKS, BLOCKS).code == 2
    assert cli("calib", "merge", BLOCKS, "-o", "x").code == 2


def test_CA01_check_names_what_disagrees(cli, model, tmp_path):
    fits = cli("calib", "check", BLOCKS, model)
    assert fits.code == 0
    assert "not in the statistics: blocks.3.attn.to_q.weight" in fits.out
    assert cli("calib", "check", BLOCKS, model, "--json").json["missing"] == ["blocks.3.attn.to_q.weight"]
    other = write_safetensors(tmp_path / "other.safetensors", {"blocks.0.attn.to_q.weight": ("F32", [64, 64], floats(64 * 64))})
    refused = cli("calib", "check", BLOCKS, other)
    assert refused.code == 3
    assert '"blocks.0.attn.to_q.weight" has 128 inputs in the statistics and 64 in the model' in refused.err
    assert '"blocks.1.attn.to_q.weight" is no tensor of the model' in refused.err
    assert cli("calib", "check", BLOCKS, other, "--json").json["error"]["code"] == 3
    assert cli("calib", "check", BLOCKS).code == 2


def test_CA01_damaged_statistics_are_refused_with_the_reason(cli, tmp_path):
    data = bytearray(SMALL.read_bytes())
    data[2000] ^= 4
    (tmp_path / "bad.aqcal").write_bytes(data)
    refused = cli("calib", "show", tmp_path / "bad.aqcal")
    assert refused.code == 3
    assert "bad.aqcal" in refused.err
    assert "damaged" in refused.err
    (tmp_path / "cut.aqcal").write_bytes(SMALL.read_bytes()[:-10])
    assert cli("calib", "show", tmp_path / "cut.aqcal").code == 3
    assert cli("calib", "show", tmp_path / "none.aqcal").code == 6


def test_synthetic_data_follow_the_model_and_say_what_they_are(cli, tmp_path):
    made = cli("calib", "synth", SAMPLE, "-o", "a.jsonl", "--samples", "20", "--json").json
    assert made["shape"] == [1, 28, 28]
    assert made["n_timesteps"] == 1000
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert all(row["synthetic"] is True and row["shape"] == [1, 28, 28] and len(row["data"]) == 784 for row in rows)
    assert [row["timestep"] for row in rows] == [25 + 50 * i for i in range(20)]
    values = [v for row in rows for v in row["data"]]
    mean = sum(values) / len(values)
    assert abs(mean) < 0.03  # 15,680 values: 4 sigma
    assert abs(sum(v * v for v in values) / len(values) - 1) < 0.05
    assert cli("calib", "synth", SAMPLE, "-o", "b.jsonl", "--samples", "20").code == 0
    assert cli("calib", "synth", SAMPLE, "-o", "c.jsonl", "--samples", "20", "--seed", "1").code == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()


def test_synthetic_audio_is_standard_normal(cli, model, tmp_path):
    assert cli("calib", "synth", model, "-o", "audio.jsonl", "--modality", "audio", "--shape", "2,500", "--samples", "40").code == 0
    rows = [json.loads(line) for line in (tmp_path / "audio.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and all(row["synthetic"] is True and row["shape"] == [2, 500] for row in rows)
    values = [v for row in rows for v in row["data"]]
    assert abs(sum(values) / len(values)) < 0.02  # 40,000 values: 4 sigma
    assert abs(sum(v * v for v in values) / len(values) - 1) < 0.03


def test_synthetic_text_is_masked_more_and_more(cli, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mdlm", "vocab_size": 50, "seq_len": 200, "mask_id": 7}))
    (folder / "metadata.json").write_text(json.dumps({"modality": "text"}))
    write_safetensors(folder / "model.safetensors", {"blocks.0.fc.weight": ("F32", [64, 128], floats(64 * 128))})
    assert cli("calib", "synth", folder, "-o", "t.jsonl", "--samples", "10").code == 0
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    parts = [sum(token == 7 for token in row["data"]) / 200 for row in rows]
    assert all(abs(part - (i + 0.5) / 10) < 0.15 for i, part in enumerate(parts))
    assert {token for row in rows for token in row["data"]} == set(range(50))


def test_synthetic_data_need_a_shape_when_the_model_does_not_tell(cli, model, tmp_path):
    refused = cli("calib", "synth", model, "-o", "x.jsonl")
    assert refused.code == 2
    assert "--shape" in refused.err
    assert cli("calib", "synth", model, "-o", "x.jsonl", "--shape", "2,3", "--samples", "2").code == 0
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])["shape"] == [2, 3]
    assert cli("calib", "synth", model, "-o", "y.jsonl", "--shape", "2,x").code == 2
    assert cli("calib", "synth", model).code == 2


def test_actions_are_named(cli):
    wrong = cli("calib", "sohw", BLOCKS)
    assert wrong.code == 2
    assert "must be show, merge, check, import or synth" in wrong.err
    assert cli("calib").code == 2
    assert "synth MODEL" in cli("help", "calib").out


def test_the_file_is_not_changed_by_looking(cli, tmp_path):
    copy = shutil.copy(SMALL, tmp_path / "copy.aqcal")
    before = copy.read_bytes()
    assert cli("calib", "show", copy, "-v").code == 0
    assert copy.read_bytes() == before


def importance_matrix(path, layers):
    """The legacy form: entries of name, calls, and mean square times calls."""
    out = struct.pack("<i", len(layers))
    for name, (calls, values) in layers.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    path.write_bytes(out + struct.pack("<ii", 10, 5) + b"a.txt")
    return path


def test_importance_matrices_are_imported_where_names_match(cli, model, tmp_path):
    good = {f"blocks.{i}.attn.to_q.weight": (4, [4.0 * (j + 1) for j in range(128)]) for i in range(2)}
    matrix = importance_matrix(tmp_path / "imatrix.dat", {**good, "blk.0.attn_q.weight": (4, [1.0] * 8), "blocks.2.attn.to_q.weight": (4, [1.0] * 64)})
    made = cli("calib", "import", matrix, model, "-o", "out.aqcal", "--json").json
    assert made["n_layers"] == 2
    assert made["skipped"] == ["blk.0.attn_q.weight", "blocks.2.attn.to_q.weight"]
    shown = cli("calib", "show", "out.aqcal", "--json").json["files"][0]
    assert shown["diagonal_only"] is True
    assert [layer["min"] for layer in shown["layers"]] == [None, None]  # no ranges are made up
    assert cli("calib", "check", "out.aqcal", model).code == 0
    assert cli("calib", "merge", "out.aqcal", "out.aqcal", "-o", "two.aqcal").code == 0
    assert cli("calib", "merge", "out.aqcal", BLOCKS, "-o", "no.aqcal").code == 3
    assert cli("quantize", model, "-o", "q", "--calib", "out.aqcal", "--bits", "4").code == 0


def test_damaged_importance_matrices_are_refused(cli, model, tmp_path):
    whole = importance_matrix(tmp_path / "imatrix.dat", {"blocks.0.attn.to_q.weight": (4, [1.0] * 128)}).read_bytes()
    for n in (0, 3, 10, 40, 200, 500):
        (tmp_path / "cut.dat").write_bytes(whole[:n])
        assert cli("calib", "import", "cut.dat", model, "-o", "x.aqcal").code == 3
    importance_matrix(tmp_path / "nan.dat", {"blocks.0.attn.to_q.weight": (4, [float("nan")] * 128)})
    assert "not finite" in cli("calib", "import", "nan.dat", model, "-o", "x.aqcal").err
    importance_matrix(tmp_path / "other.dat", {"a": (4, [1.0])})
    assert "nothing in it" in cli("calib", "import", "other.dat", model, "-o", "x.aqcal").err
    assert not (tmp_path / "x.aqcal").exists()


def test_importance_matrices_in_gguf(cli, model, tmp_path):
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    squares = np.arange(1, 129, dtype=np.float32)
    for i, experts in ((0, 1), (1, 2)):
        writer.add_tensor(f"blocks.{i}.attn.to_q.weight.in_sum2", np.tile(50 * squares, (experts, 1)))
        writer.add_tensor(f"blocks.{i}.attn.to_q.weight.counts", np.full((experts, 1), 50, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = cli("calib", "import", "imatrix.gguf", model, "-o", "out.aqcal", "--json")
    assert made.code == 0, made.err
    assert made.json["n_layers"] == 2
    parquet = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out.aqcal").to_pylist()
    assert [row["count"] for row in parquet] == [50, 100]
    for row in parquet:
        assert np.array_equal(np.array(row["sum_sq"]) / row["count"], squares)
        assert row["sum"] is None
        assert row["absmax"] is None


def test_CA02_weak_statistics_are_warned_of_and_what_they_lack_falls_back(cli, model, tmp_path):
    """Synthetic, a time group and a layer without rows, fewer rows than inputs: the run goes on and says so."""
    report = cli("quantize", model, "-o", "q", "--calib", BLOCKS, "--json").json
    warnings = " / ".join(report["warnings"])
    for said in ("synthetic", "time groups without rows", "fewer rows than they have inputs", "lacks 1 of 4 layers"):
        assert said in warnings
    other = write_safetensors(
        tmp_path / "never.safetensors",
        {
            "never.weight": ("F32", [4096, 5], floats(4096 * 5)),
            "blocks.0.attn.to_q.weight": ("F32", [64, 37], floats(64 * 37)),
            "blocks.0.attn.to_k.weight": ("F32", [64, 37], floats(64 * 37)),
            "wide.weight": ("F32", [600, 9], floats(5400)),
        },
        {"modality": "image"},
    )
    run = cli("quantize", other, "-o", "q2", "--calib", SMALL, "--include", "*", "--json")
    assert run.code == 0, run.out
    assert any("lacks" in w and "never.weight" in w for w in run.json["warnings"])
