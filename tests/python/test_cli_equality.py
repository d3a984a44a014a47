"""The module and the command line are one library: the same settings give the same bytes, figures and words."""

import json
import os
import subprocess

import arrow_quant_v2 as aq
import pytest
from arrow_quant_v2 import _core
from files import SAMPLE, tree_bytes, write_model

PROGRAM = os.environ.get("ARROWQUANT_PROGRAM", "")
pytestmark = pytest.mark.skipif(not os.path.exists(PROGRAM), reason="ARROWQUANT_PROGRAM names no program: it must be of the same build")


def cli(*args, code=0):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ARROW_QUANT_")}
    run = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert run.returncode == code, run.stderr
    return run


def spelled(text):
    """As the module names settings: overwrite=True, where the program says --overwrite."""
    return _core.spelled(text)


def without_time(report):
    report = {key: value for key, value in report.items() if key not in ("time", "memory", "path", "output", "input", "against", "a", "b")}
    for sentences in {"warnings", "problems"} & set(report):
        report[sentences] = [spelled(sentence) for sentence in report[sentences]]
    return report | {"rule": spelled(report["rule"])} if "rule" in report else report


@pytest.mark.parametrize(
    "flags, settings",
    [
        ([], {}),
        (["--bits", "2"], {"bits": 2}),
        (["--bits", "8", "--group", "64"], {"bits": 8, "group": 64}),
        (["--group", "row", "--params", "f32", "--method", "rtn"], {"group": "row", "params": "f32", "method": "rtn"}),
        (["--profile", "edge"], {"profile": "edge"}),
        (["--bits", "2", "--min-accuracy", "0.98"], {"bits": 2, "min_accuracy": 0.98}),
        (["--exclude", "transformer_blocks.1*", "--symmetric", "--threads", "1"], {"exclude": ["transformer_blocks.1*"], "symmetric": True, "threads": 2}),
    ],
)
def test_the_same_settings_give_the_same_bytes(tmp_path, flags, settings):
    cli("quantize", SAMPLE, "-o", tmp_path / "cli", *flags)
    aq.quantize(SAMPLE, tmp_path / "module", **settings)
    assert tree_bytes(tmp_path / "module") == tree_bytes(tmp_path / "cli")


def test_the_fixed_methods_write_the_same_too(tmp_path):
    cli("quantize", SAMPLE, "-o", tmp_path / "cli", "--profile", "cloud")
    aq.ArrowQuantV2().quantize_diffusion_model(SAMPLE, tmp_path / "module", aq.DiffusionQuantConfig.from_profile("cloud"))
    weights = SAMPLE / "transformer" / "diffusion_pytorch_model.safetensors"
    cli("quantize", weights, "-o", tmp_path / "cli-file")
    aq.ArrowQuantV2().quantize_from_safetensors(weights, tmp_path / "module-file")
    assert tree_bytes(tmp_path / "module") == tree_bytes(tmp_path / "cli")
    assert tree_bytes(tmp_path / "module-file") == tree_bytes(tmp_path / "cli-file")


def test_reports_exports_and_errors_are_the_same(tmp_path):
    model = write_model(tmp_path / "m")
    ours = aq.quantize(model, tmp_path / "module", bits=8).report
    theirs = json.loads(cli("quantize", model, "-o", tmp_path / "cli", "--bits", "8", "--json").stdout)
    assert without_time(ours) == without_time(theirs)
    for command, function in [("verify", aq.verify), ("inspect", aq.inspect)]:
        report = json.loads(cli(command, tmp_path / "module", "--json").stdout)
        assert without_time(function(tmp_path / "module")) == without_time(report)
    report = json.loads(cli("diff", tmp_path / "module", model, "--json").stdout)
    assert without_time(aq.diff(tmp_path / "module", model)) == without_time(report)
    cli("export", tmp_path / "module", "--to", "safetensors", "-o", tmp_path / "cli.safetensors")
    aq.export(tmp_path / "module", tmp_path / "module.safetensors")
    assert (tmp_path / "cli.safetensors").read_bytes() == (tmp_path / "module.safetensors").read_bytes()

    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(aq.FormatError) as e:
        aq.quantize(model, tmp_path / "x")
    error = json.loads(cli("quantize", model, "-o", tmp_path / "x", "--json", code=3).stdout)["error"]
    assert e.value.code == error["code"] == 3 and str(e.value).startswith(error["message"]) and e.value.file == error["file"]
    with pytest.raises(aq.ValidationError) as e:
        aq.quantize(SAMPLE, tmp_path / "x", bits=2, min_accuracy=0.999, fail_fast=True)
    error = json.loads(cli("quantize", SAMPLE, "-o", tmp_path / "x", "--bits", "2", "--min-accuracy", "0.999", "--fail-fast", "--json", code=4).stdout)["error"]
    assert (e.value.code, e.value.hint) == (error["code"], spelled(error["hint"])) and str(e.value) == f"{error['message']}. Hint: {spelled(error['hint'])}"
