"""The scripts that existing callers run: options, precedence, reports, exit codes."""

import json
import os
import subprocess
import sys

import arrow_quant_v2 as aq
import pytest
from files import ROOT, tree_bytes, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("scripts") / "m")


def script(name, *args, code=0, cwd, env=None):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ARROW_QUANT_")} | (env or {})
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    return run


def test_one_model(model, tmp_path):
    run = script("quantize_diffusion.py", "--model", model, "--output", "out", "--bit-width", "8", "--report", "r.json", cwd=tmp_path)
    assert "bits per weight" in run.stdout and run.stderr == "" and sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.json"]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["summary"]["total_jobs"] == report["summary"]["successful"] == 1 and report["summary"]["success_rate"] == 1
    assert report["results"][0]["bit_width"] == 8 and report["results"][0]["model_path"] == str(model)
    aq.quantize(model, tmp_path / "same", bits=8)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "same")


def test_a_batch_goes_on_after_a_failure_and_ends_with_1(model, tmp_path):
    jobs = {
        "jobs": [
            {"model_path": str(model), "output_path": "a", "bit_width": 8},
            {"model_path": "nowhere"},
            {"model_path": str(model), "group_size": 17},
            {"model_path": str(model)},
        ]
    }
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run = script("quantize_diffusion.py", "--batch", "jobs.json", "--output-dir", "all", "--report", "r.json", "--quiet", code=1, cwd=tmp_path)
    assert run.stdout == "" and "Model not found: nowhere" in run.stderr and "Invalid group size: 17" in run.stderr
    summary = json.loads((tmp_path / "r.json").read_text())["summary"]
    assert (summary["total_jobs"], summary["successful"], summary["failed"], summary["success_rate"]) == (4, 2, 2, 0.5)
    with aq.open(tmp_path / "a") as a, aq.open(tmp_path / "all" / "m") as b:
        assert a["blocks.0.linear.weight"].bits == 8 and b["blocks.0.linear.weight"].bits == 4


def test_precedence_is_job_option_environment_file_profile_default(model, tmp_path):
    def group(*args, job=None, env=None):
        (tmp_path / "jobs.json").write_text(json.dumps({"jobs": [{"model_path": str(model), "output_path": "out", **(job or {})}]}))
        script("quantize_diffusion.py", "--batch", "jobs.json", *args, cwd=tmp_path, env=env)
        with aq.open(tmp_path / "out") as f:
            return f.config["group_size"]

    (tmp_path / "c.yaml").write_text("group_size: 32\nparams: f16\n")
    file, environment = ("--config", "c.yaml"), {"ARROW_QUANT_GROUP_SIZE": "256"}
    assert group() == 128
    assert group("--profile", "cloud") == 64
    assert group("--profile", "cloud", *file) == 32
    assert group("--profile", "cloud", *file, env=environment) == 256
    assert group("--profile", "cloud", *file, "--group-size", "128", env=environment) == 128
    assert group("--profile", "cloud", *file, "--group-size", "128", job={"group_size": 64}, env=environment) == 64


@pytest.mark.parametrize(
    "args",
    [[], ["--model", "m", "--batch", "b"], ["--model", "nowhere"], ["--model", "x", "--profile", "desktop", "--output", "y"], ["--batch", "missing.json"]],
)
def test_wrong_options_end_with_1(args, tmp_path):
    assert "error:" in script("quantize_diffusion.py", *args, code=1, cwd=tmp_path).stderr
    assert list(tmp_path.iterdir()) == []


def test_validation_writes_its_report(model, tmp_path):
    aq.quantize(model, tmp_path / "q")
    run = script("validate_quantization.py", "--original", model, "--quantized", "q", "--report", "r.json", "--verbose", cwd=tmp_path)
    assert "passed" in run.stdout and "blocks.2.linear.weight" in run.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"validation", "results", "statistics", "per_layer_accuracy", "warnings", "errors"} and report["validation"]["passed"] is True
    assert set(report["statistics"]) == {"min", "max", "mean", "std"} and report["statistics"]["min"] == min(report["per_layer_accuracy"].values())


def test_a_threshold_fails_only_when_asked_to(model, tmp_path):
    aq.quantize(model, tmp_path / "q", bits=2, min_accuracy=0.1)
    args = ["validate_quantization.py", "--original", model, "--quantized", "q", "--per-layer-threshold", "0.99"]
    assert "below 0.99" in script(*args, cwd=tmp_path).stderr
    script(*args, "--fail-on-threshold", code=1, cwd=tmp_path)
    args = ["validate_quantization.py", "--original", model, "--quantized", "q", "--fail-on-threshold"]
    script(*args, "--bit-width", "2", cwd=tmp_path)
    script(*args, "--min-accuracy", "0.999", code=1, cwd=tmp_path)


def test_a_damaged_container_fails_without_asking(model, tmp_path):
    aq.quantize(model, tmp_path / "q")
    other = write_model(tmp_path / "other", seed=9)
    script("validate_quantization.py", "--original", other, "--quantized", "q", code=1, cwd=tmp_path)  # nothing alike
    (path,) = (tmp_path / "q").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-10])
    assert "error:" in script("validate_quantization.py", "--original", model, "--quantized", "q", code=1, cwd=tmp_path).stderr
    assert "Model not found" in script("validate_quantization.py", "--original", model, "--quantized", "nowhere", code=1, cwd=tmp_path).stderr
