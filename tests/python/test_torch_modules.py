"""arrow_quant_v2.torch: layers over packed codes give what the container dequantizes to, load by strict names, and behave as torch modules do."""

import copy
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import arrow_quant_v2 as aq  # noqa: E402
from arrow_quant_v2 import _core  # noqa: E402
from arrow_quant_v2.torch import QuantConv, QuantLinear, StoredForm, load_into, ops, quantize_module, stored  # noqa: E402
from helpers import decibels, layer_inputs  # noqa: E402

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "dit-fashion"
FORMS = [
    StoredForm(8, 64, "f16"),
    StoredForm(4, 128, "f16"),
    StoredForm(4, 32, "f32"),
    StoredForm(4, 256, "two-level"),
    StoredForm(2, 64, "f16"),
    StoredForm(2, 256, "two-level"),
]


def dit():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DiTTransformer2DModel.from_pretrained(SAMPLE, subfolder="transformer", local_files_only=True).eval()


def run(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((2, 1, 28, 28), generator=g)
    with torch.no_grad():
        return model(x, timestep=torch.tensor([10, 900]), class_labels=torch.tensor([1, 7])).sample


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    out = tmp_path_factory.mktemp("torch") / "int4"
    aq.quantize(SAMPLE, out, bits=4, group=64)
    return out


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("cols", [64, 300, 256])
def test_torch_operations_unpack_the_bits_that_the_library_does(form, cols):
    weight = torch.randn((37, cols), generator=torch.Generator().manual_seed(cols))
    qweight, qparams, found = stored.quantize_weight(weight, form)
    assert found == form and form.row_bytes(cols) == (qweight.shape[1], qparams.shape[1])
    ours = torch.from_numpy(_core._dequantize_stored(qweight.numpy(), qparams.numpy(), 37, cols, form.bits, form.group_size, form.params)).view(37, cols)
    assert torch.equal(stored.unpack(qweight, qparams, form, cols), ours)
    assert (ours - weight).square().mean() < 0.2


def test_values_beyond_half_precision_are_stored_with_float32_parameters():
    _, _, form = stored.quantize_weight(torch.full((2, 64), 1e6), StoredForm(4, 64, "f16"))
    assert form.params == "f32"


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_linear_layer_multiplies_by_the_values_it_stands_for(form, rows):
    torch.manual_seed(rows)
    linear = torch.nn.Linear(300, 40)
    layer = QuantLinear.from_linear(linear, form)
    x = torch.randn(rows, 300)
    exact = torch.from_numpy(layer_inputs(x.numpy())).double() @ layer.matrix().double().T + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-4)
    assert layer(x.view(rows, 1, 300)).shape == (rows, 1, 40)


def test_a_bias_of_another_size_is_refused():
    """What lies behind a short one is never read, on the way past torch's dispatcher either."""
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 8), StoredForm(bits=4, group_size=64))
    layer.bias = torch.nn.Parameter(torch.zeros(2))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError):
            layer(torch.zeros(1, 64))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_other_devices_multiply_in_torch_operations_alone(form):
    """What a GPU runs, called here on the CPU: the same product, from operations that every device has; on the meta device it gives shape and type."""
    g = torch.Generator().manual_seed(4)
    layer = QuantLinear.from_linear(torch.nn.Linear(256, 96), form).requires_grad_(False)
    x = torch.randn((5, 7, 256), generator=g)
    rounded = torch.from_numpy(layer_inputs(x.numpy()))
    anywhere = ops._linear_anywhere(rounded, layer.qweight, layer.qparams, layer.bias, form.bits, form.group_size, form.params)
    torch.testing.assert_close(anywhere, layer(x), rtol=1e-5, atol=1e-5)
    there = copy.deepcopy(layer).to("meta")(x.to("meta", torch.bfloat16))
    assert there.device.type == "meta" and there.shape == (5, 7, 96) and there.dtype == torch.bfloat16


def test_gradients_reach_the_input_and_the_bias():
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 16), StoredForm(8, 64, "f16"))
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    y = (torch.from_numpy(layer_inputs(x.detach().numpy())) @ layer.matrix().T + layer.bias.detach()).requires_grad_()
    expected = 2 * y.detach() @ layer.matrix()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, 2 * y.detach().sum(0), rtol=1e-4, atol=1e-4)


def test_the_operators_pass_torchs_own_checks():
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 16), StoredForm(4, 64, "f16"))
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(ops.linear, (x, layer.qweight, layer.qparams, layer.bias.detach(), 4, 64, "f16"))
    torch.library.opcheck(ops.unpacked, (layer.qweight, layer.qparams, 64, 4, 64, "f16"))


def test_compiled_layers_give_the_same():
    layers = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    for i in (0, 2):
        layers[i] = QuantLinear.from_linear(layers[i], StoredForm(4, 64, "f16"))
    x = torch.randn(4, 64)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layers(x))


def test_autocast_gives_its_dtype():
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 16), StoredForm(4, 64, "f16"))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype is torch.bfloat16


