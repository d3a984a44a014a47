"""calibrate(): models run over data at levels of noise that cover the schedule."""

import json
import os
import signal

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import ROOT, SAMPLE

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from arrow_quant_v2.torch import calibrate  # noqa: E402
from torch import nn  # noqa: E402

FASHION = ROOT / "examples" / "fashion-calib.npz"
pytestmark = pytest.mark.filterwarnings("ignore:no timestep fell into")  # small runs
Q = "transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def dit():
    model = diffusers.DiTTransformer2DModel.from_pretrained(SAMPLE, subfolder="transformer")
    return model, diffusers.DDIMScheduler.from_pretrained(SAMPLE, subfolder="scheduler")


@pytest.mark.parametrize(("shape", "name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_without_a_scheduler_the_shape_of_its_schedule_will_do(dit, shape, name):
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=name, beta_start=1e-4, beta_end=0.02)
    config = aq.DiffusionQuantConfig(beta_schedule=shape)
    ours, expected = (calibrate(dit[0], FASHION, scheduler=s, samples=8, timesteps=2, layers=["*to_q"]) for s in (config.beta_schedule, theirs))
    for group in range(10):
        a, b = ours.stats(Q, group), expected.stats(Q, group)
        assert (a is None) == (b is None) and (a is None or a["count"] == b["count"])
        if a is not None:
            np.testing.assert_allclose(a["sum_sq"], b["sum_sq"], rtol=1e-3)
    with pytest.raises(ValueError, match="^Invalid beta_schedule. Must be 'linear' or 'cosine'$"):
        calibrate(dit[0], FASHION, scheduler="quadratic", samples=2)


class MDLM(nn.Module):
    """A masked language model as small as can be: bytes below 128, 128 is the mask, the mask ratio is its timestep."""

    mask_id, seq_len = 128, 16

    def __init__(self):
        super().__init__()
        self.tok, self.time, self.mix, self.head = nn.Embedding(129, 8), nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 128)
        self.seen = []

    def forward(self, ids, t):
        self.seen.append((ids, t))
        return self.head(self.mix(self.tok(ids) + self.time(t[:, None])[:, None]).tanh())


def seeded_mdlm():
    torch.manual_seed(0)
    return MDLM()


def counts(collection, layer):
    return [s["count"] if (s := collection.stats(layer, g)) else 0 for g in range(collection.groups)]


def test_a_denoiser_sees_noised_data_at_levels_that_cover_the_schedule(dit, tmp_path):
    model, scheduler = dit
    model.train()
    told = []
    c = calibrate(model, FASHION, tmp_path / "dit.aqcal", scheduler=scheduler, samples=20, timesteps=2, batch_size=16, progress=told.append, layers=["*to_q"])
    assert model.training and [p.n_done for p in told] == [1, 2, 3] and told[-1].fraction == 1  # dropout was off, and is on again
    model.eval()
    assert counts(c, Q) == [4 * 49] * 10  # 40 levels, 4 in each tenth
    steps = [row["timestep"] for row in c.timesteps(Q)]
    assert all(b - a <= 50 for a, b in zip(steps, steps[1:], strict=False)) and len(steps) == 40
    assert (c.data_name, c.synthetic, c.modality, c.num_timesteps) == ("fashion-calib.npz", False, "image", 1000)
    assert c.data_sha256 == aq.DataSet(FASHION).sha256
    again = aq.Calibration.open(tmp_path / "dit.aqcal")
    assert counts(again, Q) == counts(c, Q) and again.data_sha256 == c.data_sha256


def test_the_inputs_are_those_of_add_noise_and_the_same_call_records_the_same(dit):
    model, scheduler = dit
    seen = []

    def call(module, x, t, samples):
        seen.append((x, t, [s.line for s in samples]))
        return module(x, timestep=t, class_labels=torch.tensor([s.label for s in samples]))

    first = calibrate(model, FASHION, scheduler=scheduler, samples=12, seed=5, call=call, layers=["*.0.attn1.to_q"])
    x, t, lines = seen[0]
    clean = torch.from_numpy(np.stack([s.values for s in aq.DataSet(FASHION).take(12)]))[[i - 1 for i in lines]]
    generator = torch.Generator().manual_seed(5)
    torch.randperm(12, generator=generator), torch.rand(12, generator=generator, dtype=torch.float64)
    # labels are not drawn: the data set has them
    noise = torch.randn(clean.shape, generator=generator)
    assert torch.equal(x, scheduler.add_noise(clean, noise, t)) and sorted(lines) == list(range(1, 13))
    second = calibrate(model, FASHION, scheduler=scheduler, samples=12, seed=5, layers=["*.0.attn1.to_q"])
    other = calibrate(model, FASHION, scheduler=scheduler, samples=12, seed=6, layers=["*.0.attn1.to_q"])
    assert first.hessian(Q).tobytes() == second.hessian(Q).tobytes() != other.hessian(Q).tobytes()


