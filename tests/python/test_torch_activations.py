"""Layers on integers in torch: the same figures as linear_integer, one static pair, time groups and dynamic pairs, timesteps of every kind."""

import doctest

import arrow_quant_v2 as aq
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from arrow_quant_v2.torch import IntegerLinear, QuantLinear, StoredForm, TimeContext, integer_activations  # noqa: E402

GROUPS = [{"time_range": (i * 250, (i + 1) * 250), "scale": 0.02 + 0.005 * i, "zero_point": 120.0 + i, "group_size": 64} for i in range(4)]
FORMS = [StoredForm(8, 64, "f16"), StoredForm(4, 64, "two-level"), StoredForm(4, 32, "f32"), StoredForm(2, 32, "r2q")]


def linear(seed=0, n_in=96, n_out=40):
    torch.manual_seed(seed)
    return torch.nn.Linear(n_in, n_out)


class Denoiser(torch.nn.Module):
    """Two layers under a timestep; the second sees tokens flattened into the first axis."""

    def __init__(self):
        super().__init__()
        self.a, self.b = linear(1), linear(2, 40, 8)

    def forward(self, x, timestep):
        return self.b(torch.relu(self.a(x)).flatten(0, 1)).view(*x.shape[:2], 8)


def quantized():
    model = Denoiser().eval()
    model.a, model.b = (QuantLinear.from_linear(m, StoredForm(8, 32)) for m in (model.a, model.b))
    model.a.time_groups = model.b.time_groups = GROUPS
    return model


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.bits}-{f.params}")
@pytest.mark.parametrize("mode", ["time", "static", "dynamic"])
def test_simulated_and_executed_layers_agree_and_approximate_the_layer(form, mode):
    layer, context = QuantLinear.from_linear(linear(), form), TimeContext(1000)
    x = torch.randn(4, 7, 96, generator=torch.Generator().manual_seed(3)) * 0.8
    with context.at(torch.tensor([0, 250, 999, 500])):
        y = IntegerLinear(layer, GROUPS, mode, context)(x)
        simulated = IntegerLinear(layer, GROUPS, mode, context, simulate=True)(x)
    torch.testing.assert_close(y, simulated, rtol=1e-5, atol=1e-5)
    assert aq.sqnr_db(layer(x).detach().numpy(), y.numpy()) > 25


