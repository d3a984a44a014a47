"""What `export --to comfy-int8` and `--to gptq` write: undone by the definitions in NumPy, and read by programs we did not write where they are installed.

comfy_kitchen is the quantization library of ComfyUI; auto_round holds the layers that diffusers and transformers put in place of linear ones.
"""

import json
import re
import subprocess

import numpy as np
import pytest
from layouts import undo_comfy, undo_gptq
from program import PROGRAM, ROOT, arrowquant, sqnr_db

safetensors_numpy = pytest.importorskip("safetensors.numpy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(3)
    tensors = {
        "blocks.0.attn.to_q.weight": rng.standard_normal((64, 512), np.float32),
        "blocks.0.ff.weight": rng.standard_t(3, (96, 256)).astype(np.float32),
        "blocks.0.narrow.weight": rng.standard_normal((64, 96), np.float32),
        "blocks.0.odd.weight": rng.standard_normal((40, 128), np.float32),
        "blocks.0.conv.weight": rng.standard_normal((32, 16, 3, 3), np.float32),
        "blocks.0.attn.to_q.bias": rng.standard_normal(64, np.float32),
        "proj_out.weight": rng.standard_normal((32, 160), np.float32),
    }
    tensors["blocks.0.attn.to_q.weight"][:, 7] *= 30  # an outlier channel: what rotation is for
    tensors["blocks.0.ff.weight"][3] = 0
    folder = tmp_path_factory.mktemp("other") / "m"
    folder.mkdir()
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["SomeDiffusionModel"], "hidden": 64}))
    return folder, tensors


def quantized(model, name, *options):
    out = model[0].parent / name
    if not out.exists():
        arrowquant("quantize", model[0], "-o", out, "--modality", "image", *options)
        arrowquant("export", out, "--to", "safetensors", "--dtype", "f32", "-o", out.with_name(name + ".safetensors"))
    return out, safetensors_numpy.load_file(out.with_name(name + ".safetensors"))


# ---- comfy-int8 ----


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("with_source", [False, True])
def test_comfy_int8_means_the_weights(model, tmp_path, rotate, with_source):
    container, dequantized = quantized(model, "asym8", "--bits", 8, "--group", 64)
    report = arrowquant(
        "export", container, "--to", "comfy-int8", "--rotate", rotate, "-o", tmp_path / "m.safetensors", *(["--source", model[0]] if with_source else [])
    )
    file, entries = safetensors_numpy.load_file(tmp_path / "m.safetensors"), {t["name"]: t for t in report["recoding"]["tensors"]}
    for layer in ("blocks.0.attn.to_q", "blocks.0.ff", "blocks.0.narrow", "blocks.0.odd"):
        w, rotated = undo_comfy(file, layer)
        entry = entries[layer + ".weight"]
        assert rotated == (rotate == "hadamard" and w.shape[1] % 256 == 0)
        assert entry["added_sqnr_db"] == pytest.approx(sqnr_db(dequantized[layer + ".weight"], w), abs=0.01)
        if with_source:
            assert entry["from"] == "source" and entry["sqnr_db"] == pytest.approx(sqnr_db(model[1][layer + ".weight"], w), abs=0.01)
    assert file["blocks.0.conv.weight"].dtype == np.float32 and "convolution" in entries["blocks.0.conv.weight"]["refused"]
    assert np.array_equal(file["blocks.0.attn.to_q.bias"], model[1]["blocks.0.attn.to_q.bias"])
    if rotate == "hadamard" and with_source:  # the outlier is spread over its group
        arrowquant("export", container, "--to", "comfy-int8", "-o", tmp_path / "plain.safetensors", "--source", model[0])
        plain = undo_comfy(safetensors_numpy.load_file(tmp_path / "plain.safetensors"), "blocks.0.attn.to_q")[0]
        name = "blocks.0.attn.to_q.weight"
        assert sqnr_db(model[1][name], undo_comfy(file, "blocks.0.attn.to_q")[0]) > sqnr_db(model[1][name], plain) + 3


