"""Equalization folded into the operations before layers, on two blocks of the sample DiT: the model runs without a scale at run time, in torch and as it
is exported."""

import json

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import write_short_dit

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from arrow_quant_v2.torch import QuantLinear, Recorder, load_into  # noqa: E402
from diffusers import DiTTransformer2DModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

BLOCK = "transformer_blocks.0"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of torch wait for each other actively: on a busy machine they take many times as long as one does alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(path):
    return DiTTransformer2DModel.from_pretrained(path, subfolder="transformer").eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The sample DiT's first two blocks, as a model folder."""
    return write_short_dit(tmp_path_factory.mktemp("source") / "dit", 2)


def inputs(seed, n=8):
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(0, 1000, (n,), generator=g)
    return {"hidden_states": torch.randn(n, 1, 28, 28, generator=g), "timestep": t, "class_labels": torch.randint(0, 10, (n,), generator=g)}


@torch.no_grad()
def outputs(model):
    return model(**inputs(7)).sample.numpy()


@pytest.fixture(scope="module")
def folded(tmp_path_factory, source):
    """(container, what the original gives)"""
    folder, model = tmp_path_factory.mktemp("folding"), model_of(source)
    with torch.no_grad(), Recorder(model, folder / "c.aqcal", groups=4, modality="image"):
        for seed in range(3):
            model(**inputs(seed))
    aq.quantize(source, folder / "q", bits=8, group=64, act_bits=8, calib=folder / "c.aqcal", refine_sweeps=0)
    return folder / "q", outputs(model)


def test_metadata_tells_what_was_folded(folded, source):
    folds = json.loads((folded[0] / "metadata.json").read_text())["folds"]
    consumers = {name for fold in folds for name in fold["consumers"]}
    assert {fold["kind"] for fold in folds} <= {"modulation", "linear"} and len(folds) > 3
    with aq.open(folded[0]) as f:
        assert consumers == {name for name, t in f.items() if t.equalization_folded}
        assert all(name.rpartition(".")[0].split(".")[-1] != "2" for name in consumers)  # an activation function stands before ff.net.2
        for fold in folds:
            assert len({bytes(f[name].equalization_scales) for name in fold["consumers"]}) == 1
            assert all((f[name].folded_shift is not None) == fold["shifted"] for name in fold["consumers"])
    report = aq.verify(folded[0], against=source)
    assert report["ok"] and not report["problems"]


def test_a_folded_container_runs_without_scales_at_run_time(folded, source):
    path, original = folded
    model = load_into(model_of(source), path)
    with aq.open(path) as f:
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear) and f[f"{name}.weight"].equalization_folded:
                assert layer.qinput_scales is None
    assert aq.sqnr_db(original, outputs(model)) > 40
    integer = load_into(model_of(source), path, activations="time")
    assert aq.sqnr_db(original, outputs(integer)) > 25


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_an_export_of_a_folded_container_is_the_same_model(folded, source, tmp_path, dtype):
    path, original = folded
    out = tmp_path / "m.safetensors"
    aq.export(path, out, to="safetensors", dtype=dtype)
    model = model_of(source)
    model.load_state_dict({name: value.float() for name, value in load_file(out).items()})
    assert aq.sqnr_db(original, outputs(model)) > 40
    bias = load_file(out)[f"{BLOCK}.norm1.linear.bias"].float().numpy()
    before = load_file(source / "transformer/diffusion_pytorch_model.safetensors")[f"{BLOCK}.norm1.linear.bias"].numpy()
    assert np.abs(bias - before).max() > 1e-3