def test_each_sample_of_a_mixed_batch_has_its_own_group():
    layer, context = QuantLinear.from_linear(linear(), StoredForm(8, 32)), TimeContext(1000)
    x, times = torch.randn(5, 3, 96), [0, 249, 250, 999, 600]
    integer = IntegerLinear(layer, GROUPS, context=context)
    with context.at(torch.tensor(times)):
        together, flat = integer(x), integer(x.flatten(0, 1)).view(5, 3, 40)
    for i, t in enumerate(times):
        with context.at(t):
            torch.testing.assert_close(integer(x[i : i + 1])[0], together[i], rtol=0, atol=0)
        alone = IntegerLinear(layer, [GROUPS[t // 250] | {"time_range": (0, 1)}], "static")
        torch.testing.assert_close(alone(x[i]), together[i], rtol=0, atol=0)
    torch.testing.assert_close(flat, together, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (250, [250]),
        (250.0, [250]),
        (torch.tensor(0.25), [250]),
        (np.float32(0.25), [250]),
        (torch.tensor([0.0, 0.25]), [0, 250]),
        (torch.tensor([7, 8]), [7, 8]),
    ],
)
def test_timesteps_may_be_ints_floats_ratios_and_tensors(timestep, expected):
    context = TimeContext(1000)
    with context.at(timestep):
        assert context.steps() == expected
    with pytest.raises(RuntimeError, match="timestep is not known"):
        context.steps()


def test_without_a_timestep_the_default_group_holds_and_one_warning_says_so(monkeypatch):
    layer, x = QuantLinear.from_linear(linear(), StoredForm(8, 32)), torch.randn(5, 96)
    monkeypatch.setattr("arrow_quant_v2.torch.activations.NOWHERE", TimeContext())
    widest = max(GROUPS, key=lambda group: group["scale"])
    expected = IntegerLinear(layer, [widest], "static")(x)
    for context in (None, TimeContext(1000)):
        integer = IntegerLinear(layer, GROUPS, context=context)
        with pytest.warns(RuntimeWarning, match="default group") as told:
            y, again = integer(x), integer(x)
            assert len(told) == 1
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_a_module_runs_in_each_mode_and_timesteps_reach_its_layers():
    model = quantized()
    x, t = torch.randn(2, 3, 96) * 0.5, torch.tensor([100, 900])
    reference = model(x, t).detach()
    context = integer_activations(model, "time")
    assert isinstance(model.a, IntegerLinear) and isinstance(model.a.layer, QuantLinear)
    by_time = model(x, timestep=t)
    torch.testing.assert_close(by_time[:1], model(x[:1], 100), rtol=0, atol=0)  # by position too
    assert (model(x, torch.tensor([900, 900]))[0] != by_time[0]).any()
    assert aq.sqnr_db(reference.numpy(), by_time.detach().numpy()) > 25
    for mode in ("static", "dynamic"):
        assert integer_activations(model, mode) is not context
        assert model.a.mode == mode and isinstance(model.a.layer, QuantLinear)
        assert aq.sqnr_db(reference.numpy(), model(x, timestep=t).detach().numpy()) > 25
    assert model(x.to(torch.bfloat16), timestep=t).dtype == torch.bfloat16


def test_layers_are_given_their_groups_by_name():
    model = quantized()
    model.a.time_groups = model.b.time_groups = None
    with pytest.raises(ValueError, match="no layer runs on integers: the module has no QuantLinear with time groups"):
        integer_activations(model, "time")
    with pytest.raises(ValueError, match="no QuantLinear of the module: c"):
        integer_activations(model, "time", groups={"c": GROUPS})
    integer_activations(model, "time", groups={"a": GROUPS})
    assert isinstance(model.a, IntegerLinear) and isinstance(model.b, QuantLinear)
    with pytest.raises(ValueError, match="no layer runs on integers"):
        integer_activations(Denoiser(), "dynamic")


def test_wrong_arguments_are_told():
    layer = QuantLinear.from_linear(linear(), StoredForm(8, 32))
    with pytest.raises(ValueError, match="Invalid mode: 'x'"):
        IntegerLinear(layer, GROUPS, "x")
    with pytest.raises(ValueError, match="no time groups"):
        IntegerLinear(layer)
    with pytest.raises(ValueError, match="NaN or Inf at index 0"):
        IntegerLinear(layer, GROUPS, "static")(torch.full((1, 96), float("nan")))


def test_a_container_brings_its_time_groups_equalization_and_rotation(tmp_path):
    import pyarrow.parquet as pq
    from arrow_quant_v2.torch import load_into
    from extension import with_extension
    from safetensors.torch import save_file

    model = torch.nn.Sequential(torch.nn.Linear(128, 64))
    names = torch.nn.ModuleDict({"blocks": model})
    save_file(names.state_dict(), tmp_path / "model.safetensors")
    aq.quantize(tmp_path / "model.safetensors", tmp_path / "plain", modality="image", bits=8, spatial=False, time_aware=False, min_accuracy=0)
    (source,) = (tmp_path / "plain").glob("*.parquet")
    (tmp_path / "out").mkdir()
    pq.write_table(with_extension(pq.read_table(source), hadamard=64), tmp_path / "out" / source.name)
    load_into(names, tmp_path / "out")
    x = torch.randn(3, 128) * 0.3
    expected = names["blocks"](x).detach().numpy()
    integer_activations(names, "dynamic")
    assert len(names["blocks"][0].layer.time_groups) == 2
    assert aq.sqnr_db(expected, names["blocks"](x).detach().numpy()) > 35
    context = integer_activations(names["blocks"], "time", timestep=lambda x: 500)
    assert aq.sqnr_db(expected, names["blocks"](x).detach().numpy()) > 5 and context.num_timesteps == 1000


@pytest.mark.parametrize("thing", [IntegerLinear, TimeContext, integer_activations], ids=lambda t: t.__name__)
def test_examples_run(thing):
    test = doctest.DocTestParser().get_doctest(thing.__doc__, {}, thing.__name__, None, None)
    assert test.examples
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0