def test_data_come_as_arrays_with_labels_and_timesteps_may_be_listed(dit):
    model, scheduler = dit
    images = np.load(FASHION)["images"][:6, None].astype(np.float32) / 127.5 - 1
    arrays = calibrate(model, images, scheduler=scheduler, labels=np.load(FASHION)["labels"], samples=6, timesteps=[0, 999], layers=["*.0.attn1.to_q"])
    tensor = calibrate(model, torch.from_numpy(images), scheduler=scheduler, labels=range(6), samples=6, timesteps=[0, 999], layers=["*.0.attn1.to_q"])
    assert counts(arrays, Q) == counts(tensor, Q) == [6 * 49, *[0] * 8, 6 * 49]
    assert arrays.data_sha256 == tensor.data_sha256 and arrays.fingerprint() != tensor.fingerprint()  # other labels
    with pytest.warns(RuntimeWarning, match="has 6 samples, 7 were asked for"):
        calibrate(model, images, scheduler=scheduler, labels=range(6), samples=7, layers=["*.0.attn1.to_q"])


def test_synthetic_inputs_are_standard_normal_at_every_level_and_labelled(dit):
    c = calibrate(dit[0], samples=20, layers=["pos_embed.proj", "*.0.attn1.to_q"])
    assert c.synthetic and c.data_name == "synthetic: standard normal" and c.data_sha256 is None
    for row in c.timesteps("pos_embed.proj.weight"):
        assert abs(row["mean"]) < 0.2 and abs(row["std"] - 1) < 0.2
    assert counts(c, Q) == [2 * 49] * 10


def test_gradients_are_those_of_the_loss_it_was_trained_with(dit):
    model, scheduler = dit
    before = model.proj_out_2.weight.grad = torch.ones_like(model.proj_out_2.weight)
    c = calibrate(model, FASHION, scheduler=scheduler, samples=8, timesteps=[100], batch_size=8, gradients=True, layers=["*.0.attn1.to_q"])
    assert model.proj_out_2.weight.grad is before and all(p.grad is None for n, p in model.named_parameters() if n != "proj_out_2.weight")
    model.zero_grad()
    rows = aq.DataSet(FASHION).take(8)
    x, y = torch.from_numpy(np.stack([r.values for r in rows])), torch.tensor([r.label for r in rows])
    noise, t = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), torch.full((8,), 100)
    weight = model.get_submodule("transformer_blocks.0.attn1.to_q").weight
    loss = (model(scheduler.add_noise(x, noise, t), timestep=t, class_labels=y).sample - noise).square().mean()
    gradient = torch.autograd.grad(loss, weight)[0].double()
    np.testing.assert_allclose(c.gradient(Q)[0], gradient.square().mean(1).numpy(), rtol=1e-4)


