"""Adapters merged before quantizing: kohya and PEFT names, strengths, several at once, convolutions; against the sum in NumPy, and what PEFT itself merges."""

import json

import numpy as np
import pytest

safetensors_numpy = pytest.importorskip("safetensors.numpy")

LINEAR, CONV, KEPT = "blocks.0.attn.to_q", "blocks.0.conv", "proj_out"


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {
        f"{LINEAR}.weight": rng.standard_normal((96, 64), np.float32),
        f"{LINEAR}.bias": rng.standard_normal(96, np.float32),
        f"{CONV}.weight": rng.standard_normal((32, 16, 3, 3), np.float32),
        f"{KEPT}.weight": rng.standard_normal((32, 160), np.float32).astype(np.float16),
    }
    safetensors_numpy.save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors", tensors


def low_rank(rng, rows, cols, rank):
    return rng.standard_normal((rank, cols), np.float32) * 0.1, rng.standard_normal((rows, rank), np.float32) * 0.1


def adapter(path, style, layers, alpha=None, seed=2, dtype=np.float32):
    """Writes an adapter; returns {layer: alpha / rank * up @ down} in double precision."""
    rng, tensors, changes = np.random.default_rng(seed), {}, {}
    for layer, (rows, cols, rank, kernel) in layers.items():
        down, up = (m.astype(dtype) for m in low_rank(rng, rows, cols, rank))
        changes[layer] = up.astype(np.float64) @ down.astype(np.float64) * ((alpha or rank) / rank)
        down, up = (down.reshape(rank, -1, *kernel), up.reshape(rows, rank, 1, 1)) if kernel else (down, up)
        if style == "kohya":
            base = "lora_unet_" + layer.replace(".", "_")
            tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
            if alpha:
                tensors[f"{base}.alpha"] = np.array(alpha, np.float32)
        else:
            tensors |= {f"{style}{layer}.lora_A.weight": down, f"{style}{layer}.lora_B.weight": up}
    safetensors_numpy.save_file(tensors, path)
    return changes


def merged(cli, model, out, *adapters, bits=8):
    """Values of the container whose layers are coded finely, and its report."""
    options = [x for a in adapters for x in ("--lora", a)]
    done = cli("quantize", model, "-o", out, "--modality", "image", "--bits", str(bits), "--group", "32", "--params", "f32", *options, "--json")
    assert done.code == 0, done.err
    check = cli("verify", out, "--against", model, *options, "--json")
    assert check.code == 0, check.out
    assert cli("export", out, "--to", "safetensors", "--dtype", "f32", "-o", out.with_suffix(".safetensors")).code == 0
    return safetensors_numpy.load_file(out.with_suffix(".safetensors")), done.json, check.json


def near(got, wanted, tolerance):
    assert np.abs(got - wanted.reshape(got.shape)).max() <= tolerance * np.abs(wanted).max()


LAYERS = {LINEAR: (96, 64, 8, None), CONV: (32, 144, 4, (3, 3)), KEPT: (32, 160, 2, None)}


@pytest.mark.parametrize(
    ("style", "alpha"),
    [("kohya", 4.0), ("kohya", None), ("transformer.", None), ("base_model.model.", None), ("unet.", None), ("diffusion_model.", None), ("", None)],
)
def test_the_weights_are_those_plus_the_change(cli, tmp_path, model, style, alpha):
    path, tensors = model
    changes = adapter(tmp_path / "a.safetensors", style, LAYERS, alpha)
    got, report, _ = merged(cli, path, tmp_path / "q", tmp_path / "a.safetensors")
    for layer, change in changes.items():
        exact = tensors[f"{layer}.weight"].astype(np.float64).reshape(change.shape) + change
        near(got[f"{layer}.weight"], exact, 1e-6 if layer == KEPT else 0.01)  # kept ones hold the sum as F32
    assert np.array_equal(got[f"{LINEAR}.bias"], tensors[f"{LINEAR}.bias"])
    stored = json.loads((tmp_path / "q" / "metadata.json").read_text())["source"]["lora"]
    assert stored == [{"name": "a.safetensors", "strength": 1.0, "n_layers": 3}]


