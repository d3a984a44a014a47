"""The Recorder: what a running torch module feeds its layers, as NumPy computes it from the same inputs."""

import copy
import pickle
import subprocess
import sys
import warnings

import arrow_quant_v2 as aq
import numpy as np
import pytest
from calibration_checks import check
from files import SAMPLE

torch = pytest.importorskip("torch")
from arrow_quant_v2.torch import Recorder  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402


class Attention(nn.Module):
    """Three layers of one input, one of another: the smallest thing with everything that matters."""

    def __init__(self, width=12):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, timestep=None):
        return self.to_out(torch.softmax(self.to_q(x) * self.to_k(x), -1) * self.to_v(x))


def inputs_of(module, *calls):
    """{weight name: [input of each call]} of the linear layers."""
    seen, handles = {}, []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            key = (name + "." if name else "") + "weight"
            handles.append(part.register_forward_pre_hook(lambda _, args, key=key: seen.setdefault(key, []).append(args[0].detach().clone())))
    with torch.no_grad():
        for args, kwargs in calls:
            module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(autouse=True)
def gaps_are_no_matter():
    """Small runs leave time groups empty, which is told; the tests that are about it look for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no timestep fell into")
        yield


def recorded(module, *calls, **options):
    with torch.no_grad(), Recorder(module, None, **options) as rec:
        for args, kwargs in calls:
            module(*args, **kwargs)
    return rec.collect()


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_layer_of_the_sample_model_has_the_statistics_of_its_inputs():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel.from_pretrained(SAMPLE, subfolder="transformer").eval()
    x, y = seeded(4, 1, 28, 28), torch.tensor([0, 3, 6, 9])
    steps = [torch.tensor([999, 500, 501, 0]), torch.tensor([250, 250, 250, 250])]
    calls = [((x,), {"timestep": t, "class_labels": y}) for t in steps]
    seen, collection = inputs_of(model, *calls), recorded(model, *calls, hessian_full=0)
    assert sorted(collection.layers) == sorted([*seen, "pos_embed.proj.weight"])
    for name, given in seen.items():
        rows = np.concatenate([g.reshape(-1, g.shape[-1]).numpy() for g in given])
        runs = len(given) // len(calls)  # the embedder of block 0 runs twice in a pass
        times = np.concatenate([np.repeat(steps[i // runs].numpy(), g.numel() // g.shape[-1] // 4) for i, g in enumerate(given)])
        check(collection, name, rows, times, 10, 1000)
    names = {collection.source(f"transformer_blocks.2.attn1.to_{part}.weight") for part in "qkv"}
    assert names == {"transformer_blocks.2.attn1.to_q.weight"}
    assert collection.check(SAMPLE) == []  # every layer of the model has its statistics


def flux(diffusers):
    """A small Flux transformer: two streams, then one; timesteps are ratios, everything is given by name."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    ids = {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3), "guidance": torch.full((2,), 3.5)}
    inputs = {"hidden_states": seeded(2, 9, 8), "encoder_hidden_states": seeded(2, 5, 12, seed=1), "pooled_projections": seeded(2, 10, seed=2)}
    return model, {**inputs, **ids}, [torch.tensor([0.999, 0.25]), torch.tensor([0.05, 0.05])], np.array([[999, 250], [50, 50]])