def test_a_text_model_sees_masked_windows(tmp_path):
    lines = [{"text": f"line {i} of the book"} for i in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    model = seeded_mdlm()
    c = calibrate(model, tmp_path / "text.jsonl", samples=20, batch_size=8)
    assert counts(c, "mix.weight") == [2 * 16] * 10 and c.modality == "text" and c.data_name == "text.jsonl" and not c.synthetic
    ids, t = (torch.cat(parts) for parts in zip(*model.seen, strict=True))
    whole = "".join(line["text"] for line in lines)
    share = (ids == 128).float().mean(1)
    assert ids.shape == (20, 16) and ((share - t).abs() < 0.6).all() and (share - t).abs().mean() < 0.15
    for row in ids.tolist():
        text = "".join("." if i == 128 else chr(i) for i in row)
        assert any(all(a in (b, ".") for a, b in zip(text, whole[k : k + 16], strict=True)) for k in range(0, len(whole) - 15, 16))
    same = calibrate(seeded_mdlm(), ["".join(line["text"] for line in lines)], samples=1)
    assert same.data_name == "list" and sum(counts(same, "mix.weight")) == 16


def test_a_text_model_without_a_timestep_is_recorded_by_its_mask_ratio():
    class Plain(MDLM):
        def forward(self, tokens):
            return super().forward(tokens, torch.zeros(len(tokens)))

    torch.manual_seed(0)
    c = calibrate(Plain(), samples=40, task="mask")
    assert c.synthetic and c.data_name == "synthetic: uniform tokens" and c.modality == "text"
    assert sum(counts(c, "mix.weight")) == 40 * 16 and min(counts(c, "mix.weight")) > 0
    torch.manual_seed(0)
    named = calibrate(Plain(), samples=40, task="mask", call=lambda module, x, t, samples: module(tokens=x))
    assert named.fingerprint() == c.fingerprint()
    model = Plain()
    calibrate(model, samples=400, mask_id=5, task="mask")
    drawn = torch.cat([ids for ids, _ in model.seen])
    assert drawn.max() == 128 and drawn.min() == 0  # any token but the mask, which stands for hidden ones only


def test_text_gradients_are_those_of_the_masked_tokens():
    model = seeded_mdlm()
    c = calibrate(model, samples=8, task="mask", gradients=True)
    assert c.gradient("head.weight")[0].shape == (128,) and (c.gradient("mix.weight")[0] > 0).all()
    assert all(p.grad is None for p in (model.head.weight, model.mix.weight))


def error_of(model, run, folder):
    """Relative squared error of run(model) with the weights of a container, in dB."""
    with torch.no_grad():
        kept, reference = {name: p.clone() for name, p in model.state_dict().items()}, run(model)
        with aq.open(folder) as c:
            values = {name: torch.from_numpy(np.asarray(c[name].dequantize(), np.float32)).reshape(kept[name].shape) for name in c.keys() if name in kept}
        model.load_state_dict(kept | values)
        out = run(model)
        model.load_state_dict(kept)
    return float(-10 * torch.log10((out - reference).square().sum() / reference.square().sum()))


def test_a_budget_goes_by_what_the_output_answers_to(dit, tmp_path):
    """gradients='output' is all that the ordinary way takes: the same budget gives a better model than without."""
    model, scheduler = dit
    made = {}
    for gradients in (False, "output"):
        calibrate(model, FASHION, tmp_path / f"{gradients}.aqcal", scheduler=scheduler, samples=24, batch_size=4, gradients=gradients)
        options = {"calib": tmp_path / f"{gradients}.aqcal", "target_bpw": 3.0, "min_accuracy": 0.0}
        made[gradients] = aq.quantize(SAMPLE, tmp_path / f"dit-{gradients}", skip_sensitive_layers=True, **options)
    x = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(7))
    t, y = torch.arange(16) * 62, torch.arange(16) % 10

    def run(m):
        return m(x, timestep=t, class_labels=y).sample

    plain, by_output = (error_of(model, run, tmp_path / f"dit-{gradients}") for gradients in made)
    assert by_output > plain + 1
    assert all(0.97 * 3.0 <= r.bpw <= 3.0 for r in made.values())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_pipelines_passes_are_differentiated_without_a_graph_left(dit):
    c = calibrate(Pipeline(*dit), samples=2, timesteps=2, gradients="output", layers=["*.0.attn1.to_q"])
    assert (c.gradient(Q)[0] > 0).all()


def test_a_text_models_output_is_what_it_predicts_for_masked_tokens():
    model = seeded_mdlm()
    c = calibrate(model, samples=64, task="mask", timesteps=[999], gradients="output")
    assert (c.gradient("mix.weight")[0] > 0).all()
    # Everything is masked, so every token's prediction counts: with none masked there is nothing to differentiate.
    none = calibrate(seeded_mdlm(), samples=4, task="mask", timesteps=[0], gradients="output", seed=3)
    assert none.gradient("mix.weight") is None
    assert model.mix.weight.grad is None and model.mix.weight.requires_grad


