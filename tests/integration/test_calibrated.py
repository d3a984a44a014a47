"""`quantize --calib` and `--plan`: the options reach the run, the report tells what was used."""

import json

import pytest
from conftest import ROOT, floats, write_safetensors

BLOCKS = ROOT / "tests/fixtures/calibration/blocks.aqcal"  # three layers of 128 inputs, 20 rows at timestep 750, synthetic, no second moments
NAMES = [f"blocks.{i}.attn.to_q.weight" for i in range(3)]


@pytest.fixture
def model(tmp_path):
    return write_safetensors(tmp_path / "model.safetensors", {name: ("F32", [96, 128], floats(96 * 128)) for name in NAMES})


def test_calibration_is_used_and_told(cli, model, tmp_path):
    done = cli("quantize", model, "-o", tmp_path / "out", "--modality", "image", "--calib", BLOCKS, "--act-bits", "8", "--min-accuracy", "0", "--json")
    assert done.code == 0, done.err
    assert done.json["summary"]["calibrated"] is True
    assert done.json["calibration"]["synthetic"] is True
    assert done.json["config"]["act_bits"] == 8
    assert all(layer["time_groups"] == 1 for layer in done.json["layers"])  # nothing was seen in the other one
    assert any("synthetic" in warning for warning in done.json["warnings"])
    plain = cli("quantize", model, "-o", tmp_path / "plain", "--modality", "image", "--json")
    assert plain.json["summary"]["calibrated"] is False
    assert plain.json["calibration"] is None


def test_synthetic_statistics_are_labelled_in_every_report(cli, model, tmp_path):
    """In the run's report, its page, a later page that is not given the statistics, the container, the plan and what is printed of it."""
    out = tmp_path / "out"
    done = cli("quantize", model, "-o", out, "--modality", "image", "--calib", BLOCKS, "--min-accuracy", "0", "--report", tmp_path / "now.html", "--json")
    assert done.code == 0, done.err
    assert done.json["calibration"]["synthetic"] is True and json.loads((out / "metadata.json").read_text())["calibration"]["synthetic"] is True
    assert cli("report", out, "-o", "later.html").code == 0
    assert cli("report", out, "--against", model, "--calib", BLOCKS, "-o", "measured.html").code == 0
    for page in ("now.html", "later.html", "measured.html"):
        assert "statistics of <strong>synthetic</strong> inputs" in (tmp_path / page).read_text(), page
    assert "on <strong>synthetic</strong> calibration data" in (tmp_path / "measured.html").read_text()
    arguments = ("plan", model, "--modality", "image", "--calib", BLOCKS, "--target-bpw", "5", "--min-accuracy", "0")
    printed = cli(*arguments)
    assert printed.code == 0, printed.err
    assert "of SYNTHETIC inputs" in printed.out and "calibration: the statistics are synthetic" in printed.err
    assert cli(*arguments, "--json").json["summary"]["calibration"]["synthetic"] is True

    plain = tmp_path / "plain"
    assert cli("quantize", model, "-o", plain, "--modality", "image", "--report", tmp_path / "plain.html").code == 0
    assert "<strong>synthetic" not in (tmp_path / "plain.html").read_text()
    assert "SYNTHETIC" not in cli("plan", model, "--modality", "image", "--target-bpw", "5", "--min-accuracy", "0").out


def test_CA01_calibration_of_another_model_is_exit_3(cli, tmp_path):
    other = write_safetensors(tmp_path / "other.safetensors", {NAMES[0]: ("F32", [64, 64], floats(64 * 64))})
    done = cli("quantize", other, "--modality", "image", "--calib", BLOCKS)
    assert done.code == 3
    assert NAMES[0] in done.err
    assert cli("quantize", other, "--modality", "image", "--calib", tmp_path / "missing.aqcal").code == 6


def test_a_plan_file_is_carried_out(cli, model, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": {NAMES[0]: {"bits": 8, "group_size": 32, "method": "rtn"}, NAMES[1]: {"bits": 16}}}))
    done = cli("quantize", model, "-o", tmp_path / "out", "--modality", "image", "--plan", plan, "--json")
    assert done.code == 0, done.err
    layers = {layer["name"]: layer for layer in done.json["layers"]}
    assert (layers[NAMES[0]]["bits"], layers[NAMES[0]]["group_size"], layers[NAMES[0]]["method"]) == (8, 32, "rtn")
    assert layers[NAMES[2]]["bits"] == 4
    assert [kept["name"] for kept in done.json["kept"]] == [NAMES[1]]
    plan.write_text(json.dumps({"layers": {"elsewhere": {"bits": 8}}}))
    refused = cli("quantize", model, "-o", tmp_path / "no", "--modality", "image", "--plan", plan)
    assert refused.code == 2
    assert "elsewhere" in refused.err


def test_the_line_of_a_layer_names_the_method(cli, model, tmp_path):
    done = cli("quantize", model, "-o", tmp_path / "out", "--modality", "image", "--method", "gptq", "-v")
    assert done.code == 0
    assert "int4 g128 search" in done.err  # without calibration gptq is the search