def test_comfy_int8_takes_over_codes_of_whole_rows(model, tmp_path):
    container, dequantized = quantized(model, "row8", "--bits", 8, "--group", "row", "--sym")
    report = arrowquant("export", container, "--to", "comfy-int8", "-o", tmp_path / "m.safetensors")
    file = safetensors_numpy.load_file(tmp_path / "m.safetensors")
    for layer in ("blocks.0.attn.to_q", "blocks.0.ff", "blocks.0.narrow"):
        assert np.array_equal(undo_comfy(file, layer)[0].astype(np.float32), dequantized[layer + ".weight"])
    assert report["recoding"]["n_codes"] >= 4 and report["recoding"]["n_dequantized"] == 0


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
def test_the_library_of_comfyui_dequantizes_to_the_same(model, tmp_path, rotate):
    torch, int8 = pytest.importorskip("torch"), pytest.importorskip("comfy_kitchen.tensor.int8")
    container, _ = quantized(model, "asym8", "--bits", 8, "--group", 64)
    arrowquant("export", container, "--to", "comfy-int8", "--rotate", rotate, "-o", tmp_path / "m.safetensors", "--source", model[0])
    file = safetensors_numpy.load_file(tmp_path / "m.safetensors")
    for layer in ("blocks.0.attn.to_q", "blocks.0.narrow"):
        ours, rotated = undo_comfy(file, layer)
        codes, layout = torch.from_numpy(file[layer + ".weight"]), int8.TensorWiseINT8Layout
        params = layout.Params(
            scale=torch.from_numpy(file[layer + ".weight_scale"]),
            orig_dtype=torch.float32,
            orig_shape=tuple(codes.shape),
            convrot=rotated,
            convrot_groupsize=256,
        )
        theirs = layout.dequantize(codes, params).numpy()
        assert np.allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())  # 256 products are summed in another order
        assert rotated or np.array_equal(theirs, ours.astype(np.float32))


# ---- gptq ----


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_gptq_means_the_weights(model, tmp_path, bits, kind):
    container, dequantized = quantized(model, f"{kind}{bits}f16", "--bits", bits, "--group", 64, "--params", "f16", f"--{kind}")
    report = arrowquant("export", container, "--to", "gptq", "-o", tmp_path / "g")
    file = safetensors_numpy.load_file(tmp_path / "g" / "model.safetensors")
    entries = {t["name"]: t for t in report["recoding"]["tensors"]}
    for layer in ("blocks.0.attn.to_q", "blocks.0.ff", "blocks.0.narrow"):
        w, entry = undo_gptq(file, layer, bits), entries[layer + ".weight"]
        assert layer + ".weight" not in file  # a loader that does not know the format must miss it
        if kind == "sym":
            assert np.array_equal(w, dequantized[layer + ".weight"]), layer
            assert entry["from"] == "codes" and entry["added_sqnr_db"] is None
        else:
            assert entry["added_sqnr_db"] == pytest.approx(sqnr_db(dequantized[layer + ".weight"], w), abs=0.01)
    assert "multiples of 32" in entries["blocks.0.odd.weight"]["refused"] and file["blocks.0.odd.weight"].shape == (40, 128)
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    assert config["hidden"] == 64
    own = config["quantization_config"]
    assert (own["quant_method"], own["bits"], own["group_size"], own["sym"], own["desc_act"]) == ("gptq", bits, 64, kind == "sym", False)
    assert own["dynamic"]["-:^proj_out$"] == {} and own["dynamic"]["-:^blocks\\.0\\.odd$"] == {}
    assert own["dynamic"]["+:^blocks\\.0\\.narrow$"] == {"bits": bits, "group_size": 32}  # 96 inputs are no multiple of 64


def test_NU03_a_step_beyond_half_precision_is_the_largest_half_and_the_error_is_told(tmp_path):
    """Steps of 2e5 where a half ends at 65504: values beyond what that reaches are clipped, the others keep their sign and their place."""
    w = np.linspace(-1.5e6, 1.5e6, 64 * 128, dtype=np.float32).reshape(128, 64).T.copy()
    safetensors_numpy.save_file({"a.weight": w}, tmp_path / "m.safetensors")
    arrowquant("quantize", tmp_path / "m.safetensors", "-o", tmp_path / "q", "--bits", 4, "--group", 64, "--modality", "image", "--params", "f32")
    report = arrowquant("export", tmp_path / "q", "--to", "gptq", "-o", tmp_path / "g")
    file = safetensors_numpy.load_file(next((tmp_path / "g").glob("*.safetensors")))
    assert file["a.scales"].max() == 65504
    back = undo_gptq(file, "a", 4)
    assert np.isfinite(back).all() and np.corrcoef(back.ravel(), w.ravel())[0, 1] > 0.8 and (back[:, :40] <= 0).all()
    assert "added error" in " ".join(report["warnings"])