def test_rows_with_timesteps_are_inputs_that_run_as_they_are(dit, tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 1, 28, 28)).astype(np.float32)
    rows = [{"data": v.ravel().tolist(), "timestep": 100 + 200 * i, "shape": [1, 28, 28], "synthetic": True} for i, v in enumerate(x)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen = []
    c = calibrate(dit[0], tmp_path / "rows.jsonl", samples=4, call=lambda m, x, t, s: (seen.append((x, t)), m(x, timestep=t, class_labels=t * 0))[1])
    np.testing.assert_array_equal(seen[0][0].numpy(), x)
    assert seen[0][1].tolist() == [100, 300, 500, 700] and c.synthetic and counts(c, Q) == [0, 49, 0, 49, 0, 49, 0, 49, 0, 0]
    assert aq.CalibrationLoader().load_from_file(tmp_path / "rows.jsonl").synthetic
    tokens = [{"data": [1, 128, 3, 128] * 4, "timestep": 500, "shape": [16]}, {"data": [5] * 15 + [128], "timestep": 62, "shape": [16]}]
    (tmp_path / "tokens.jsonl").write_text("\n".join(map(json.dumps, tokens)))
    model = seeded_mdlm()
    c = calibrate(model, tmp_path / "tokens.jsonl", samples=2)
    assert model.seen[0][0].tolist() == [row["data"] for row in tokens] and not c.synthetic and counts(c, "mix.weight")[5] == 16
    with pytest.raises(ValueError, match="which have no loss"):
        calibrate(dit[0], tmp_path / "rows.jsonl", samples=4, gradients=True)
    flat = [aq.Sample("data", i, values=np.full((1, 16), i, np.float32), integers=True, timestep=500) for i in (1, 2)]
    model = seeded_mdlm()
    calibrate(model, flat, samples=2, task="mask")
    assert model.seen[0][0].tolist() == [[1] * 16, [2] * 16]  # [1, 16] is a row of 16 as well
    with pytest.raises(ValueError, match="must be of one length"):
        calibrate(seeded_mdlm(), [flat[0], aq.Sample("data", 2, values=np.zeros(8, np.float32), integers=True, timestep=500)], samples=2, task="mask")


def test_listed_timesteps_are_run_to_the_step(dit):
    """t / n of the schedule may lie just before step t: 29 / 50 and 1001 / 4000 do."""
    for n, listed in ((50, [29]), (100, [29, 57, 58]), (4000, [1001, 3999, 0])):
        seen = []
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=n)
        noise = {"samples": 1, "timesteps": listed, "layers": ["*.0.attn1.to_q"]}
        calibrate(
            dit[0], FASHION, scheduler=scheduler, call=lambda m, x, t, s, seen=seen: (seen.extend(t.tolist()), m(x, timestep=t, class_labels=t * 0)), **noise
        )
        assert seen == listed


class Pipeline:
    """What calibrate needs of a diffusers pipeline, without a VAE."""

    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler, self.calls = transformer, scheduler, []

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=50, generator=None):
        self.calls.append((list(class_labels), num_inference_steps))
        x = torch.randn((len(class_labels), 1, 28, 28), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, timestep=t.repeat(len(x)), class_labels=torch.tensor(class_labels)).sample, t, x).prev_sample
        return x


def test_a_pipeline_samples(dit):
    pipe = Pipeline(*dit)
    c = calibrate(pipe, samples=6, timesteps=10, batch_size=4, layers=["*.0.attn1.to_q"])
    assert counts(c, Q) == [6 * 49] * 10 and [(len(y), n) for y, n in pipe.calls] == [(4, 10), (2, 10)]
    assert c.synthetic and c.data_name == "synthetic: samples of the model itself"
    again = calibrate(Pipeline(*dit), samples=6, timesteps=10, batch_size=4, layers=["*.0.attn1.to_q"])
    assert again.fingerprint() == c.fingerprint()
    labelled = Pipeline(*dit)
    calibrate(labelled, samples=3, labels=[7, 8, 9], timesteps=10, layers=["*.0.attn1.to_q"])
    assert labelled.calls[0][0] == [7, 8, 9]
    noised = calibrate(Pipeline(*dit), FASHION, samples=10, layers=["*.0.attn1.to_q"])  # pixels: the plain loop of the pipeline's parts
    assert not noised.synthetic and counts(noised, Q) == [49] * 10


def test_a_pipeline_of_prompts_is_asked_them(dit):
    class Prompted(Pipeline):
        def __call__(self, prompt, num_inference_steps=50, generator=None, guidance=1.0):
            self.guidance, self.prompts = guidance, prompt
            return super().__call__([len(p) for p in prompt], num_inference_steps, generator)

    pipe = Prompted(*dit)
    c = calibrate(pipe, ["a", "bcd"], samples=2, timesteps=10, pipeline_options={"guidance": 3.0}, layers=["*.0.attn1.to_q"])
    assert (pipe.prompts, pipe.guidance, c.synthetic) == (["a", "bcd"], 3.0, False)


