"""The scripts that existing callers run: options, precedence, reports, exit codes."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile

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


def test_validation_writes_its_page(model, tmp_path):
    aq.quantize(model, tmp_path / "q")
    for _ in range(2):  # the page of an earlier run is replaced
        script("validate_quantization.py", "--original", model, "--quantized", "q", "--html-report", "r.html", "--quiet", cwd=tmp_path)
    aq.report(tmp_path / "q", tmp_path / "same.html", against=model)
    page, same = ((tmp_path / name).read_text().partition("<pre>")[0] for name in ("r.html", "same.html"))  # the command shown has the paths as given
    assert page == same and "blocks.2.linear.weight" in (tmp_path / "r.html").read_text()
    assert "error:" in script("validate_quantization.py", "--original", model, "--quantized", "q", "--html-report", "no/r.html", code=1, cwd=tmp_path).stderr


OPTIONS = {
    "quantize_diffusion.py": "model batch output output-dir config profile bit-width modality num-time-groups group-size enable-time-aware disable-time-aware "
    "enable-spatial disable-spatial min-accuracy calibration-samples fail-fast verbose quiet report",
    "validate_quantization.py": "original quantized min-accuracy bit-width per-layer-threshold report html-report fail-on-threshold verbose quiet",
    "granularity_allocation.py": "model output method num-samples min-accuracy target-compression accuracy-weight bit-width available-sizes",
    "evolutionary_search.py": "model output population-size generations mutation-rate crossover-rate elite-ratio target-metric max-evaluations bit-width "
    "profile save-results verbose",
    "package_model.py": "model output manifest-only target max-size min-accuracy skip-validation compression-level verbose quiet",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_that_callers_use_is_there(name, tmp_path):
    text = script(name, "--help", cwd=tmp_path).stdout
    assert not [option for option in OPTIONS[name].split() if f"--{option}" not in text]


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


# ---- group sizes, evolution, packages ----


def test_granularity_allocation(model, tmp_path):
    run = script("granularity_allocation.py", "--model", model, "--output", "a.json", "--method", "variance", cwd=tmp_path)
    assert "measured" in run.stdout and "most sensitive layers" in run.stdout
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["summary"]["bit_width"] == 2 and saved["summary"]["num_layers"] == len(saved["layers"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json"]
    sizes = ["--available-sizes", 64, 128, "--bit-width", 4, "--accuracy-weight", 1]
    script("granularity_allocation.py", "--model", model, "--output", "b.json", "--method", "variance", *sizes, cwd=tmp_path)
    assert {layer["group_size"] for layer in json.loads((tmp_path / "b.json").read_text())["layers"].values()} == {64}
    run = script("granularity_allocation.py", "--model", model, "--output", "c.json", code=1, cwd=tmp_path)
    assert "Recorder" in run.stderr and not (tmp_path / "c.json").exists()


def test_evolutionary_search(model, tmp_path):
    few = ["--population-size", 4, "--generations", 2, "--save-results"]
    run = script("evolutionary_search.py", "--model", model, "--output", "out", *few, "--verbose", cwd=tmp_path)
    assert "generation 2" in run.stdout
    result = json.loads((tmp_path / "out-evolution.json").read_text())
    assert set(result) == {"best", "generation_history", "total_evaluations"}
    with aq.open(tmp_path / "out") as f:
        assert {name: f[name].group_size for name in result["best"]["layer_group_sizes"]} == result["best"]["layer_group_sizes"]
    script("evolutionary_search.py", "--model", model, "--output", "x", "--population-size", 1, code=1, cwd=tmp_path)


def test_a_package_holds_every_file_and_its_hash(model, tmp_path):
    aq.quantize(model, tmp_path / "m4")
    for name in ("a.tar.gz", "b.tar.gz"):
        script("package_model.py", "--model", "m4", "--output", name, "--target", "edge", cwd=tmp_path)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        manifest = json.load(archive.extractfile("m4/manifest.json"))
        for entry in manifest["files"]:
            data = archive.extractfile("m4/" + entry["path"]).read()
            assert hashlib.sha256(data).hexdigest() == entry["sha256"] and len(data) == entry["size_bytes"]
        assert len(archive.getnames()) == len(manifest["files"]) + 1
    assert manifest["target"] == "edge" and manifest["cosine_similarity"] > 0.9
    script("package_model.py", "--model", "m4", "--output", "m.json", "--manifest-only", "--quiet", cwd=tmp_path)
    assert json.loads((tmp_path / "m.json").read_text())["files"] == manifest["files"]
    for bad in (["--max-size", "1KB"], ["--min-accuracy", 0.9999]):
        run = script("package_model.py", "--model", "m4", "--output", "c.tar.gz", *bad, code=1, cwd=tmp_path)
        assert run.stderr.startswith("error: ")
    parquet = next((tmp_path / "m4").glob("*.parquet"))
    parquet.write_bytes(parquet.read_bytes()[:-9] + b"damaged!!")
    script("package_model.py", "--model", "m4", "--output", "c.tar.gz", code=1, cwd=tmp_path)
    assert not list(tmp_path.glob("*c.tar.gz*"))