def test_recoded_from_the_source_a_folded_model_is_the_same(folded, source, tmp_path):
    path, original = folded
    out = tmp_path / "m.safetensors"
    report = aq.export(path, out, to="comfy-int8", source=source)
    tensors = load_file(out)
    state = {}
    for name, value in tensors.items():
        if name.endswith(".comfy_quant") or name.endswith(".weight_scale"):
            continue
        scale = tensors.get(name.removesuffix("weight") + "weight_scale") if name.endswith(".weight") else None
        state[name] = value.float() if scale is None else value.float() * scale.float().reshape(-1, *[1] * (value.dim() - 1))
    model = model_of(source)
    model.load_state_dict(state)
    assert aq.sqnr_db(original, outputs(model)) > 30
    assert not any("not in source" in warning for warning in report["warnings"])
    with pytest.raises(aq.ConfigurationError, match="source cannot follow"):
        aq.export(path, tmp_path / "n.safetensors", to="comfy-int8", source=path)


# ---- bases that stay in the container ----


@pytest.fixture(scope="module")
def rotated_and_equalized(tmp_path_factory):
    """A model with outlying weights and inputs of very different strength, rotated, equalized with stored scales, and both: {name: container}."""
    from safetensors.numpy import save_file

    folder, rng = tmp_path_factory.mktemp("bases"), np.random.default_rng(5)
    names = ["blocks.0.a.weight", "blocks.0.b.weight"]
    save_file({name: rng.standard_t(2, (64, 256)).astype(np.float32) for name in names}, folder / "m.safetensors")
    x = (rng.standard_normal((600, 256)) * np.where(np.arange(256) % 16 == 3, 9, 1)).astype(np.float32)
    collection = aq.Calibration(num_timesteps=1000, groups=2, hessian=True, data_name="noise")
    for name in names:
        collection.add_layer(name, 256)
        for timestep in (10, 900):
            collection.update(name, x, np.full(600, timestep, np.int32))
    collection.save(folder / "m.aqcal")
    made = {"rotated": {"rotate": "hadamard", "smooth": "none"}, "equalized": {"smooth": "ditas"}, "both": {"rotate": "hadamard", "smooth": "ditas"}}
    for name, settings in made.items():
        aq.quantize(folder / "m.safetensors", folder / name, bits=8, group=256, modality="image", method="rtn", calib=folder / "m.aqcal", **settings)
    return folder


@pytest.mark.parametrize("name", ["rotated", "equalized", "both"])
@pytest.mark.parametrize("to", ["safetensors", "gguf", "comfy-int8", "gptq"])
def test_exports_of_rotated_and_equalized_layers_are_the_weights_or_a_refusal(rotated_and_equalized, tmp_path, name, to):
    with aq.open(rotated_and_equalized / name) as f:
        weights = {layer: f[layer].dequantize() for layer in f}
        basis = [(t.hadamard_group, t.equalization_scales is not None) for t in f.values()]
    original = load_file(rotated_and_equalized / "m.safetensors")
    assert any(rotation for rotation, _ in basis) == (name != "equalized") and all(equalized for _, equalized in basis) == (name != "rotated")
    out = tmp_path / ("m.gguf" if to == "gguf" else "m" if to == "gptq" else "m.safetensors")
    extra = {"dtype": "f32"} if to == "safetensors" else {"type": "Q8_0"} if to == "gguf" else {}
    try:
        report = aq.export(rotated_and_equalized / name, out, to=to, **extra)
    except aq.ArrowQuantError as error:  # a target of plain codes says so, and which layer
        assert to == "gptq" and "blocks.0." in str(error)
        return
    for layer, w in weights.items():
        assert aq.sqnr_db(original[layer].numpy(), w) > 30
        if to == "safetensors":
            assert np.array_equal(load_file(out)[layer].numpy(), w)
    if to != "safetensors":
        entries = {t["name"]: t for t in report["recoding"]["tensors"]}
        for layer in weights:  # their codes are of another basis: never taken over as they are
            assert entries[layer].get("from") in ("dequantized", None), entries[layer]
            if entries[layer].get("from"):
                assert entries[layer]["added_sqnr_db"] > 25
            else:
                assert entries[layer]["refused"]
