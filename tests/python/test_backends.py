"""The quantization backends of diffusers and transformers: quantize on load, save, reload, run; refusals in words."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

import arrow_quant_v2 as aq  # noqa: E402
import arrow_quant_v2.diffusers as ours  # noqa: E402
from arrow_quant_v2.torch import QuantLinear, load_into  # noqa: E402
from helpers import decibels  # noqa: E402

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "dit-fashion"
DiT = diffusers.DiTTransformer2DModel


class PixelPipeline(diffusers.DiffusionPipeline):
    """Samples of the sample model, which works on pixels: DiTPipeline without the autoencoder."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, labels, steps=4, seed=0):
        x = torch.randn((len(labels), 1, 28, 28), generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            noise = self.transformer(x, timestep=t.repeat(len(labels)), class_labels=torch.tensor(labels)).sample
            x = self.scheduler.step(noise, t, x).prev_sample
        return x


def load(path, **settings):
    return DiT.from_pretrained(path, local_files_only=True, **settings).eval()


def sample(path, **settings):
    return PixelPipeline.from_pretrained(path, local_files_only=True, **settings)


def n_layers(model):
    return sum(isinstance(m, QuantLinear) for m in model.modules())


def matrices(model):
    """What each layer stands for, by name."""
    return {name: part.matrix() for name, part in model.named_modules() if isinstance(part, QuantLinear)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The sample model quantized on load and saved: (folder, model)."""
    folder = tmp_path_factory.mktemp("backend") / "dit-int4"
    model = load(SAMPLE, subfolder="transformer", quantization_config=ours.ArrowQuantConfig(bits=4, group=64))
    model.save_pretrained(folder)
    return folder, model


def test_quantizing_on_load_gives_the_layers_of_the_command_line(saved, tmp_path):
    aq.quantize(SAMPLE, tmp_path / "q", bits=4, group=64, method="search")
    other = load_into(load(SAMPLE, subfolder="transformer"), tmp_path / "q")
    assert n_layers(saved[1]) == n_layers(other) == 42
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in saved[1].state_dict().items())


def test_a_saved_folder_loads_without_being_told(saved):
    folder, model = saved
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "arrowquant" and config["bits"] == 4 and len(config["layers"]) == 42
    again = load(folder)
    assert n_layers(again) == 42
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_pipeline_draws_the_same_images_from_the_reloaded_folder(tmp_path):
    mapping = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": ours.ArrowQuantConfig(bits=4, group=64)})
    pipe = sample(SAMPLE, quantization_config=mapping)
    assert n_layers(pipe.transformer) == 42
    pipe.save_pretrained(tmp_path / "pipe")
    images = pipe([0, 5, 9])
    assert torch.equal(sample(tmp_path / "pipe")([0, 5, 9]), images)
    assert not torch.equal(sample(SAMPLE)([0, 5, 9]), images)


def test_a_reloaded_folder_in_half_precision_keeps_its_codes(saved):
    half = load(saved[0], torch_dtype=torch.bfloat16)
    name = "transformer_blocks.0.ff.net.2"
    assert torch.equal(half.get_submodule(name).qweight, saved[1].get_submodule(name).qweight)
    assert half.pos_embed.proj.weight.dtype is torch.bfloat16
    assert half.get_submodule(name).bias.dtype is torch.bfloat16


@pytest.mark.parametrize("bits,params", [(8, "auto"), (2, "auto"), (4, "two-level"), (4, "f32")])
def test_other_forms_come_back_as_well(bits, params, tmp_path):
    model = load(SAMPLE, subfolder="transformer", quantization_config=ours.ArrowQuantConfig(bits=bits, group=64, params=params, method="rtn"))
    model.save_pretrained(tmp_path)
    again = load(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_modules_not_to_convert_stay(tmp_path):
    model = load(SAMPLE, subfolder="transformer", quantization_config=ours.ArrowQuantConfig(modules_to_not_convert=["ff.net", "to_q"]))
    assert n_layers(model) == 42 - 6 * 3
    model.save_pretrained(tmp_path)
    assert n_layers(load(tmp_path)) == 42 - 6 * 3


def test_dequantize_puts_plain_layers_back(saved):
    model = load(saved[0])
    x = dict(hidden_states=torch.randn(1, 1, 28, 28), timestep=torch.tensor([5]), class_labels=torch.tensor([1]))
    with torch.no_grad():
        before = model(**x).sample
        values = matrices(model)
        after = model.dequantize()(**x).sample
    assert n_layers(model) == 0 and len(values) == 42
    assert all(torch.equal(model.get_submodule(name).weight, value) for name, value in values.items())
    assert decibels(after, before) > 70  # inputs of 16 bits


def test_bad_settings_are_named():
    with pytest.raises(aq.ConfigurationError, match="Invalid bit width: 3"):
        ours.ArrowQuantConfig(bits=3)
    with pytest.raises(aq.ConfigurationError, match="Invalid group size: 17"):
        ours.ArrowQuantConfig(group=17)
    with pytest.raises(aq.ConfigurationError, match="'search' or 'rtn'.*load_into"):
        ours.ArrowQuantConfig(method="gptq")


def test_keys_of_a_newer_version_are_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="unknown keys.*codebook"):
        config = ours.ArrowQuantConfig(codebook=3)
    assert config.to_diff_dict() == {"quant_method": "arrowquant"}


def test_a_config_of_another_model_is_refused(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"]["layers"]["transformer_blocks.77.ff"] = {"bits": 4}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(aq.FormatError, match="transformer_blocks.77.ff.*another model"):
        load(tmp_path / "other")


def test_importing_twice_registers_once_and_another_owner_is_refused():
    import importlib

    importlib.reload(ours)
    code = "from diffusers.quantizers import auto\nclass Theirs: pass\nauto.AUTO_QUANTIZER_MAPPING['arrowquant'] = Theirs\nimport arrow_quant_v2.diffusers\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "already has a quantization backend 'arrowquant'" in done.stderr


def test_without_the_import_diffusers_refuses_the_folder(saved):
    code = f"from diffusers import DiTTransformer2DModel as D; D.from_pretrained({str(saved[0])!r}, local_files_only=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "Unknown quantization type" in done.stderr


# ---- transformers ----


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=100)
    models = {
        "t5": transformers.T5EncoderModel(transformers.T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, **sizes)),
        "clip": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2, bos_token_id=1, **sizes
            )
        ),
        "masked-lm": transformers.BertForMaskedLM(
            transformers.BertConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, **sizes)
        ),
    }
    folder = tmp_path_factory.mktemp("encoders")
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
    return folder, models


def hidden(model):
    ids = torch.arange(32).view(2, 16) % 97 + 3
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize("name", ["t5", "clip", "masked-lm"])
def test_transformers_quantizes_saves_and_reloads(encoders, name, tmp_path):
    import arrow_quant_v2.transformers as backend

    folder, models = encoders
    model = type(models[name]).from_pretrained(folder / name, quantization_config=backend.ArrowQuantConfig(bits=8, group=64)).eval()
    assert n_layers(model) >= 10
    error = (hidden(model) - hidden(models[name])).square().sum() / hidden(models[name]).square().sum()
    assert 0 < error < 1e-3
    model.save_pretrained(tmp_path / "saved")
    assert "RANDOM" in backend.__doc__ and "import arrow_quant_v2.transformers" in (tmp_path / "saved" / "README.md").read_text()
    again = type(models[name]).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(hidden(again), hidden(model))
    values, plain = matrices(again), again.dequantize()
    assert all(torch.equal(plain.get_submodule(name).weight, value) for name, value in values.items())
    assert decibels(hidden(plain), hidden(model)) > 70  # inputs of 16 bits


def test_both_libraries_take_the_same_settings(tmp_path):
    import inspect

    pytest.importorskip("transformers")
    backend = pytest.importorskip("arrow_quant_v2.transformers")
    assert inspect.signature(backend.ArrowQuantConfig.__init__) == inspect.signature(ours.ArrowQuantConfig.__init__)
    assert backend.ArrowQuantConfig(bits=2).to_diff_dict() == ours.ArrowQuantConfig(bits=2).to_diff_dict()
    config = diffusers.PipelineQuantizationConfig(quant_backend="arrowquant", quant_kwargs={"bits": 4, "group": 64}, components_to_quantize=["transformer"])
    assert n_layers(sample(SAMPLE, quantization_config=config).transformer) == 42


def test_a_reloaded_language_model_generates_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    import arrow_quant_v2.transformers as backend

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, eos_token_id=None
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=backend.ArrowQuantConfig(bits=4, group=64)).eval()
    assert n_layers(model) == 14 and type(model.lm_head) is torch.nn.Linear
    model.save_pretrained(tmp_path / "int4")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "int4").eval()
    start = torch.tensor([[5, 17, 33]])
    tokens = model.generate(start, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == 23 and torch.equal(again.generate(start, max_new_tokens=20, do_sample=False, pad_token_id=0), tokens)