def test_values_are_merged_in_f32_to_the_last_bits(cli, tmp_path, model):
    """verify measures the container against the merged source: a kept F32 copy of a layer differs from the sum by rounding only."""
    path, tensors = model
    changes = adapter(tmp_path / "a.safetensors", "kohya", {LINEAR: (96, 64, 8, None)}, 2.0)
    assert cli("quantize", path, "-o", tmp_path / "q", "--modality", "image", "--exclude", "*", "--lora", f"{tmp_path}/a.safetensors:0.5").code == 0
    assert cli("export", tmp_path / "q", "--to", "safetensors", "-o", tmp_path / "q.safetensors").code == 0
    got = safetensors_numpy.load_file(tmp_path / "q.safetensors")[f"{LINEAR}.weight"]
    exact = tensors[f"{LINEAR}.weight"] + 0.5 * changes[LINEAR]
    assert got.dtype == np.float32 and np.abs(got - exact).max() < 4e-7 * np.abs(exact).max()


def test_several_adapters_and_strengths_add_up(cli, tmp_path, model):
    path, tensors = model
    first = adapter(tmp_path / "a.safetensors", "kohya", {LINEAR: LAYERS[LINEAR]}, 8.0, seed=3)
    second = adapter(tmp_path / "b.safetensors", "transformer.", {LINEAR: (96, 64, 3, None), CONV: LAYERS[CONV]}, seed=4, dtype=np.float16)
    got, report, check = merged(cli, path, tmp_path / "q", f"{tmp_path}/a.safetensors:0.75", f"{tmp_path}/b.safetensors:-1.5")
    near(got[f"{LINEAR}.weight"], tensors[f"{LINEAR}.weight"] + 0.75 * first[LINEAR] - 1.5 * second[LINEAR], 0.01)
    near(got[f"{CONV}.weight"], tensors[f"{CONV}.weight"].reshape(32, 144) - 1.5 * second[CONV], 0.01)
    assert check["ok"]


def test_a_peft_folder_gives_its_alpha(cli, tmp_path, model):
    path, tensors = model
    folder = tmp_path / "adapter"
    folder.mkdir()
    changes = adapter(folder / "adapter_model.safetensors", "base_model.model.", {LINEAR: LAYERS[LINEAR], CONV: LAYERS[CONV]})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 24, "alpha_pattern": {"conv": 2}, "use_rslora": False}))
    got, _, _ = merged(cli, path, tmp_path / "q", folder)
    near(got[f"{LINEAR}.weight"], tensors[f"{LINEAR}.weight"] + 3 * changes[LINEAR], 0.01)
    near(got[f"{CONV}.weight"], tensors[f"{CONV}.weight"].reshape(32, 144) + 0.5 * changes[CONV], 0.01)


def test_keys_that_match_no_layer_are_listed(cli, tmp_path, model):
    adapter(tmp_path / "a.safetensors", "kohya", {LINEAR: LAYERS[LINEAR], "blocks.7.attn.to_q": (96, 64, 2, None)}, 1.0)
    done = cli("quantize", model[0], "-o", tmp_path / "q", "--modality", "image", "--lora", tmp_path / "a.safetensors", "--json")
    assert done.code == 3 and "3 keys match no layer" in done.json["error"]["message"]
    assert "lora_unet_blocks_7_attn_to_q.lora_down.weight" in done.json["error"]["message"] and not (tmp_path / "q").exists()