def test_gptq_from_the_source_is_near_the_best_of_its_grid(model, tmp_path):
    container, _ = quantized(model, "asym4f16", "--bits", 4, "--group", 64, "--params", "f16", "--asym")
    report = arrowquant("export", container, "--to", "gptq", "-o", tmp_path / "g", "--source", model[0])
    for entry in report["recoding"]["tensors"]:
        if entry["refused"] is None:
            assert entry["from"] == "source" and entry["sqnr_db"] > entry["container_sqnr_db"] - 1, entry


def test_mixed_widths_are_told_per_layer(model, tmp_path):
    container, _ = quantized(model, "mixed", "--bits", 4, "--group", 64, "--sym", "--params", "f16", "--layer", "*ff*=bits:8,group:128")
    arrowquant("export", container, "--to", "gptq", "-o", tmp_path / "g")
    own = json.loads((tmp_path / "g" / "config.json").read_text())["quantization_config"]
    assert own["bits"] == 4 and own["dynamic"]["+:^blocks\\.0\\.ff$"] == {"bits": 8, "group_size": 128}
    assert undo_gptq(safetensors_numpy.load_file(tmp_path / "g" / "model.safetensors"), "blocks.0.ff", 8).shape == (96, 256)


def test_a_rule_is_about_the_layer_of_its_name_alone(tmp_path):
    names = ["a+b(c)[0]", "a|b", "x$^y?", "plain"]
    tensors = {f"{name}.weight": np.ones((128, 256) if name == "plain" else (64, 96), np.float32) for name in names}
    tensors["plain.weight"] *= np.arange(256, dtype=np.float32)
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
    arrowquant("quantize", tmp_path / "model.safetensors", "-o", tmp_path / "q", "--modality", "image", "--bits", 4, "--group", 128)
    arrowquant("export", tmp_path / "q", "--to", "gptq", "-o", tmp_path / "g")
    rules = json.loads((tmp_path / "g" / "config.json").read_text())["quantization_config"]["dynamic"]
    for rule in rules:
        assert sum(re.match(rule[2:], name) is not None for name in names) == 1, rule
    assert len(rules) == 3


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_layers_of_auto_round_compute_the_same(model, tmp_path, bits):
    torch, linear = pytest.importorskip("torch"), pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp")
    container, _ = quantized(model, f"asym{bits}f16", "--bits", bits, "--group", 64, "--params", "f16", "--asym")
    arrowquant("export", container, "--to", "gptq", "-o", tmp_path / "g")
    file = safetensors_numpy.load_file(tmp_path / "g" / "model.safetensors")
    layer = linear.QuantLinear(bits, 64, 512, 64, bias=False)
    layer.load_state_dict({k: torch.from_numpy(file[f"blocks.0.attn.to_q.{k}"]) for k in ("qweight", "qzeros", "scales")}, strict=False)
    wanted = undo_gptq(file, "blocks.0.attn.to_q", bits)
    got = layer(torch.eye(512)).numpy().T  # the weight; it is computed in half precision
    assert np.allclose(got, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    folder = tmp_path_factory.mktemp("llama") / "m"
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, :64] = -model.model.layers[0].mlp.up_proj.weight[:, :64].abs() - 0.01  # no zero among the levels
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("bits", "kind"), [(2, "sym"), (4, "sym"), (4, "asym"), (8, "sym"), (8, "asym")])
def test_transformers_loads_the_folder_with_gptqmodel(language_model, tmp_path, bits, kind):
    """As a user does, with nothing of ours: the weights of its layers are ours in half precision, to the last bit."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    arrowquant("quantize", language_model, "-o", tmp_path / "q", "--modality", "text", "--bits", bits, "--group", 64, "--params", "f16", f"--{kind}")
    arrowquant("export", tmp_path / "q", "--to", "gptq", "-o", tmp_path / "g")
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "g", device_map="cpu", dtype=torch.float16, local_files_only=True, quantization_config=transformers.GPTQConfig(bits=bits, backend="torch")
    )
    file, n = safetensors_numpy.load_file(tmp_path / "g" / "model.safetensors"), 0
    for name, module in packed.named_modules():
        if hasattr(module, "qweight"):
            assert np.array_equal(module.dequantize_weight().detach().numpy().T, undo_gptq(file, name, bits).astype(np.float16)), name
            n += 1
    assert n == 14
    ids = torch.arange(20)[None]
    arrowquant("quantize", language_model, "-o", tmp_path / "p", "--modality", "text", "--exclude", "*")
    arrowquant("export", tmp_path / "p", "--to", "safetensors", "-o", tmp_path / "plain")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, local_files_only=True)
    weights = {f"{k}.weight": torch.from_numpy(undo_gptq(file, k, bits)) for k, m in packed.named_modules() if hasattr(m, "qweight")}
    plain.load_state_dict(weights, strict=False)
    with torch.no_grad():
        wanted, got = plain(ids).logits, packed(ids).logits.float()
    assert (got - wanted).norm() < 0.01 * wanted.norm()


def test_diffusers_loads_the_folder_with_auto_round(tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("auto_round.inference.convert_model")
    sample = ROOT / "examples" / "dit-fashion"
    arrowquant("quantize", sample, "-o", tmp_path / "q", "--bits", 4, "--group", 64, "--sym", "--params", "f16")
    arrowquant("export", tmp_path / "q", "--to", "gptq", "-o", tmp_path / "g")
    arrowquant("export", tmp_path / "q", "--to", "safetensors", "-o", tmp_path / "plain")
    packed = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "g", subfolder="transformer", local_files_only=True, device_map="cpu", torch_dtype=torch.bfloat16
    )
    plain = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "plain", subfolder="transformer", local_files_only=True)
    torch.manual_seed(0)
    inputs = dict(hidden_states=torch.randn(2, 1, 28, 28), timestep=torch.tensor([10, 500]), class_labels=torch.tensor([1, 2]))
    with torch.no_grad():
        wanted = plain(**inputs).sample
        got = packed(**inputs | {"hidden_states": inputs["hidden_states"].bfloat16()}).sample.float()
    assert sum(hasattr(m, "qweight") for m in packed.modules()) == 42
    assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--to", "comfy-int8", "-o", "m.bin"], "must end in .safetensors"),
        (["--to", "gguf", "-o", "folder"], "must end in .gguf"),
        (["--to", "gptq", "--type", "q8_0", "-o", "g"], "for GGUF files only"),
        (["--to", "gptq", "--rotate", "hadamard", "-o", "g"], "for comfy-int8 only"),
        (["--to", "safetensors", "--source", "x", "-o", "g"], "of no use for safetensors"),
    ],
)
def test_requests_that_make_no_sense_are_refused(model, args, text):
    container, _ = quantized(model, "asym8", "--bits", 8, "--group", 64)
    assert text in arrowquant("export", container, *args, code=2)["error"]["message"]


def test_the_commands_of_the_guide_work(tmp_path):
    """docs/exports.md, as it stands."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    text = (ROOT / "docs" / "exports.md").read_text()
    commands = [line for line in text.split("```")[1].strip().splitlines() if line]
    assert len(commands) > 5
    for line in commands:
        done = subprocess.run([PROGRAM, *line.split()[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
    assert {p.name for p in tmp_path.iterdir()} == {
        "examples",
        "dit-int4",
        "dit-plain",
        "dit.gguf",
        "dit-q8.gguf",
        "dit-comfy.safetensors",
        "dit-gptq",
        "dit-both",
        "dit-both.gguf",
    }


def test_quantize_to_writes_both(model, tmp_path):
    report = arrowquant("quantize", model[0], "-o", tmp_path / "q", "--modality", "image", "--bits", 4, "--to", "gguf", "--type", "q8_0")
    assert {p.name for p in tmp_path.iterdir()} == {"q", "q.gguf"}
    assert report["schema"] == "arrowquant.quantize/1" and report["export"]["schema"] == "arrowquant.export/1"
    assert report["export"]["recoding"]["n_source"] == 4 and report["export"]["output"]["path"] == str(tmp_path / "q.gguf")
