"""What `arrowquant export` writes is loaded by the programs it is for: diffusers and the safetensors package.

Given the sample DiT quantized and exported to a folder, diffusers loads it without a plug-in, with every weight equal to what the container dequantizes to
and the kept ones equal to the source; a single file loads with the safetensors package in each element type.
"""

import json

import numpy as np
import pytest
from program import ROOT, arrowquant

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SAMPLE = ROOT / "examples" / "dit-fashion"
SOURCE = SAMPLE / "transformer" / "diffusion_pytorch_model.safetensors"


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


@pytest.mark.parametrize("to", ["safetensors", "gptq"])
def test_large_models_are_written_in_shards_that_loaders_read(tmp_path, to):
    """A sharded source, and a limit that makes shards of the export: the same tensors as in one file, by the index as diffusers' loader and ours read it."""
    model = diffusers.DiTTransformer2DModel.from_pretrained(SAMPLE, subfolder="transformer", local_files_only=True)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    arrowquant("quantize", tmp_path / "sharded", "-o", tmp_path / "q", "--bits", 4, "--group", 64, "--sym", "--params", "f16")
    arrowquant("export", tmp_path / "q", "--to", to, "-o", tmp_path / "one")
    report = arrowquant("export", tmp_path / "q", "--to", to, "-o", tmp_path / "many", "--shard-size", "700KB")
    arrowquant("export", tmp_path / "q", "--to", to, "-o", tmp_path / "many", "--shard-size", "700KB", "--overwrite")
    name = "diffusion_pytorch_model"
    assert (tmp_path / "one" / f"{name}.safetensors").exists() and not (tmp_path / "one" / f"{name}.safetensors.index.json").exists()
    whole = safetensors_torch.load_file(tmp_path / "one" / f"{name}.safetensors")
    index = json.loads((tmp_path / "many" / f"{name}.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [p.name for p in shards] == [f"{name}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] and len(shards) > 1
    assert {*report["output"]["files"]} == {p.name for p in (tmp_path / "many").iterdir()}
    parts = {p.name: safetensors_torch.load_file(p) for p in shards}
    assert index["weight_map"] == {tensor: file for file, tensors in parts.items() for tensor in tensors}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    assert all(sum(t.numel() * t.element_size() for t in p.values()) <= 700_000 or len(p) == 1 for p in parts.values())
    for file in parts.values():
        for tensor, value in file.items():
            assert torch.equal(value, whole.pop(tensor)), tensor
    assert not whole
    if to == "safetensors":
        loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "many", local_files_only=True).state_dict()
        expected = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "one", local_files_only=True).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in expected.items())
        assert arrowquant("diff", tmp_path / "one", tmp_path / "many")["equal"]