def test_a_diffusers_pipeline_runs_without_its_bar(capfd):
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1, attention_head_dim=4, **blocks)
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(num_train_timesteps=100))
    c = calibrate(pipe, samples=2, timesteps=10)
    assert c.num_timesteps == 100 and counts(c, "conv_in.weight") == [2 * 64] * 10
    assert capfd.readouterr().err == ""
    missing = set(c.layers) - {name for name, _ in unet.named_parameters()}
    assert not missing


# ---- the cache ----


@pytest.mark.parametrize("during", ["a pass", "progress"])
@pytest.mark.parametrize("where", ["path", "cache_dir", "append"])
def test_FA10_ctrl_c_stops_calibrate_and_leaves_nothing_half_written(tmp_path, where, during):
    model = seeded_mdlm()
    texts, target = ["some text of its own"] * 64, tmp_path / "c.aqcal"
    options = {"path": {"path": target}, "cache_dir": {"cache_dir": tmp_path}, "append": {"path": target, "append": True}}[where]
    if where == "append":
        calibrate(model, texts, target, samples=64, batch_size=16)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)

    model.train()
    pressed, told = model.head.register_forward_hook(press) if during == "a pass" else None, press if during == "progress" else None
    model.seen.clear()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, texts, samples=64, batch_size=8, progress=told, **options)
    assert len(model.seen) == 1 and model.training  # stopped at once, and the model is as it was
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    if pressed:
        pressed.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    again, alone = calibrate(model, texts, samples=64, batch_size=8, **options), calibrate(seeded_mdlm(), texts, samples=64, batch_size=8)
    assert where == "append" or again.fingerprint() == alone.fingerprint()


def test_FA14_a_result_is_found_again_by_the_hash_of_model_data_and_options_and_a_damaged_or_foreign_one_is_refused(dit, tmp_path):
    model, scheduler = dit
    passes = []

    def run(data=FASHION, path=None, target=model, **options):
        options = {"samples": 4, "layers": ["*.0.attn1.to_q"]} | options
        return calibrate(target, data, path, scheduler=scheduler, cache_dir=tmp_path / "cache", progress=passes.append, **options)

    first = run()
    n = len(passes)
    again = run(path=tmp_path / "copy.aqcal")
    assert len(passes) == n == 1 and again.fingerprint() == first.fingerprint()
    assert aq.Calibration.open(tmp_path / "copy.aqcal").fingerprint() == first.fingerprint()
    with pytest.raises(FileExistsError):
        run(path=tmp_path / "copy.aqcal")
    other = diffusers.DiTTransformer2DModel.from_pretrained(SAMPLE, subfolder="transformer")
    other.proj_out_2.bias.data[0] += 1
    run(seed=1), run(samples=5), run(data=None), run(target=other), run(groups=5), run(timesteps=2)
    assert len(passes) == 7 and len(list((tmp_path / "cache").glob("*.aqcal"))) == 7
    entry = max((tmp_path / "cache").glob("*.aqcal"), key=lambda p: p.stat().st_mtime_ns)
    good, other = entry.read_bytes(), min((tmp_path / "cache").glob("*.aqcal"), key=lambda p: p.stat().st_mtime_ns)
    for bad, reason in [
        (good[:-1], "no whole Parquet file"),
        (good[:2000] + bytes([good[2000] ^ 1]) + good[2001:], "damaged|hash|corrupt"),
        (b"", "no whole Parquet file"),
        (other.read_bytes(), "is foreign"),
    ]:
        entry.write_bytes(bad)
        with pytest.raises(aq.FormatError, match=reason) as error:
            run(timesteps=2)
        assert error.value.file == str(entry) and "remove the entry" in error.value.hint
    assert len(passes) == 7
    aq.CalibrationLoader(cache_dir=tmp_path / "cache").clear_cache()
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(TypeError, match="cache_dir needs arguments that can be hashed"):
        run(call=lambda *_: None)


