"""What `arrowquant export` writes is loaded by the programs it is for: diffusers and the safetensors package.

Given the sample DiT quantized and exported to a folder, diffusers loads it without a plug-in, with every weight equal to what the container dequantizes to
and the kept ones equal to the source; a single file loads with the safetensors package in each element type.
"""

import json
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "dit-fashion"
SOURCE = SAMPLE / "transformer" / "diffusion_pytorch_model.safetensors"


def arrowquant(*args):
    program = os.environ.get("ARROWQUANT_PROGRAM") or shutil.which("arrowquant") or str(ROOT / "build" / "release" / "arrowquant")
    done = subprocess.run([program, *map(str, args), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "int4"
    report = arrowquant("quantize", SAMPLE, "-o", out, "--bits", 4, "--group", 64)
    return out, {layer["name"] for layer in report["layers"]}


@pytest.fixture(scope="module")
def folder(container):
    out = container[0].parent / "folder"
    arrowquant("export", container[0], "--to", "safetensors", "-o", out)
    return out


def test_diffusers_loads_the_exported_folder_unchanged(container, folder):
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", local_files_only=True)
    source = diffusers.DiTTransformer2DModel.from_pretrained(SAMPLE, subfolder="transformer", local_files_only=True)
    assert model.config["num_layers"] == source.config["num_layers"]
    ours, theirs = model.state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name in container[1]:
            noise = (value - theirs[name]).double().square().sum() / theirs[name].double().square().sum()
            assert 0 < noise < 10**-1.8, name
        else:
            assert torch.equal(value, theirs[name]), name


def test_the_scheduler_is_copied(folder):
    exported = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    source = diffusers.DDIMScheduler.from_pretrained(SAMPLE, subfolder="scheduler", local_files_only=True)
    assert exported.config == source.config
    assert json.loads((folder / "model_index.json").read_text()) == json.loads((SAMPLE / "model_index.json").read_text())


@pytest.mark.parametrize(("word", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_single_file_loads_with_safetensors_in_each_element_type(container, folder, word, dtype):
    path = container[0].parent / f"{word}.safetensors"
    arrowquant("export", container[0], "--to", "safetensors", "--dtype", word, "-o", path)
    loaded = safetensors_torch.load_file(path)
    exact = safetensors_torch.load_file(folder / "transformer" / SOURCE.name)
    assert loaded.keys() == exact.keys()
    for name, value in loaded.items():
        assert value.dtype == dtype
        assert torch.equal(value, exact[name].to(dtype)), name


def test_dequantized_values_follow_from_the_stored_codes(container, folder):
    pq = pytest.importorskip("pyarrow.parquet")
    exact = safetensors_torch.load_file(folder / "transformer" / SOURCE.name)
    checked = 0
    for path in sorted(container[0].glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            if row["layer_name"] not in container[1]:
                continue
            rows, cols = row["shape"]
            packed = np.frombuffer(row["data"], np.uint8).reshape(rows, -1)
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(rows, -1)[:, :cols].astype(np.float32)
            group = np.arange(cols) // row["group_size"]
            pairs = np.frombuffer(row["params"], np.float16).astype(np.float32).reshape(rows, -1, 2)  # scale and offset of each group
            scales, zeros = pairs[:, group, 0], (-pairs[..., 1] / pairs[..., 0])[:, group]
            assert np.array_equal((codes - zeros) * scales, exact[row["layer_name"]].numpy())
            checked += 1
    assert checked == len(container[1])