def test_casting_the_module_leaves_the_codes_alone():
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 16), StoredForm(4, 64, "f16"))
    before = layer.matrix()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.matrix(), before) and layer.bias.dtype is torch.bfloat16
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_nothing_is_called_weight():
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 16), StoredForm(4, 64, "f16"))
    assert set(layer.state_dict()) == {"qweight", "qparams", "bias"}
    other = QuantLinear(64, 16, layer.form, torch.nn.Parameter(torch.zeros(16)))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kind,size", [(torch.nn.Conv1d, (9,)), (torch.nn.Conv2d, (9, 8)), (torch.nn.Conv3d, (5, 6, 7))])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_convolutions_of_each_rank(kind, size, mode, tmp_path):
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"conv": kind(16, 32, 3, padding=1, stride=2, padding_mode=mode), "linear": torch.nn.Linear(64, 64)})
    plain = copy.deepcopy(module)
    quantize_module(module, bits=8, group=64, modality="image", include=["conv.weight"])
    assert isinstance(module["conv"], QuantConv) and isinstance(module["linear"], QuantLinear)
    x = torch.randn(2, 16, *size)
    plain["conv"].weight.data = module["conv"].matrix().view_as(plain["conv"].weight)
    torch.testing.assert_close(module["conv"](x), plain["conv"](x))


def test_load_into_gives_the_model_that_the_container_stands_for(container):
    model, plain = load_into(dit(), container), dit()
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 42
    with aq.open(container) as reader:
        values = {name: torch.from_numpy(np.array(reader[name].dequantize())) for name in reader}
    plain.load_state_dict(values)

    def check(name):
        def compare(layer, inputs, output):
            expected = torch.nn.functional.linear(torch.from_numpy(layer_inputs(inputs[0].numpy())), values[name + ".weight"], layer.bias)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            checked.add(name)

        return compare

    checked = set()
    hooks = [part.register_forward_hook(check(name)) for name, part in model.named_modules() if isinstance(part, QuantLinear)]
    got = run(model)
    assert len(checked) == 42 and decibels(run(plain), got) > 70
    for hook in hooks:
        hook.remove()
    assert not torch.equal(run(model), run(dit()))


def test_codes_stay_in_the_memory_map(container):
    model = load_into(dit(), container)
    own = sum(t.untyped_storage().nbytes() for t in model.state_dict().values())
    size = sum(f.stat().st_size for f in container.glob("*.parquet"))
    assert own <= 1.1 * size


def test_a_module_on_the_meta_device_is_filled(container):
    accelerate = pytest.importorskip("accelerate")
    diffusers = pytest.importorskip("diffusers")
    config = diffusers.DiTTransformer2DModel.load_config(SAMPLE, subfolder="transformer", local_files_only=True)
    with accelerate.init_empty_weights():
        model = diffusers.DiTTransformer2DModel.from_config(config).eval()
    load_into(model, container)
    assert torch.equal(run(model), run(load_into(dit(), container)))


def test_names_are_strict_and_nothing_changes_on_failure(container):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"names differ: the module has no .* and \d+ more; the model has no 0.bias, 0.weight"):
        load_into(model, container)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_shapes_are_checked_before_anything_changes(container):
    model = dit()
    model.transformer_blocks[5].ff.net[2] = torch.nn.Linear(192, 192)
    with pytest.raises(aq.ShapeMismatchError, match=r"transformer_blocks.5.ff.net.2.weight.*\[192, 768\].*\[192, 192\]"):
        load_into(model, container)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_a_lone_layer_is_refused_in_words_and_works_inside_a_parent():
    layer = torch.nn.Linear(128, 64)
    with pytest.raises(ValueError, match=r"itself the layer .* nn\.Sequential"):
        quantize_module(layer, bits=8, modality="image")
    assert type(layer) is torch.nn.Linear
    assert isinstance(quantize_module(torch.nn.Sequential(layer), bits=8, modality="image")[0], QuantLinear)


def test_quantize_module_is_the_same_job(container):
    module = quantize_module(dit(), bits=4, group=64, modality="image")
    assert torch.equal(run(module), run(load_into(dit(), container)))


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(aq.ModelNotFoundError):
        load_into(dit(), tmp_path / "nothing")


@pytest.mark.parametrize("size", [4, 16, 64])
def test_the_rotation_is_its_own_inverse_on_every_path(size):
    x = torch.randn(3, 5, 192, generator=torch.Generator().manual_seed(size))
    rotated = ops.rotate(x, size)
    torch.testing.assert_close(ops.rotate(rotated, size), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops._rotate_anywhere(x, size), rotated, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rotated, x)


def test_loading_with_integer_activations(container):
    from arrow_quant_v2.torch import IntegerLinear

    model = load_into(dit(), container, activations="dynamic")
    assert sum(isinstance(m, IntegerLinear) for m in model.modules()) == 42
    plain = run(load_into(dit(), container))
    error = (run(model) - plain).square().sum() / plain.square().sum()
    assert 0 < error < 1e-2
    with pytest.raises(ValueError, match="no QuantLinear with time groups"):
        load_into(dit(), container, activations="time")


def test_tied_weights_stay_tied(tmp_path):
    def make():
        module = torch.nn.ModuleDict({"tokens": torch.nn.Embedding(64, 64), "body": torch.nn.Linear(64, 64), "head": torch.nn.Linear(64, 64, bias=False)})
        module["head"].weight = module["tokens"].weight
        return module

    from safetensors.torch import save_file

    source = make()
    save_file({name: value.detach() for name, value in source.named_parameters()}, tmp_path / "m.safetensors")
    aq.quantize(tmp_path / "m.safetensors", tmp_path / "q", bits=8, group=64, exclude=["tokens.weight"])
    loaded = load_into(make(), tmp_path / "q")
    assert loaded["head"].weight is loaded["tokens"].weight and torch.equal(loaded["tokens"].weight, source["tokens"].weight)
    assert isinstance(loaded["body"], QuantLinear)