def test_text_encoder_keys_are_told_of(cli, tmp_path, model):
    adapter(tmp_path / "a.safetensors", "kohya", {LINEAR: LAYERS[LINEAR]}, 1.0)
    tensors = safetensors_numpy.load_file(tmp_path / "a.safetensors") | {"lora_te_layer.alpha": np.ones((), np.float32)}
    safetensors_numpy.save_file(tensors, tmp_path / "a.safetensors")
    done = cli("quantize", model[0], "-o", tmp_path / "q", "--modality", "image", "--lora", tmp_path / "a.safetensors", "--json")
    assert done.code == 0 and any("text encoder" in w and "lora_te_layer.alpha" in w for w in done.json["warnings"])


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (lambda t: t.pop("lora_unet_blocks_0_attn_to_q.lora_up.weight"), 3, "only one of the layer's two matrices"),
        (lambda t: t.update({"lora_unet_blocks_0_attn_to_q.lora_up.weight": np.ones((95, 8), np.float32)}), 3, "do not make a change of a weight [96, 64]"),
        (lambda t: t.update({"lora_unet_blocks_0_attn_to_q.lora_down.weight": np.ones((7, 64), np.float32)}), 3, "do not make a change"),
        (lambda t: t.update({"lora_unet_blocks_0_attn_to_q.alpha": np.ones(2, np.float32)}), 3, "is not one number"),
        (lambda t: t.update({"lora_unet_blocks_0_attn_to_q.alpha": np.array(np.inf, np.float32)}), 3, "not a finite number"),
        (lambda t: t.update({"lora_unet_blocks_0_attn_to_q.hada_w1_a": np.ones((8, 8), np.float32)}), 3, "cannot be merged here"),
        (lambda t: t.update({"lora_unet_blocks_0_attn_to_q.dora_scale": np.ones(8, np.float32)}), 3, "cannot be merged here"),
        (lambda t: t.update({"blocks.0.attn.to_q.lora_A.weight": np.ones((8, 64), np.float32)}), 3, "another such matrix"),
    ],
)
def test_wrong_adapters_are_refused_in_words(cli, tmp_path, model, change, code, text):
    adapter(tmp_path / "a.safetensors", "kohya", {LINEAR: LAYERS[LINEAR]}, 1.0)
    tensors = safetensors_numpy.load_file(tmp_path / "a.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, tmp_path / "a.safetensors")
    done = cli("quantize", model[0], "-o", tmp_path / "q", "--modality", "image", "--lora", tmp_path / "a.safetensors", "--json")
    assert done.code == code and text in done.json["error"]["message"], done.json


def test_a_strength_that_is_none_and_a_missing_file_are_refused(cli, tmp_path, model):
    assert "is no strength" in cli("quantize", model[0], "--lora", f"{tmp_path}/a.safetensors:strong", "--json").json["error"]["message"]
    assert cli("quantize", model[0], "--lora", tmp_path / "none.safetensors", "--json").code == 6


def test_an_interrupted_state_of_other_adapters_is_not_continued(cli, tmp_path, model):
    """The adapters and their strengths are part of what identifies a run: the bytes differ, and so do the containers."""
    adapter(tmp_path / "a.safetensors", "kohya", {LINEAR: LAYERS[LINEAR]}, 1.0)
    outs = []
    for i, strength in enumerate(("1", "1.0", "0.9")):
        assert cli("quantize", model[0], "-o", tmp_path / f"q{i}", "--modality", "image", "--lora", f"{tmp_path}/a.safetensors:{strength}").code == 0
        outs.append((tmp_path / f"q{i}" / "model-00001-of-00001.parquet").read_bytes())
    assert outs[0] == outs[1] != outs[2]


def test_export_with_source_wants_the_same_adapters(cli, tmp_path, model):
    adapter(tmp_path / "a.safetensors", "kohya", {LINEAR: LAYERS[LINEAR]}, 8.0)
    assert cli("quantize", model[0], "-o", tmp_path / "q", "--modality", "image", "--lora", tmp_path / "a.safetensors").code == 0
    without = cli("export", tmp_path / "q", "--to", "gguf", "-o", tmp_path / "m.gguf", "--type", "q8_0", "--source", model[0], "--json")
    assert without.code == 2 and "adapters" in without.json["error"]["message"]
    done = cli(
        "export",
        tmp_path / "q",
        "--to",
        "gguf",
        "-o",
        tmp_path / "m.gguf",
        "--type",
        "q8_0",
        "--source",
        model[0],
        "--lora",
        tmp_path / "a.safetensors",
        "--json",
    )
    entry = {t["name"]: t for t in done.json["recoding"]["tensors"]}[f"{LINEAR}.weight"]
    assert done.code == 0 and entry["from"] == "source" and entry["sqnr_db"] > 40


def test_peft_itself_merges_to_the_same_weights(cli, tmp_path):
    """An adapter that PEFT trained and saved, merged by PEFT and by us."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Sequential()
    module.add_module("blocks", torch.nn.ModuleList([torch.nn.ModuleDict({"to_q": torch.nn.Linear(64, 96), "conv": torch.nn.Conv2d(16, 32, 3)})]))
    source = {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}
    safetensors_numpy.save_file(source, tmp_path / "m.safetensors")
    wrapped = peft.get_peft_model(module, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv"], use_rslora=True))
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    fused = {name: value.detach().numpy() for name, value in wrapped.merge_and_unload().state_dict().items()}
    assert cli("quantize", tmp_path / "m.safetensors", "-o", tmp_path / "q", "--modality", "image", "--exclude", "*", "--lora", tmp_path / "adapter").code == 0
    assert cli("export", tmp_path / "q", "--to", "safetensors", "-o", tmp_path / "q.safetensors").code == 0
    got = safetensors_numpy.load_file(tmp_path / "q.safetensors")
    for name, value in fused.items():
        assert np.abs(got[name] - value).max() < 1e-6, name
    assert np.abs(got["blocks.0.to_q.weight"] - source["blocks.0.to_q.weight"]).max() > 0.01


@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_diffusers_fuses_to_the_same_weights(cli, tmp_path, style):
    """Two adapters with strengths, saved as diffusers saves them and under kohya's names, fused by a small Flux pipeline and merged here."""
    torch, diffusers, peft = pytest.importorskip("torch"), pytest.importorskip("diffusers"), pytest.importorskip("peft")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(3)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "flux")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    targets, strengths, files = ["to_q", "to_out.0", "proj_mlp", "ff.net.2"], (0.75, -1.5), []
    for i, alpha in enumerate((6, 4)):
        probe = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "flux", local_files_only=True)
        probe.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
        for name, value in probe.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
        state = peft.get_peft_model_state_dict(probe)
        folder = tmp_path / f"adapter{i}"
        theirs = tmp_path / f"theirs{i}"
        metadata = {"r": 4, "lora_alpha": alpha, "target_modules": targets}
        diffusers.FluxPipeline.save_lora_weights(theirs, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata)
        if style == "kohya":
            folder.mkdir()
            renamed = {}
            for key, value in state.items():
                base, _, part = key.rpartition(".lora_")
                flat = "lora_transformer_" + base.replace(".", "_")
                renamed[f"{flat}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value.detach().numpy()
                renamed[f"{flat}.alpha"] = np.array(alpha, np.float32)
            safetensors_numpy.save_file(renamed, folder / "pytorch_lora_weights.safetensors")
        files.append(theirs if style == "peft" else folder)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(transformer=model, **parts)
    for i in range(2):
        pipe.load_lora_weights(tmp_path / f"theirs{i}", adapter_name=f"a{i}", local_files_only=True)
    pipe.set_adapters(["a0", "a1"], adapter_weights=list(strengths))
    pipe.fuse_lora(components=["transformer"], adapter_names=["a0", "a1"])
    pipe.unload_lora_weights()
    fused = {k: v.detach().numpy() for k, v in pipe.transformer.state_dict().items()}
    options = [x for f, s in zip(files, strengths, strict=True) for x in ("--lora", f"{f}:{s}")]
    done = cli("quantize", tmp_path / "flux", "-o", tmp_path / "q", "--modality", "image", "--exclude", "*", *options)
    assert done.code == 0, done.err
    assert cli("export", tmp_path / "q", "--to", "safetensors", "-o", tmp_path / "q.safetensors").code == 0
    got, changed = safetensors_numpy.load_file(tmp_path / "q.safetensors"), 0
    assert got.keys() == fused.keys()
    for name, value in fused.items():
        assert np.abs(got[name] - value).max() < 1e-6, name
        changed += np.abs(got[name] - before[name].numpy()).max() > 0.01
    assert changed == 5  # to_q of both blocks, to_out.0, proj_mlp, ff.net.2
