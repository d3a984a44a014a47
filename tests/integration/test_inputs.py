"""Options about what is read and what is written besides the weights."""

import json
import shutil

import pytest
from conftest import ROOT, floats, layers, write_safetensors


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def folder(tmp_path):
    """A transformers-style folder: config, weights, a side file."""
    path = tmp_path / "folder"
    path.mkdir()
    write_safetensors(path / "model.safetensors", layers())
    (path / "config.json").write_text(json.dumps({"architectures": ["DiTTransformer2DModel"]}))
    (path / "README.md").write_text("read me")
    return path


def test_side_files_come_along_unless_told_otherwise(cli, folder, tmp_path):
    assert cli("quantize", "folder", "-q", "--modality", "image").code == 0
    assert {"config.json", "README.md", "metadata.json"} <= set(names(tmp_path / "folder-int4"))
    assert cli("quantize", "folder", "-q", "--modality", "image", "-o", "bare", "--no-side-files").code == 0
    assert names(tmp_path / "bare") == ["metadata.json", "model-00001-of-00001.parquet"]


def test_an_export_gives_the_folder_back(cli, folder, tmp_path):
    assert cli("quantize", "folder", "-q", "--modality", "image").code == 0
    result = cli("export", "folder-int4", "--to", "safetensors", "-o", "back", "-v", "--progress", "never")
    assert result.code == 0 and "  config.json\n" in result.out
    assert names(tmp_path / "back") == names(folder)


def test_shards_begin_at_the_size_given(cli, tmp_path):
    block = floats(65536) * 16
    write_safetensors(tmp_path / "model.safetensors", {f"blocks.{i}.weight": ("F32", [1024, 1024], block) for i in range(4)}, {"modality": "image"})
    assert cli("quantize", "model.safetensors", "-q", "-o", "out", "--method", "rtn", "--shard-size", "600kB").code == 0
    # Four layers of 560 kB: a file is closed once it is beyond the size.
    assert names(tmp_path / "out") == ["metadata.json", "model-00001-of-00002.parquet", "model-00002-of-00002.parquet"]
    assert cli("verify", "out", "--against", "model.safetensors").code == 0


def test_a_pipeline_folder_is_read_by_component(cli, tmp_path):
    sample = ROOT / "examples/dit-fashion"
    report = cli("inspect", sample, "--json").json
    assert report["format"] == "diffusers" and report["component"] == "transformer"
    assert cli("inspect", sample, "--component", "transformer", "--json").json["n_tensors"] == report["n_tensors"]
    result = cli("inspect", sample, "--component", "vae")
    assert result.code in (2, 3) and "vae" in result.err


def test_IX07_two_variants_are_not_guessed(cli, folder):
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    result = cli("inspect", "folder", "--modality", "image")
    assert result.code == 2 and "--variant" in result.err
    assert cli("inspect", "folder", "--variant", "fp16").code == 0


def test_IX02_links_can_be_refused(cli, folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert cli("inspect", "folder").code == 0
    result = cli("inspect", "folder", "--no-follow-symlinks")
    assert result.code in (3, 6) and "model.safetensors" in result.err


def test_ST09_unknown_types_are_refused_or_carried(cli, tmp_path):
    tensors = {**layers(1), "odd": ("F99", [4], b"12345678")}
    write_safetensors(tmp_path / "model.safetensors", tensors, {"modality": "image"})
    result = cli("quantize", "model.safetensors")
    assert result.code == 3 and '"odd"' in result.err and "F99" in result.err
    assert cli("quantize", "model.safetensors", "--skip-unknown-dtype").code == 0
    assert cli("verify", "model-int4").code == 0


@pytest.mark.parametrize(("limit", "part"), [("header_bytes=100", "100"), ("n_tensors=3", "3"), ("name_bytes=10B", "10")])
def test_limits_can_be_set(cli, model, limit, part):
    result = cli("inspect", model.name, "--limit", limit)
    assert result.code == 3 and part in result.err
    assert cli("inspect", model.name, "--limit", limit, "--limit", limit.split("=")[0] + "=1MiB").code == 0


@pytest.mark.parametrize("limit", ["n_tensors", "n_tensors=", "n_tensors=-1", "n_tensors=0", "json_depth=65", "=5"])
def test_wrong_limits_are_refused(cli, model, limit):
    result = cli("inspect", model.name, "--limit", limit)
    assert result.code == 2 and result.err.startswith("error: --limit: ")


def test_many_dimensions_and_short_rows(cli, tmp_path):
    tensors = {"conv.weight": ("F32", [16, 4, 3, 5, 5], floats(4800)), "odd.weight": ("F32", [130, 33], floats(4290))}
    write_safetensors(tmp_path / "model.safetensors", tensors, {"modality": "image"})
    assert cli("quantize", "model.safetensors", "--include", "*").code == 0
    assert cli("export", "model-int4", "--to", "safetensors", "-o", "back.safetensors").code == 0
    result = cli("diff", "model.safetensors", "back.safetensors", "--json")
    assert result.json["shape_differs"] == [] and all(t["cosine"] > 0.98 for t in result.json["tensors"])