def test_a_result_is_not_that_of_data_read_another_way(dit, tmp_path):
    """The same file with another range of values, the same bytes in other shapes, rows at other timesteps, another mask: other inputs."""
    model, scheduler = dit
    passes, options = [], {"cache_dir": tmp_path, "progress": lambda p: passes.append(p)}

    def images(value_range):
        calibrate(model, aq.DataSet(FASHION, value_range=value_range), scheduler=scheduler, samples=2, layers=["*.0.attn1.to_q"], **options)

    def rows(timestep):
        same = np.ones((1, 28, 28), np.float32)
        made = [aq.Sample("data", i + 1, values=same, timestep=timestep, label=1) for i in range(2)]
        calibrate(model, made, samples=2, layers=["*.0.attn1.to_q"], **options)

    def tokens(mask_id=128, seq_len=16, samples=2):
        calibrate(seeded_mdlm(), np.arange(32).reshape(2, 16), samples=samples, task="mask", mask_id=mask_id, seq_len=seq_len, layers=["mix"], **options)

    for again in range(2):
        images((-1, 1)), images((0, 1)), rows(100), rows(900), tokens(), tokens(mask_id=127), tokens(seq_len=8)
        assert len(passes) == 7, f"round {again}"

    class Other(MDLM):
        def forward(self, ids, t):
            return super().forward(ids, t * 0)

    torch.manual_seed(0)
    calibrate(Other(), np.arange(32).reshape(2, 16), samples=2, task="mask", mask_id=128, seq_len=16, layers=["mix"], **options)
    assert len(passes) == 8  # the same weights in another model


# ---- refusals ----


REFUSED = [
    (ValueError, "noising data needs the scheduler", lambda m, s: calibrate(m, FASHION, samples=2)),
    (ValueError, "Invalid task", lambda m, s: calibrate(m, FASHION, samples=2, task="dream")),
    (ValueError, "arrays of one shape", lambda m, s: calibrate(m, ["a", "b"], scheduler=s, task="noise", samples=2)),
    (ValueError, "has no samples", lambda m, s: calibrate(m, np.zeros((0, 1, 28, 28), np.float32), scheduler=s)),
    (ValueError, "needs a diffusers pipeline", lambda m, s: calibrate(m, ["a"], task="pipeline", samples=1)),
    (TypeError, "must be a torch.nn.Module or a pipeline", lambda m, s: calibrate(object(), ["a"])),
    (TypeError, "data must be", lambda m, s: calibrate(m, [1, 2], scheduler=s)),
    (ValueError, "timesteps must lie in 0..999", lambda m, s: calibrate(m, FASHION, scheduler=s, samples=2, timesteps=[1000])),
    (ValueError, "fewer than 16 tokens", lambda m, s: calibrate(MDLM(), ["short"], samples=1)),
    (ValueError, "neither text nor token ids", lambda m, s: calibrate(MDLM(), np.zeros((2, 4), np.float32), samples=2, task="mask")),
    (ValueError, "token ids outside", lambda m, s: calibrate(MDLM(), np.full((4, 16), 129), samples=2, task="mask")),
    (ValueError, "a pipeline has no loss", lambda m, s: calibrate(Pipeline(m, s), samples=2, gradients=True)),
    (ValueError, "chooses its own timesteps", lambda m, s: calibrate(Pipeline(m, s), samples=2, timesteps=[5])),
    (ValueError, "no timestep argument", lambda m, s: calibrate(nn.Linear(4, 4), samples=2)),
    (TypeError, "unexpected keyword", lambda m, s: calibrate(m, FASHION, scheduler=s, samples=2, bits=4)),
    (FileNotFoundError, "no such data set", lambda m, s: calibrate(m, "nowhere.jsonl", scheduler=s)),
]


@pytest.mark.parametrize("error, text, call", REFUSED, ids=[text for _, text, _ in REFUSED])
def test_what_cannot_run_is_told(dit, error, text, call):
    with pytest.raises(error, match=text):
        call(*dit)


def test_a_model_that_needs_more_says_what():
    class Prompted(nn.Module):
        in_channels, sample_size = 1, 4

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, timestep, encoder_hidden_states):
            return self.fc(x + encoder_hidden_states)

    with pytest.raises(ValueError, match="also needs encoder_hidden_states: give call="):
        calibrate(Prompted(), samples=2)
    c = calibrate(Prompted(), samples=20, call=lambda module, x, t, samples: module(x, t, torch.ones(4)))
    assert counts(c, "fc.weight") == [2 * 16 // 4] * 10


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    import doctest

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(SAMPLE.parent, target_is_directory=True)
    test = doctest.DocTestParser().get_doctest(calibrate.__doc__, {}, "calibrate", None, None)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0