def unet(diffusers):
    """A small UNet with cross attention: convolutions, and layers that read the prompt."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    steps = [torch.tensor([999, 3]), torch.tensor([500, 500])]
    return model, {"sample": seeded(2, 4, 8, 8), "encoder_hidden_states": seeded(2, 5, 12, seed=1)}, steps, np.array([[999, 3], [500, 500]])


@pytest.mark.parametrize("make", [flux, unet])
def test_flux_and_unet_models_are_recorded_whole(make):
    model, inputs, steps, times = make(pytest.importorskip("diffusers"))
    calls = [((), {**inputs, "timestep": t}) for t in steps]
    seen, collection = inputs_of(model.eval(), *calls), recorded(model, *calls, hessian_full=0)
    expected = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    assert set(collection.layers) == expected and all(collection.stats(name, g) for name in expected for g in {999 * 10 // 1000, times[1, 0] * 10 // 1000})
    for name, given in seen.items():
        assert len(given) == len(calls)
        rows = np.concatenate([g.reshape(-1, g.shape[-1]).numpy() for g in given])
        check(collection, name, rows, np.concatenate([np.repeat(times[i], g.numel() // g.shape[-1] // 2) for i, g in enumerate(given)]), 10, 1000)


CONVOLUTIONS = [
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(3, 5, (3, 2), stride=2, padding="valid"),
    nn.Conv2d(3, 5, 4, padding="same", dilation=2),
    nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="circular"),
    nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_convolutions_are_recorded_through_what_unfold_gives(layer):
    module, x = nn.Sequential(layer), seeded(2, 3, 9, 10)
    collection = recorded(module, ((x,), {}), timestep=lambda x: torch.tensor([5, 995]))
    padding = layer.padding
    if padding == "same":
        span = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        x, padding = functional.pad(x, [span[1] // 2, span[1] - span[1] // 2, span[0] // 2, span[0] - span[0] // 2]), 0
    elif layer.padding_mode != "zeros":
        x, padding = functional.pad(x, [p for p in reversed(padding) for _ in range(2)], mode=layer.padding_mode), 0
    rows = functional.unfold(x, layer.kernel_size, layer.dilation, 0 if padding == "valid" else padding, layer.stride).transpose(1, 2)
    check(collection, "0.weight", rows.reshape(-1, rows.shape[-1]).numpy(), np.repeat([5, 995], rows.shape[1]), 10, 1000)


def test_convolutions_of_one_and_three_dimensions_without_a_batch_and_channels_last():
    module = nn.ModuleDict({"one": nn.Conv1d(4, 2, 3), "three": nn.Conv3d(2, 2, 2), "two": nn.Conv2d(3, 2, 2)})
    with torch.no_grad(), Recorder(module, None, timestep=None) as rec:
        module["one"](seeded(4, 10))
        module["three"](seeded(1, 2, 3, 4, 5))
        module["two"](seeded(2, 3, 6, 6).to(memory_format=torch.channels_last))
    counts = {name: rec.calibration.stats(name, 0)["count"] for name in rec.calibration.layers}
    assert counts == {"one.weight": 8, "three.weight": 2 * 3 * 4, "two.weight": 2 * 25}
    rows = functional.unfold(seeded(2, 3, 6, 6), 2).transpose(1, 2).reshape(-1, 12).double()
    np.testing.assert_allclose(rec.calibration.hessian("two.weight"), (rows.T @ rows / len(rows)).numpy(), rtol=1e-4, atol=1e-5)


# ---- timesteps ----


def groups_seen(collection, layer="to_q.weight"):
    return {g: s["count"] for g in range(collection.groups) if (s := collection.stats(layer, g))}


TIMESTEPS = [
    (500, {}, {5: 12}),
    (torch.tensor(500), {}, {5: 12}),
    (torch.tensor([0, 999]), {}, {0: 6, 9: 6}),
    (torch.tensor([[100], [99]]), {}, {1: 6, 0: 6}),
    (torch.tensor([0.999, 0.1]), {}, {9: 6, 1: 6}),  # ratios
    (torch.tensor([1.0, 0.0]), {}, {9: 6, 0: 6}),
    (torch.tensor([981.0, 21.0]), {}, {9: 6, 0: 6}),
    (torch.tensor([0.98, 0.5], dtype=torch.bfloat16), {}, {9: 6, 5: 6}),
    (torch.tensor([1.0, 0.5]), {"scale": 1000}, {0: 12}),
    (1, {}, {0: 12}),
    (np.float32(0.75), {}, {7: 12}),
    ([250, 750], {}, {2: 6, 7: 6}),
    (torch.tensor([39, 20]), {"num_timesteps": 40, "groups": 4}, {3: 6, 2: 6}),
]


@pytest.mark.parametrize("timestep, options, groups", TIMESTEPS)
def test_timesteps_are_found_and_counted_in_their_groups(timestep, options, groups):
    x = seeded(2, 6, 12)
    assert groups_seen(recorded(Attention(), ((x,), {"timestep": timestep}), **options)) == groups
    assert groups_seen(recorded(Attention(), ((x, timestep), {}), **options)) == groups  # by position


def test_a_callable_finds_the_mask_ratio_of_a_text_model():
    collection = recorded(Text(), ((torch.tensor([[9, 1, 2, 3], [9, 9, 9, 2]]),), {}), timestep=lambda ids: (ids == 9).float().mean(1))
    assert groups_seen(collection, "head.weight") == {2: 4, 7: 4}


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(10, 8), nn.Linear(8, 9)

    def forward(self, ids):
        return self.head(self.tokens(ids))


def test_customary_names_serve_for_the_default_and_others_are_refused_with_what_there_is():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(4, 4)

        def forward(self, ids, t):
            return self.to_q(ids)

    assert groups_seen(recorded(Named(), ((torch.ones(1, 4), 0.95), {}))) == {9: 1}
    with pytest.raises(ValueError, match="no argument 'sigma'; it has ids, t"):
        Recorder(Named(), None, "sigma")
    with pytest.raises(ValueError, match="no argument 'timestep'; it has ids"):
        Recorder(Text(), None)


def test_CA02_timesteps_outside_the_schedule_are_told_once_and_counted_at_the_nearest_end():
    calls = [((seeded(2, 6, 12),), {"timestep": torch.tensor([1000, -5])})] * 2
    with pytest.warns(RuntimeWarning, match="outside the schedule of 1000") as told:
        assert groups_seen(recorded(Attention(), *calls)) == {0: 12, 9: 12}
    assert sum("outside" in str(w.message) for w in told) == 1


def test_a_run_that_begins_with_ratios_and_goes_on_with_timesteps_is_refused():
    x = seeded(2, 6, 12)
    with pytest.raises(aq.ConfigurationError, match=r"now there is 40: .*scale=1.0 or scale=1000"):
        recorded(Attention(), ((x, torch.tensor([0.0, 1.0])), {}), ((x, torch.tensor([40.0, 1.0])), {}))


def test_CA02_unknown_timesteps_are_told_and_counted_in_group_0():
    with pytest.warns(RuntimeWarning, match="unknown timestep"):
        assert groups_seen(recorded(Attention(), ((seeded(2, 6, 12),), {}))) == {0: 12}
    module = Attention()
    with pytest.warns(RuntimeWarning, match="unknown timestep"), torch.no_grad(), Recorder(module, None) as rec:
        module.to_q(torch.ones(3, 12))
        module(seeded(1, 2, 12), 999)
    assert groups_seen(rec.collect()) == {0: 3, 9: 2}


def test_CA02_missing_time_groups_and_silent_layers_are_told():
    warnings.resetwarnings()
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = module

        def forward(self, x, timestep):
            return self.parts["a"](x)

    with pytest.warns(RuntimeWarning) as told:
        recorded(Half(), ((torch.ones(1, 2), 450), {}), groups=3)
    texts = [str(w.message) for w in told]
    assert any("1 of 2 layers did not run" in t and "parts.b.weight" in t for t in texts)
    assert any("no timestep fell into 2 of 3 time groups: 0, 2" in t for t in texts)


def test_an_input_that_belongs_to_no_sample_alone_is_told():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.place = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, timestep):
            return self.to_q(x) + self.place(torch.ones(1, x.shape[1], 4))

    with pytest.warns(RuntimeWarning, match=r"shape \(1, 6, 4\) does not divide into the 3 samples"):
        collection = recorded(Shared(), ((seeded(3, 6, 4), torch.tensor([0, 500, 999])), {}))
    assert groups_seen(collection, "place.weight") == {0: 6} and groups_seen(collection) == {0: 6, 5: 6, 9: 6}
    assert groups_seen(recorded(Shared(), ((seeded(3, 6, 4), torch.tensor([999] * 3)), {})), "place.weight") == {9: 6}


# ---- sharing ----


def test_layers_that_read_one_tensor_share_and_views_of_it_too():
    class Views(Attention):
        def forward(self, x, timestep):
            flat = x.reshape(-1, 12)
            return self.to_q(flat) + self.to_k(x.view(-1, 12)) + self.to_v(flat[:]) + self.to_out(flat.clone())

    collection = recorded(Views(), *[((seeded(2, 3, 12, seed=i), 5), {}) for i in range(3)])
    assert [collection.source(f"to_{p}.weight") for p in ("q", "k", "v", "out")] == ["to_q.weight"] * 3 + ["to_out.weight"]
    assert groups_seen(collection) == groups_seen(collection, "to_out.weight") == {0: 18}


def test_memory_that_is_used_again_or_changed_in_place_is_not_taken_for_the_same_input():
    class Reuse(Attention):
        def forward(self, x, timestep):
            out = self.to_q(x + 1)  # freed after the call: the next one may get its memory
            out = out + self.to_k(x + 2)
            y = x.clone()
            out = out + self.to_v(y)
            y += 1
            return out + self.to_out(y)

    x = seeded(2, 3, 12)
    collection = recorded(Reuse(), ((x, 5), {}))
    for name, shift in (("to_q", 1), ("to_k", 2), ("to_v", 0), ("to_out", 1)):
        assert collection.source(f"{name}.weight") == f"{name}.weight"
        np.testing.assert_allclose(collection.stats(f"{name}.weight", 0)["sum"], (x + shift).reshape(-1, 12).double().sum(0).numpy(), rtol=1e-6)


def test_a_layer_that_stops_sharing_stops_the_run(tmp_path):
    class Fickle(Attention):
        def forward(self, x, timestep, way="shared"):
            out = self.to_q(x) + self.to_v(x)
            return out if way == "skipped" else out + self.to_k(x * 2 if way == "apart" else x) + self.to_out(x)

    for way, text in (("apart", "to_k.weight is given another tensor where to_q.weight ran"), ("skipped", "to_k.weight did not run each time")):
        module, x = Fickle(), seeded(2, 3, 12)
        with pytest.raises(RuntimeError, match=text + ".*share_inputs=False"), torch.no_grad(), Recorder(module, tmp_path / "a.aqcal"):
            module(x, 5)
            module(x, 5, way=way)
        assert list(tmp_path.iterdir()) == []
        calls = [((x, 5), {}), ((x, 5), {"way": way})]
        collection, given = recorded(module, *calls, share_inputs=False), inputs_of(module, *calls)
        for name, inputs in given.items():
            rows = np.concatenate([g.reshape(-1, 12).numpy() for g in inputs])
            assert collection.source(name) == name
            check(collection, name, rows, np.full(len(rows), 5), 10, 1000)


def test_a_module_called_several_times_in_a_pass_is_counted_each_time():
    class Loop(Attention):
        def forward(self, x, timestep):
            for _ in range(3):
                x = super().forward(x)
            return x

    module, x = Loop(), seeded(2, 3, 12)
    calls = [((x, 5), {}), ((x, 995), {})]
    seen, collection = inputs_of(module, *calls), recorded(module, *calls)
    for name, given in seen.items():
        rows = np.concatenate([g.reshape(-1, 12).numpy() for g in given])
        check(collection, name, rows, np.repeat([5, 995], len(rows) // 2), 10, 1000)
    assert collection.source("to_v.weight") == "to_q.weight"


def test_inference_mode_records_the_same_without_sharing():
    module, x = Attention(), seeded(2, 3, 12)
    with torch.inference_mode(), Recorder(module, None) as rec:
        module(x.clone(), 5)
    collection = rec.collect()
    assert {collection.source(name) for name in collection.layers} == set(collection.layers)
    np.testing.assert_array_equal(collection.stats("to_v.weight", 0)["sum"], recorded(module, ((x, 5), {})).stats("to_q.weight", 0)["sum"])


# ---- values ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_converted_once(dtype):
    module, x = Attention().to(dtype), seeded(2, 3, 12).to(dtype)
    collection = recorded(module, ((x, 5), {}))
    np.testing.assert_array_equal(collection.stats("to_q.weight", 0)["max"], x.float().reshape(-1, 12).amax(0).numpy())


def test_contiguous_float32_is_read_in_place(monkeypatch):
    by_python, real = [], Recorder._record_linear
    monkeypatch.setattr(Recorder, "_record_linear", lambda self, layer, x: by_python.append((layer.name, x.data_ptr())) or real(self, layer, x))
    module, x = Attention(), seeded(2, 3, 12)
    with torch.no_grad(), Recorder(module, None) as rec:
        module(x, 5)  # first calls find out who shares an input
        assert [name for name, _ in by_python] == ["to_q.weight", "to_out.weight"] and by_python[0][1] == x.data_ptr()
        for _ in range(3):
            module(x, 5)
        assert len(by_python) == 2  # the listener before each layer handed the memory to the library: it cannot copy
        module(x[:, 1:], 5)  # rows of samples that do not follow each other: one copy
        module(x.double()[:0].float(), 5)  # no rows
        module(x=torch.from_numpy(x.numpy()), timestep=5)
    assert [name for name, _ in by_python[2:]] == ["to_q.weight"] and rec.passes == 7
    assert rec.calibration.stats("to_q.weight", group=0)["count"] == 5 * 6 + 4


def test_layers_with_hooks_of_their_own_encoders_and_copies_are_none_the_worse():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.changed, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.encoder(self.plain(self.changed(x)))

    module, x = Net().eval(), seeded(2, 3, 8)
    module.changed.register_forward_pre_hook(lambda _, args: (args[0] + 1,))  # what the layer gets counts, not what it was called with
    after = []
    module.encoder.register_forward_hook(lambda *_: after.append(1))
    with torch.no_grad():
        wanted = module(x)
        with warnings.catch_warnings(), Recorder(module, None, timestep=None, exclude=["encoder.self_attn*"]) as rec:
            warnings.simplefilter("error")
            assert module.plain._compiled_call_impl is not None  # no hook, which torch would take a longer way for
            torch.testing.assert_close(module(x), wanted)
            copy.deepcopy(module.plain)(x), pickle.loads(pickle.dumps(module.plain))(x)  # copies are not recorded
    c = rec.collect()
    assert {name: c.stats(name, 0)["count"] for name in c.layers} == dict.fromkeys(
        ["changed.weight", "plain.weight", "encoder.linear1.weight", "encoder.linear2.weight"], 6
    )
    np.testing.assert_allclose(c.stats("changed.weight", 0)["sum"], (x + 1).double().sum((0, 1)).numpy(), rtol=1e-6)
    assert len(after) == 2 and all(
        part._compiled_call_impl is None and not part._forward_pre_hooks for name, part in module.named_modules() if name != "changed"
    )


def test_a_listener_takes_no_layer_that_the_calibration_lacks():
    from arrow_quant_v2._core import _Listener

    c, slow = aq.Calibration(num_timesteps=10), []
    layer, x = c.add_layer("fc.weight", 4), torch.ones(3, 4)
    clock = type("Clock", (), {"now": 3})()
    listener = _Listener(c, clock, torch.Tensor, torch.Tensor.__dlpack_c_exchange_api__, 4, 1, slow.append)
    listener(None, (x,), {})
    assert len(slow) == 1  # its number is not known yet
    for arguments in [(1, False, None), (-1, False, None), (layer, True, None), (layer, False, 5)]:
        with pytest.raises(ValueError, match="is not in the calibration"):
            listener.settle(*arguments)
    with pytest.raises(ValueError, match="does not have 5 inputs"):
        _Listener(c, clock, torch.Tensor, torch.Tensor.__dlpack_c_exchange_api__, 5, 1, slow.append).settle(layer, False, None)
    with pytest.raises(ValueError, match="threads"):
        _Listener(c, clock, torch.Tensor, torch.Tensor.__dlpack_c_exchange_api__, 4, -1, slow.append)
    listener.settle(layer, False, None)
    listener(None, (), {"input": x})
    assert c.stats(layer, group=3)["sum"].tolist() == [3.0] * 4 and len(slow) == 1
    others = [x.double(), torch.ones(3, 5), torch.ones(4, 6).T[:, ::2], torch.nn.Parameter(x), torch._neg_view(x), torch.ones(())]
    for other in others:
        listener(None, (other,), {})
    assert len(slow) == 1 + len(others) and listener.n_calls == 2 + len(others)
    with pytest.raises(TypeError):
        listener(None, (x,))
    listener(None, (), {})  # forward says what it misses
    clock.now = 10
    with pytest.raises(aq.FormatError, match="timestep 10 is outside"):
        listener(None, (x,), {})


def test_CA02_values_that_are_not_finite_are_refused_with_layer_row_and_channel(tmp_path):
    module, x = Attention(), seeded(2, 3, 12)
    x[1, 0, 7] = float("nan")
    with pytest.raises(aq.FormatError, match="to_q.weight.*row 3, channel 7"):
        with torch.no_grad(), Recorder(module, tmp_path / "a.aqcal"):
            module(seeded(2, 3, 12), 5)
            module(x, 5)
    assert list(tmp_path.iterdir()) == []


# ---- the block ----


def test_an_exception_leaves_no_file_and_no_hooks(tmp_path):
    module = Attention()
    for stop in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(stop), Recorder(module, tmp_path / "a.aqcal", gradients=True):
            module(seeded(2, 3, 12), 5)
            raise stop
    assert list(tmp_path.iterdir()) == []
    assert all(not part._forward_pre_hooks and not part._forward_hooks for part in module.modules())


def test_several_passes_merge_and_an_existing_file_is_never_replaced_unasked(tmp_path):
    path, module = tmp_path / "a.aqcal", Attention()
    calls = [((seeded(2, 3, 12, seed=i), t), {}) for i, t in enumerate((5, 450, 995, 5))]
    for begin in (0, 2):
        with torch.no_grad(), Recorder(module, path, append=begin > 0, data_name=f"set {begin}") as rec:
            for args, kwargs in calls[begin : begin + 2]:
                module(*args, **kwargs)
            rec.save()  # in between: what follows is added
            if begin:
                assert aq.Calibration.open(path).stats("to_q.weight", 9)["count"] == 6
    whole, once = aq.Calibration.open(path), recorded(module, *calls)
    assert whole.layers == once.layers and whole.data_name == "set 0 + set 2"
    for name in once.layers:
        assert whole.source(name) == once.source(name)
        for g in range(10):
            a, b = whole.stats(name, g), once.stats(name, g)
            assert (a is None) == (b is None)
            if a:
                assert a["count"] == b["count"] and np.array_equal(a["absmax"], b["absmax"])
                np.testing.assert_allclose(a["sum_sq"], b["sum_sq"], rtol=1e-12)
        np.testing.assert_allclose(whole.hessian(name), once.hessian(name), atol=1e-5)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="append=True"):
        Recorder(module, path)
    with pytest.raises(aq.ConfigurationError, match="time groups differ"):
        Recorder(module, path, append=True, groups=3)
    with pytest.raises(TypeError, match="append merges"):
        Recorder(module, path, append=True, overwrite=True)
    assert path.read_bytes() == before
    with torch.no_grad(), Recorder(module, path, overwrite=True):
        module(seeded(2, 3, 12), 5)
    assert aq.Calibration.open(path).stats("to_q.weight", 0)["count"] == 6


def test_nothing_recorded_is_told_and_writes_no_file(tmp_path):
    with pytest.warns(RuntimeWarning, match="nothing was recorded.*a.aqcal was not written"), Recorder(Attention(), tmp_path / "a.aqcal"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_layers_are_chosen_by_globs_and_named_with_a_prefix():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Attention(), Attention()])

        def forward(self, x, timestep):
            return self.blocks[1](self.blocks[0](x))

    call = ((seeded(1, 2, 12), 5), {})
    collection = recorded(Two(), call, layers=["blocks.0.to_q", "blocks.1.*"], exclude=["*.to_out.weight"], prefix="model.")
    assert collection.layers == ["model.blocks.0.to_q.weight", *(f"model.blocks.1.to_{p}.weight" for p in "qkv")]
    with pytest.raises(ValueError, match="layers: no linear or convolution layer matches 'blocks.0.to_g'; did you mean 'blocks.0.to_"):
        Recorder(Two(), None, layers=["blocks.0.to_g"])
    with pytest.raises(TypeError, match="layers must be a list"):
        Recorder(Two(), None, layers="blocks.0.to_q")
    with pytest.raises(ValueError, match="nothing to record"):
        Recorder(Two(), None, exclude=["*"])
    with pytest.raises(ValueError, match="nothing to record"):
        Recorder(nn.ReLU(), None, timestep=None)


WRONG = [
    (TypeError, "must be a torch.nn.Module", lambda m: Recorder(object(), None)),
    (TypeError, "timestep must be", lambda m: Recorder(m, None, 3)),
    (ValueError, "Invalid modality", lambda m: Recorder(m, None, modality="smell")),
    (ValueError, "Invalid groups", lambda m: Recorder(m, None, groups=0)),
    (ValueError, "Invalid size", lambda m: Recorder(m, None, max_memory="much")),
    (TypeError, "progress must be", lambda m: Recorder(m, None, progress=3)),
    (TypeError, "compiled", lambda m: Recorder(torch.compile(m), None)),
]


@pytest.mark.parametrize("error, text, call", WRONG)
def test_wrong_arguments_are_told_before_the_work(error, text, call):
    with pytest.raises(error, match=text):
        call(Attention())


def test_progress_is_told_after_each_pass_and_may_stop(tmp_path):
    told, module = [], Attention()
    with torch.no_grad(), Recorder(module, None, progress=told.append, total=4):
        for _ in range(4):
            module(seeded(1, 2, 12), 5)
    assert [(p.stage, p.n_done, p.fraction) for p in told] == [("record", i, i / 4) for i in range(1, 5)]
    with pytest.raises(aq.Interrupted), torch.no_grad(), Recorder(module, tmp_path / "a.aqcal", progress=lambda p: p.n_done < 2):
        for _ in range(4):
            module(seeded(1, 2, 12), 5)
    assert list(tmp_path.iterdir()) == []


def test_wide_layers_take_fewer_rows_into_the_second_moment_and_all_into_the_rest():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 8))
    x = seeded(4000, 8)
    expected = {None: (4000, 1000), 0: (4000, 4000), 4: (2000, 500)}
    for full, counted in expected.items():
        c = recorded(module, ((x,), {}), timestep=None, hessian_full=full)
        stats = [c.stats(name, 0) for name in ("0.weight", "2.weight")]
        assert tuple(s["hessian_count"] for s in stats) == counted and all(s["count"] == 4000 for s in stats)
    thinned, exact = (recorded(module, ((x,), {}), timestep=None, hessian_full=full).hessian("2.weight") for full in (None, 0))
    assert abs(thinned - exact).max() < 0.15 * np.diag(exact).max()


def test_bounded_memory_gives_the_same_statistics(tmp_path):
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    x = seeded(40, 64)
    free = recorded(module, ((x,), {}), timestep=None)
    with torch.no_grad(), Recorder(module, None, timestep=None, max_memory="100KB", spill_folder=tmp_path) as rec:
        module(x)
    assert rec.calibration.held_bytes <= 100_000 < free.held_bytes
    for name in free.layers:
        np.testing.assert_allclose(rec.calibration.hessian(name), free.hessian(name), rtol=1e-4, atol=1e-6)


# ---- gradients ----


def test_gradients_of_every_backward_pass_are_those_of_autograd():
    module, batches = Attention(), [seeded(2, 3, 12, seed=i) for i in range(3)]
    module.requires_grad_(False)
    with Recorder(module, None, gradients=True) as rec:
        for x in batches:
            module(x, 5).square().mean().backward()
    assert all(not p.requires_grad and p.grad is None for p in module.parameters())
    module.requires_grad_(True)
    per_pass = [torch.autograd.grad(module(x, 5).square().mean(), [module.to_q.weight, module.to_k.weight]) for x in batches]
    for i, name in enumerate(("to_q.weight", "to_k.weight")):  # layers that share an input have gradients of their own
        squares = torch.stack([gradients[i].double() for gradients in per_pass]) ** 2
        rows, columns = rec.calibration.gradient(name)
        np.testing.assert_allclose(rows, squares.mean((0, 2)).numpy(), rtol=1e-5)
        np.testing.assert_allclose(columns, squares.mean((0, 1)).numpy(), rtol=1e-5)


def test_gradients_can_be_added_from_a_training_loop_of_ones_own():
    module = Attention()
    with Recorder(module, None) as rec:
        for seed in (0, 1):
            module.zero_grad()
            module(seeded(2, 3, 12, seed=seed), 5).sum().backward()
            rec.add_gradients()
    kept = module.to_q.weight.grad.double()
    module.zero_grad()
    module(seeded(2, 3, 12, seed=0), 5).sum().backward()
    squares = (kept**2 + module.to_q.weight.grad.double() ** 2) / 2
    np.testing.assert_allclose(rec.calibration.gradient("to_q.weight")[0], squares.mean(1).numpy(), rtol=1e-5)
    with pytest.raises(RuntimeError, match="adds them already"), Recorder(module, None, gradients=True) as rec:
        rec.add_gradients()


def gradients_of(module, measure, x, passes, **options):
    """{name: (rows, columns)} after as many passes over the same input, under no_grad as a pipeline runs."""
    with torch.no_grad(), Recorder(module, None, timestep=None, gradients=measure, **options) as rec:
        outputs = [module(x) for _ in range(passes)]
    assert all(not out.requires_grad for out in outputs)
    return {name: rec.calibration.gradient(name) for name in rec.calibration.layers}


def test_gradients_of_the_output_are_the_gauss_newton_matrix():
    module, x = Attention(6), seeded(2, 3, 6)
    found = gradients_of(module, "output", x, 600)
    for name in ("to_q.weight", "to_out.weight"):
        weight = module.get_parameter(name)
        jacobian = torch.autograd.functional.jacobian(lambda w, name=name: torch.func.functional_call(module, {name: w}, (x,)), weight.detach())
        diagonal = jacobian.double().square().sum((0, 1, 2)).numpy()  # of all outputs
        np.testing.assert_allclose(found[name][0], diagonal.mean(1), rtol=0.25)
        np.testing.assert_allclose(found[name][1], diagonal.mean(0), rtol=0.25)
        np.testing.assert_allclose(np.mean(found[name][0]), diagonal.mean(), rtol=0.08)


def test_gradients_of_logits_are_the_fisher_matrix():
    torch.manual_seed(0)
    module, x = nn.Linear(5, 4), seeded(1, 5)
    found = gradients_of(module, "logits", x, 3000)["weight"][0]
    p = module(x).softmax(-1)[0].double()
    exact = p * (1 - p) * x.double().square().mean()  # E[(onehot - p)^2] x^2
    np.testing.assert_allclose(found, exact.detach().numpy(), rtol=0.15)


def test_gradients_of_the_output_leave_what_the_caller_has():
    module, x = Attention(), seeded(2, 3, 12)
    module.to_q.weight.requires_grad_(False)
    module.to_k.weight.grad = kept = torch.ones_like(module.to_k.weight)
    expected = module(x)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return {"other": 1, "sample": self.inner(x)}

    seen = []
    with torch.no_grad(), Recorder(Wrapped(), None, timestep=None, gradients="output", output=lambda out: out["sample"][..., :3]) as rec:
        out = rec.module(x)
        seen.append(torch.is_grad_enabled())
    assert seen == [False] and torch.is_grad_enabled()
    assert out["other"] == 1 and torch.equal(out["sample"], expected) and not out["sample"].requires_grad
    assert [p.requires_grad for p in module.parameters()] == [False] + [True] * 7
    assert module.to_k.weight.grad is kept and module.to_v.weight.grad is None
    rows = rec.calibration.gradient("inner.to_out.weight")[0]
    assert (rows[:3] > 0).all() and (rows[3:] == 0).all()  # of the outputs that count
    assert recorded(module, ((x,), {}), timestep=None).hessian("to_q.weight").tolist() == rec.calibration.hessian("inner.to_q.weight").tolist()
    repeated = [gradients_of(module, "output", x, 2, seed=seed)["to_q.weight"][0].tolist() for seed in (0, 0, 1)]
    assert repeated[0] == repeated[1] != repeated[2]


def test_gradients_that_cannot_be_had_are_told():
    module, x = Attention(), seeded(2, 3, 12)
    with pytest.raises(ValueError, match="Must be False, True, 'output', or 'logits'"):
        Recorder(module, None, gradients="loss")
    with pytest.raises(TypeError, match="give one of them"):
        Recorder(module, None, output=lambda out: out)
    with pytest.raises(RuntimeError, match=r"inference mode: run the model under torch\.no_grad"), torch.inference_mode():
        with Recorder(module, None, timestep=None, gradients="output"):
            module(x)
    with pytest.raises(TypeError, match="give output="), Recorder(module, None, timestep=None, gradients="output", output=lambda out: None):
        module(x)
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(RuntimeError, match="adds them already"), Recorder(module, None, gradients="output") as rec:
        rec.add_gradients()


def test_importing_the_package_does_not_import_torch_or_numpy():
    code = "import sys, arrow_quant_v2, arrow_quant_v2.torch; assert not {'torch', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_examples_of_the_docstrings_run(tmp_path, monkeypatch):
    import doctest

    from arrow_quant_v2.torch import recorder as part

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(SAMPLE.parent, target_is_directory=True)
    members = [part.Recorder, *(value for name, value in vars(part.Recorder).items() if not name.startswith("_") and callable(value))]
    runner, parser = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), doctest.DocTestParser()
    for member in members:
        test = parser.get_doctest(member.__doc__, {}, member.__qualname__, None, None)
        assert test.examples and runner.run(test).failed == 0


def test_a_layer_tied_to_an_embedding_is_not_recorded():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = torch.nn.Embedding(32, 16)
            self.body = torch.nn.Linear(16, 16)
            self.head = torch.nn.Linear(16, 32, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids):
            return self.head(self.body(self.tokens(ids)))

    with Recorder(Tied(), None, timestep=None) as rec:
        rec.module(torch.arange(8)[None])
    assert rec.collect().layers == ["body.weight"]
