"""What `arrowquant export --to gguf` writes, read back by the `gguf` package and by diffusers' GGUF loader.

Given a container, when it is exported, then the readers see the names and shapes of the source, dequantize blocks to exactly what our codes and the format's
definition say, and layers that were coded anew carry the error that the report states.
"""

import numpy as np
import pytest
from program import arrowquant, sqnr_db

gguf = pytest.importorskip("gguf")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Rows of 512, one of 96, one of 40 columns, a convolution, five dimensions, kept tensors of every kind."""
    rng = np.random.default_rng(5)
    tensors = {
        "blocks.0.attn.to_q.weight": rng.standard_normal((24, 512), np.float32) * 0.05,
        "blocks.0.ff.weight": rng.standard_t(4, (32, 256)).astype(np.float32) * 0.1,
        "blocks.0.narrow.weight": rng.standard_normal((48, 96), np.float32),
        "blocks.0.odd.weight": rng.standard_normal((128, 40), np.float32),
        "blocks.0.conv.weight": rng.standard_normal((32, 16, 3, 3), np.float32),
        "blocks.0.tiny.weight": rng.standard_normal((16, 256), np.float32) * 1e-6,
        "patch_embedding.weight": rng.standard_normal((6, 4, 1, 2, 2), np.float32),
        "blocks.0.norm.weight": rng.standard_normal(512, np.float32),
        "blocks.0.attn.to_q.bias": rng.standard_normal(24, np.float32),
        "steps": np.arange(10, dtype=np.int64),
        "scalar": np.array(3.5, np.float32),
    }
    tensors["blocks.0.attn.to_q.weight"][3, 64:128] = 0
    tensors["blocks.0.ff.weight"][5, :32] = 0.25
    tensors["blocks.0.ff.weight"][6, 32:64] = np.linspace(-1, 0, 32)
    path = tmp_path_factory.mktemp("gguf") / "m.safetensors"
    safetensors_numpy.save_file(tensors, path)
    return path, tensors


def quantized(source, name, *options):
    out = source[0].parent / name
    if not out.exists():
        arrowquant("quantize", source[0], "-o", out, "--modality", "image", *options)
    return out


def exported(container, *options, name="m.gguf"):
    out = container.parent / f"{container.name}-{len(list(container.parent.iterdir()))}-{name}"
    report = arrowquant("export", container, "--to", "gguf", "-o", out, *options)
    reader = gguf.GGUFReader(out)
    return report, reader, {t.name: t for t in reader.tensors}


def values(tensor):
    shape = tuple(reversed(tensor.shape.tolist()))
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def lines(container):
    """Per layer: what the stored codes mean on the line w = s q + o, in F32 as the block formats define it, and as we dequantize them."""
    rows = pq.read_table(next(iter(container.glob("*.parquet")))).to_pylist()
    out = {}
    for row in rows:
        if not row["quant_type"].startswith("int"):
            continue
        bits, shape = row["bit_width"], (row["shape"][0], int(np.prod(row["shape"][1:])))
        packed = np.frombuffer(row["data"], np.uint8).reshape(shape[0], -1)
        codes = np.stack([packed >> k & (1 << bits) - 1 for k in range(0, 8, bits)], -1).reshape(shape[0], -1)[:, : shape[1]].astype(np.float32)
        out[row["layer_name"]] = codes, row
    return out


def expand(row, cols):
    """Scale and offset of every weight, from the stored halves."""
    halves = np.frombuffer(row["params"], np.float16).astype(np.float32).reshape(row["shape"][0], -1, 2)
    return [np.repeat(halves[:, :, i], row["group_size"] or cols, 1)[:, :cols] for i in (0, 1)]


@pytest.mark.parametrize(("bits", "type_name"), [(4, "Q4_0"), (8, "Q8_0")])
def test_symmetric_codes_come_back_to_the_last_bit(source, bits, type_name):
    container = quantized(source, f"sym{bits}", "--bits", bits, "--sym", "--group", 64, "--params", "f16", "--exclude", "*tiny*")
    report, _, tensors = exported(container)
    for name, (codes, row) in lines(container).items():
        if codes.shape[1] % 32 or len(row["shape"]) != 2:
            continue
        assert tensors[name].tensor_type.name == type_name
        s, _ = expand(row, codes.shape[1])
        assert np.array_equal(values(tensors[name]), (codes - 2 ** (bits - 1)) * s), name
    entry = {t["name"]: t for t in report["recoding"]["tensors"]}["blocks.0.ff.weight"]
    assert entry["from"] == "codes" and entry["added_sqnr_db"] is None and entry["codes_kept"] == 1


def test_asymmetric_codes_are_taken_over_as_q4_1(source):
    container = quantized(source, "asym4", "--bits", 4, "--group", 32, "--params", "f16", "--exclude", "*tiny*")
    report, _, tensors = exported(container)
    for name, (codes, row) in lines(container).items():
        if codes.shape[1] % 32 or len(row["shape"]) != 2:
            continue
        assert tensors[name].tensor_type.name == "Q4_1"
        s, o = expand(row, codes.shape[1])
        assert np.array_equal(values(tensors[name]), s * codes + o), name
        assert {t["name"]: t for t in report["recoding"]["tensors"]}[name]["added_sqnr_db"] > 130
    assert report["recoding"]["n_dequantized"] == 0


@pytest.mark.parametrize(("bits", "type_name"), [(2, "Q2_K"), (4, "Q4_K")])
@pytest.mark.parametrize("params", ["two-level", "f16"])
def test_groups_of_256_are_k_blocks(source, bits, type_name, params):
    container = quantized(source, f"k{bits}{params}", "--bits", bits, "--group", 256, "--params", params, "--exclude", "*tiny*")
    report, _, tensors = exported(container, "--type", type_name.lower())
    entries = {t["name"]: t for t in report["recoding"]["tensors"]}
    for name in ("blocks.0.attn.to_q.weight", "blocks.0.ff.weight"):
        assert tensors[name].tensor_type.name == type_name
        assert entries[name]["from"] == "codes" and entries[name]["added_sqnr_db"] > 120, entries[name]
    assert entries["blocks.0.narrow.weight"]["type"] == "Q4_1" and "multiple of 256" in entries["blocks.0.narrow.weight"]["refused"]
    assert entries["blocks.0.odd.weight"]["type"] == "F16" and entries["blocks.0.conv.weight"]["type"] == "F16"


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "q4_1", "q4_k", "q2_k"])
@pytest.mark.parametrize("with_source", [False, True])
def test_the_reported_error_is_that_of_the_file(source, type_name, with_source):
    container = quantized(source, "asym8", "--bits", 8, "--group", 128, "--nonfinite", "error")
    report, _, tensors = exported(container, "--type", type_name, *(["--source", source[0]] if with_source else []))
    plain = source[0].parent / "asym8.safetensors"
    if not plain.exists():
        arrowquant("export", container, "--to", "safetensors", "--dtype", "f32", "-o", plain)
    dequantized = safetensors_numpy.load_file(plain)
    for entry in report["recoding"]["tensors"]:
        name, got = entry["name"], values(tensors[entry["name"]])
        assert got.shape == source[1][name].shape
        assert entry["added_sqnr_db"] == pytest.approx(sqnr_db(dequantized[name], got), abs=0.01), name
        if with_source:
            assert entry["sqnr_db"] == pytest.approx(sqnr_db(source[1][name], got), abs=0.01), name
    assert report["recoding"]["n_dequantized"] == (0 if with_source else 4)
    assert any("added error" in w for w in report["warnings"]) == (not with_source)


@pytest.mark.parametrize(("type_name", "least_gain_db"), [("q8_0", 0.0), ("q4_0", 0.3), ("q4_1", 0.5)])
def test_encoders_beat_rounding_to_nearest(source, type_name, least_gain_db):
    """Against the reference quantizer of the gguf package, on the same weights."""
    container = quantized(source, "asym8", "--bits", 8, "--group", 128)
    _, _, tensors = exported(container, "--type", type_name, "--source", source[0])
    for name in ("blocks.0.attn.to_q.weight", "blocks.0.ff.weight", "blocks.0.narrow.weight"):
        kind = gguf.GGMLQuantizationType[type_name.upper()]
        theirs = gguf.dequantize(gguf.quantize(source[1][name], kind), kind)
        assert sqnr_db(source[1][name], values(tensors[name])) > sqnr_db(source[1][name], theirs) + least_gain_db, name


def test_what_is_not_coded_is_f16_and_f32(source):
    container = quantized(source, "asym4", "--bits", 4, "--group", 32, "--params", "f16", "--exclude", "*tiny*")
    _, reader, tensors = exported(container)
    assert set(tensors) == set(source[1])
    assert tensors["blocks.0.norm.weight"].tensor_type.name == "F32" and np.array_equal(
        values(tensors["blocks.0.norm.weight"]), source[1]["blocks.0.norm.weight"]
    )
    assert np.array_equal(tensors["blocks.0.tiny.weight"].data, source[1]["blocks.0.tiny.weight"].astype(np.float16))
    assert np.array_equal(tensors["steps"].data, source[1]["steps"])
    assert values(tensors["scalar"]).tolist() == [3.5]
    video = tensors["patch_embedding.weight"]
    assert video.shape.tolist() == [2, 2, 1, 24]  # ggml has four dimensions
    assert reader.get_field("comfy.gguf.orig_shape.patch_embedding.weight").contents() == [6, 4, 1, 2, 2]
    assert np.array_equal(values(video).reshape(6, 4, 1, 2, 2), source[1]["patch_embedding.weight"].astype(np.float16))
    assert reader.get_field("general.file_type").contents() == 3 and reader.get_field("general.quantization_version").contents() == 2


def test_the_same_bytes_at_any_thread_count(source):
    container = quantized(source, "asym8", "--bits", 8, "--group", 128)
    files = []
    for threads in (1, 2, 5):
        out = source[0].parent / f"threads{threads}.gguf"
        arrowquant("export", container, "--to", "gguf", "--type", "q4_k", "--threads", threads, "-o", out)
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("flux", ["double_blocks.0.img_attn.proj.weight"]),
        ("sd3", ["joint_blocks.0.x_block.attn.qkv.weight"]),
        ("sdxl", ["model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.input_blocks.3.0.op.weight"]),
        ("diffusion", ["something.weight"]),
    ],
)
def test_the_architecture_is_told_from_names(tmp_path, family, names):
    safetensors_numpy.save_file({n: np.ones((64, 64), np.float32) * np.arange(64, dtype=np.float32) for n in names}, tmp_path / "m.safetensors")
    arrowquant("quantize", tmp_path / "m.safetensors", "-o", tmp_path / "q", "--modality", "image")
    report = arrowquant("export", tmp_path / "q", "--to", "gguf", "-o", tmp_path / "m.gguf")
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field("general.architecture").contents() == family
    assert any("ComfyUI" in w for w in report["warnings"]) == (family == "diffusion")


def test_names_too_long_for_loaders_are_refused(tmp_path):
    safetensors_numpy.save_file({"x" * 128 + ".weight": np.ones((64, 64), np.float32)}, tmp_path / "m.safetensors")
    arrowquant("quantize", tmp_path / "m.safetensors", "-o", tmp_path / "q", "--modality", "image")
    error = arrowquant("export", tmp_path / "q", "--to", "gguf", "-o", tmp_path / "m.gguf", code=3)["error"]
    assert "127" in error["message"] and not list(tmp_path.glob("*gguf*"))


@pytest.mark.parametrize("type_name", ["auto", "q8_0", "q4_k"])
def test_diffusers_loads_the_file(tmp_path, type_name):
    """A small Flux transformer: diffusers' GGUF loader puts our blocks into its layers, and the model's output is that of the dequantized weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    torch.manual_seed(3)
    config = dict(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=8, joint_attention_dim=64,
        pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    model = diffusers.FluxTransformer2DModel(**config)
    model.save_pretrained(tmp_path / "flux")
    arrowquant("quantize", tmp_path / "flux", "-o", tmp_path / "q", "--bits", 4, "--group", 32, "--modality", "image")
    out = tmp_path / "flux.gguf"
    report = arrowquant("export", tmp_path / "q", "--to", "gguf", "--type", type_name, "-o", out)
    assert len(report["recoding"]["tensors"]) > 10
    loaded = diffusers.FluxTransformer2DModel.from_single_file(
        str(out), config=str(tmp_path / "flux"), quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32), torch_dtype=torch.float32
    )
    tensors = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert set(loaded.state_dict()) == set(tensors)
    plain = {}
    for name, value in loaded.state_dict().items():
        plain[name] = value
        if not hasattr(value, "quant_type"):
            assert np.array_equal(value.numpy(), values(tensors[name])), name
            continue
        assert np.array_equal(value.as_tensor().numpy(), tensors[name].data), name  # the blocks themselves
        plain[name] = diffusers.quantizers.gguf.utils.dequantize_gguf_tensor(value).as_subclass(torch.Tensor).float()  # computes in half precision
        assert np.allclose(plain[name].numpy(), values(tensors[name]), rtol=3e-3, atol=1e-4), name
    assert sum(hasattr(v, "quant_type") for v in loaded.state_dict().values()) == len(report["recoding"]["tensors"])
    model.load_state_dict(plain)
    inputs = dict(
        hidden_states=torch.randn(1, 4, 16), encoder_hidden_states=torch.randn(1, 3, 64), pooled_projections=torch.randn(1, 32), timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3),
    )  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).sample, model(**inputs).sample, atol=1e-5)
