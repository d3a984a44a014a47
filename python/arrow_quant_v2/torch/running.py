"""calibrate: runs a model over a data set at levels of noise that cover the schedule, with a Recorder attached.

Three kinds of run: a diffusers pipeline samples; a denoiser predicts the noise of noised data; a masked language model predicts hidden tokens. All random
numbers come from one seeded generator, so the same call records the same inputs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional

from .. import _jobs
from .._core import Calibration, _calibration_cache_key
from .._progress import warn
from ..data import DataSet, Sample
from .clock import TIMESTEP_NAMES
from .recorder import Recorder

__all__ = ["calibrate"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .._types import Path, ProgressLike

TASKS = ("pipeline", "noise", "mask")
STEPS_OF_PIPELINES = 20


def calibrate(
    model: Any,
    data: Any = None,
    path: Path | None = None,
    *,
    samples: int = 128,
    timesteps: int | list[int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    task: str | None = None,
    scheduler: Any = None,
    component: str | None = None,
    labels: Any = None,
    tokenizer: Callable[[str], list[int]] | None = None,
    mask_id: int | None = None,
    seq_len: int | None = None,
    sample_shape: tuple[int, ...] | None = None,
    call: Callable[..., Any] | None = None,
    pipeline_options: dict[str, Any] | None = None,
    gradients: bool | str = False,
    cache_dir: Path | None = None,
    overwrite: bool = False,
    append: bool = False,
    progress: ProgressLike = None,
    **recording: Any,
) -> Calibration:
    """Runs a model over a data set and records what its layers receive. Returns the collection; with a path it is written there too.

    model: a diffusers pipeline, or a module: a denoiser with its `scheduler`, or a masked language model. component: of a pipeline, 'transformer' or 'unet'.
    data: a path or DataSet (images, arrays, texts, prompts), an array [n, ...], or a list of str; rows {"data", "timestep"} are inputs, run as they are. None:
    synthetic, standard normal inputs, or uniform tokens for text; every report says so.
    samples: how many of it are used; timesteps: how many levels of noise each one is seen at (1; for pipelines the inference steps, 20), spread evenly over the
    schedule, or a list of timesteps; batch_size; seed.
    task: 'pipeline', 'noise' or 'mask'; None: told by the model and the data.
    scheduler: what the denoiser was trained with; or, where there is none, the shape of its noise schedule, 'linear' or 'cosine' (a configuration's
    beta_schedule).
    labels: one int for each sample, where the model takes class_labels and the data set has none (None: uniform).
    tokenizer: text to a list of token ids (None: its UTF-8 bytes that the model has tokens for); mask_id: the mask token (None: from the model's config, else
    its last one); seq_len: tokens in a row (None: the model's, else 128).
    sample_shape: of synthetic inputs (None: from the model's config).
    call: call(module, x, t, samples) runs the model where forward needs more than the input, the timestep and class labels.
    pipeline_options: further arguments of the pipeline's call.
    gradients: 'output' also records what an error in each layer costs the model's output (of a language model: its predictions for masked tokens), by which a
    budget is then spent; it needs no labels, and about three times the time. True: the gradients of the training loss.
    cache_dir: a folder that keeps results, found again by the hash of model, data and options. A damaged or foreign entry is refused with the reason.
    overwrite, append, progress, and further keywords: as of Recorder.

    >>> import torch
    >>> from diffusers import DDIMScheduler, DiTTransformer2DModel
    >>> from arrow_quant_v2.torch import calibrate
    >>> dit = DiTTransformer2DModel.from_pretrained('examples/dit-fashion', subfolder='transformer')
    >>> scheduler = DDIMScheduler.from_pretrained('examples/dit-fashion', subfolder='scheduler')
    >>> c = calibrate(dit, 'examples/fashion-calib.npz', 'dit.aqcal', scheduler=scheduler, samples=32, overwrite=True, layers=['*.to_q'])
    >>> len(c.layers), c.data_name, c.synthetic
    (6, 'fashion-calib.npz', False)
    """
    run = Run(model, component, scheduler, task)
    feed = Feed(data, labels, samples)
    run.task = run.task or run.guess(feed)
    if run.task not in TASKS:
        raise ValueError(f"Invalid task: {task!r}. Must be 'pipeline', 'noise', or 'mask'")
    if gradients not in (False, True, "output"):
        raise ValueError(f"Invalid gradients: {gradients!r}. Must be False, True, or 'output'")
    if append and cache_dir is not None:
        raise TypeError("append and cache_dir do not go together: an entry holds one run")
    options = {"tokenizer": tokenizer, "mask_id": mask_id, "seq_len": seq_len, "sample_shape": sample_shape, "call": call}
    makers: dict[str, Callable[..., Plan]] = {"pipeline": sampling, "noise": noising, "mask": masking}
    plan = makers[run.task](run, feed, samples, timesteps, batch_size, seed, gradients, pipeline_options, **options)
    settings = {
        "timestep": run.timestep,
        "num_timesteps": run.num_timesteps,
        "data_name": feed.name or plan.synthetic,
        "data_sha256": feed.sha256,
        "synthetic": not feed.rows or any(row.synthetic for row in feed.rows),
        "modality": plan.modality,
        "seed": seed,
        "gradients": gradients,
        **({"gradients": "logits" if run.task == "mask" else "output", "output": plan.output} if gradients == "output" else {}),
        **recording,
    }

    def record(target, replace):
        with Recorder(run.module, target, overwrite=replace, append=append, progress=progress, total=plan.passes, **settings) as recorder, quiet(run.module):
            with torch.set_grad_enabled(gradients is True), own_gradients(run.module):
                for batch in plan.batches:
                    batch()
                    run.module.zero_grad(set_to_none=True)
        return recorder.collect()

    if cache_dir is None:
        return record(path, overwrite)
    if call is not None or callable(settings["timestep"]) and run.task != "mask":
        raise TypeError("cache_dir needs arguments that can be hashed: call and timestep callables cannot")
    known = {name: value for name, value in settings.items() if not callable(value)}
    parts = {
        "model": [type(run.module).__qualname__, state_sha256(run.module), config_of(run.module)],
        "data": [feed.sha256, hash_of(feed.rows)],  # the second also tells how the first was read: its size, column, range …
        "options": {**known, "task": run.task, "samples": samples, "timesteps": timesteps, "batch_size": batch_size, "tokens": plan.tokens}
        | {"labels": feed.labels, "sample_shape": sample_shape, "pipeline_options": pipeline_options, "scheduler": config_of(run.scheduler)},
    }
    if path is not None and not overwrite and os.path.exists(path):
        raise FileExistsError(17, "the calibration file exists: overwrite=True replaces it", _jobs.path_of(path))
    folder, key = _jobs.path_of(cache_dir), _calibration_cache_key(feed.sha256, json.dumps(parts, sort_keys=True))
    found = Calibration._cache_find(folder, key)
    if found is None:
        found = record(None, False)
        found._cache_store(folder, key)
    if path is not None:
        found.save(path, overwrite=overwrite)
    return found


# ---- model and data ----


class Run:
    """What is run: the module that is recorded, the pipeline and scheduler around it, its timestep argument."""

    def __init__(self, model, component, scheduler, task):
        self.task = task
        self.pipeline = None if isinstance(model, torch.nn.Module) else model
        self.module = model
        if self.pipeline is not None:
            names = [component] if component else ["transformer", "unet"]
            self.module = next((m for name in names if isinstance(m := getattr(model, name, None), torch.nn.Module)), None)
            if self.module is None:
                raise TypeError(f"model must be a torch.nn.Module or a pipeline with a {' or '.join(names)}, not {type(model).__name__}")
        if isinstance(scheduler, str):
            scheduler = Betas(scheduler)
        self.scheduler = scheduler if scheduler is not None else getattr(self.pipeline, "scheduler", None)
        self.config = getattr(self.module, "config", None)
        self.parameters = inspect.signature(self.module.forward).parameters
        self.timestep = next((name for name in TIMESTEP_NAMES if name in self.parameters), None)
        trained = getattr(getattr(self.scheduler, "config", None), "num_train_timesteps", None)
        self.num_timesteps = int(trained) if trained else 1000

    def setting(self, *names):
        """The first of these names that the module's config, or the module itself, has a value for."""
        for name in names:
            for owner in (self.config, self.module):
                value = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
                if value is not None and not callable(value):
                    return value
        return None

    def guess(self, feed):
        texts = feed.rows and feed.rows[0].text is not None
        if self.pipeline is not None:
            return "pipeline" if texts or not feed.rows or getattr(self.pipeline, "vae", None) is not None else "noise"
        tokens = texts or (feed.rows and feed.rows[0].integers and (feed.rows[0].kind == "input" or self.setting("mask_id", "mask_token_id", "vocab_size")))
        if tokens or (not feed.rows and self.scheduler is None and self.setting("mask_id", "mask_token_id") is not None):
            return "mask"
        return "noise"

    def like_weights(self, x):
        """x with the device and, where it is floating, the type of the module's weights."""
        weight = next(self.module.parameters())
        return x.to(weight.device, weight.dtype) if x.is_floating_point() else x.to(weight.device)


class Feed:
    """The samples, as a list: `samples` of them at most. `rows` is empty where there is no data."""

    def __init__(self, data, labels, samples):
        self.rows = []
        self.name = self.sha256 = None
        self.labels = None if labels is None else [int(label) for label in labels]
        if data is None:
            return
        if isinstance(data, (str, bytes, os.PathLike)):
            data = DataSet(data)
        if isinstance(data, DataSet):
            self.rows, self.name, self.sha256 = data.take(samples), data.name, data.sha256
        elif isinstance(data, (np.ndarray, torch.Tensor)):
            values = data.detach().float().cpu().numpy() if isinstance(data, torch.Tensor) else data
            whole = bool(np.issubdtype(data.dtype, np.integer)) if isinstance(data, np.ndarray) else not data.is_floating_point()
            self.rows = [Sample("input", i + 1, values=np.asarray(row, np.float32), integers=whole) for i, row in enumerate(values[:samples])]
            self.name, self.sha256 = "array", hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
        else:
            self.rows = [row if isinstance(row, Sample) else Sample("text", i + 1, text=row) for i, row in zip(range(samples), data, strict=False)]
            if not all(isinstance(row.text, str) or row.values is not None for row in self.rows):
                raise TypeError("data must be a path, a DataSet, an array, a list of str, or Samples")
            self.name, self.sha256 = "list", hash_of(self.rows)
        if not self.rows:
            raise ValueError(f"the data set {self.name} has no samples")
        if len(self.rows) < samples:
            warn(f"the data set {self.name} has {len(self.rows)} samples, {samples} were asked for")

    @property
    def given(self):
        """Whether the rows are inputs with their own timesteps ({"data": …, "timestep": …}): run as they are."""
        return bool(self.rows) and all(row.kind == "data" and row.timestep is not None for row in self.rows)

    def levels(self, schedule):
        return [(i, (row.timestep + 0.5) / schedule) for i, row in enumerate(self.rows)]

    def labels_of(self, n, most, generator):
        """Class labels: the caller's, the data set's, else uniform."""
        if self.labels is not None:
            return torch.tensor([self.labels[i % len(self.labels)] for i in range(n)])
        if self.rows and all(row.label is not None for row in self.rows[:n]):
            return torch.tensor([row.label for row in self.rows[:n]])
        return torch.randint(0, most, (n,), generator=generator)


def hash_of(rows):
    whole = hashlib.sha256()
    for row in rows:
        content = row.text.encode() if row.text is not None else np.ascontiguousarray(row.values).tobytes()
        shape = None if row.values is None else row.values.shape
        whole.update(f"{row.kind} {len(content)} {shape} {row.integers} {row.label} {row.timestep} {row.synthetic} ".encode() + content)
    return whole.hexdigest()


def hashed(tokens):
    return list(tokens.shape), hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


class Plan:
    """Passes to make: `batches` yields callables. `synthetic`: name of the data where there are none; `tokens`: what is masked, to be
    hashed; `output`: as of Recorder."""

    def __init__(self, passes, batches, modality, synthetic, tokens=None, output=None):
        self.passes, self.batches, self.modality, self.synthetic, self.tokens = passes, batches, modality, synthetic, tokens
        self.output = output


# ---- the three kinds of run ----


def levels(n, timesteps, schedule, generator):
    """[(sample, where in [0, 1) of the schedule)]: each sample at `timesteps` levels, all of them together spread evenly."""
    if isinstance(timesteps, (list, tuple)):
        if any(not 0 <= t < schedule for t in timesteps):
            raise ValueError(f"timesteps must lie in 0..{schedule - 1}")
        return [(i, (t + 0.5) / schedule) for i in range(n) for t in timesteps]  # the middle of step t: t / schedule may round to a step before it
    count = n * (timesteps or 1)
    order = torch.randperm(count, generator=generator)
    at = (order + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    return [(r % n, float(at[r])) for r in range(count)]


def noising(run, feed, samples, timesteps, batch_size, seed, gradients, pipeline_options, *, sample_shape, call, **_):
    """A denoiser predicts the noise of noised data; without data its inputs are standard normal at every level."""
    generator = torch.Generator().manual_seed(seed)
    if run.timestep is None and call is None:
        raise ValueError(f"forward of {type(run.module).__name__} has no timestep argument among {', '.join(TIMESTEP_NAMES)}; give call=")
    if feed.rows:
        shapes = {tuple(row.values.shape) if row.values is not None else None for row in feed.rows}
        if len(shapes) != 1 or None in shapes:
            raise ValueError(f"the samples must be arrays of one shape, these are {sorted(map(str, shapes))[:5]}: give DataSet(…, size=…)")
        if run.scheduler is None and not feed.given:
            raise ValueError(
                "noising data needs the scheduler that the model was trained with: give scheduler= ('linear' or 'cosine' if there is none), or a pipeline"
            )
        clean = torch.stack([torch.from_numpy(np.ascontiguousarray(row.values)) for row in feed.rows])
        n, shape = len(feed.rows), tuple(clean.shape[1:])
    else:
        n, clean, shape = samples, None, sample_shape or input_shape(run)
    takes_labels = "class_labels" in run.parameters
    most = run.setting("num_embeds_ada_norm", "num_class_embeds") or 1
    y = feed.labels_of(n, int(most), generator) if takes_labels else None
    if call is None:
        needed = [p.name for p in run.parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
        missing = [name for name in needed if name not in (run.timestep, "class_labels")]
        if missing:
            raise ValueError(f"forward of {type(run.module).__name__} also needs {', '.join(missing)}: give call=, or a pipeline")
    rows = feed.levels(run.num_timesteps) if feed.given else levels(n, timesteps, run.num_timesteps, generator)
    if feed.given and gradients is True:
        raise ValueError("rows with their own timesteps are inputs, which have no loss: give clean data for gradients")

    def batch(begin):
        some = rows[begin : begin + batch_size]
        index = torch.tensor([i for i, _ in some])
        t = torch.tensor([min(int(at * run.num_timesteps), run.num_timesteps - 1) for _, at in some])
        noise = torch.randn((len(some), *shape), generator=generator)
        x = noise if clean is None else clean[index] if feed.given else noised(run.scheduler, clean[index], noise, t, run.num_timesteps)
        arguments = {} if y is None else {"class_labels": run.like_weights(y[index])}
        x, t_in = run.like_weights(x), run.like_weights(t)
        if call is not None:
            out = call(run.module, x, t_in, [feed.rows[i] for i in index] if feed.rows else None)
        else:
            out = run.module(x, **{run.timestep: t_in}, **arguments)
        if gradients is True:
            functional.mse_loss(first_of(out)[:, : shape[0]].float().cpu(), target_of(run.scheduler, clean, index, noise, t)).backward()

    passes = later(batch, len(rows), batch_size)
    return Plan(-(-len(rows) // batch_size), passes, "image", "synthetic: standard normal", output=lambda out: first_of(out)[:, : shape[0]])


def masking(run, feed, samples, timesteps, batch_size, seed, gradients, pipeline_options, *, tokenizer, mask_id, seq_len, call, **_):
    """A masked language model: a share of the tokens is hidden, which is its timestep."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = max((m.num_embeddings for m in run.module.modules() if isinstance(m, torch.nn.Embedding)), default=0) or run.setting("vocab_size") or 0
    vocabulary = int(run.setting("vocab_size") or vocabulary)
    mask = mask_id if mask_id is not None else run.setting("mask_id", "mask_token_id")
    mask = int(mask) if mask is not None else vocabulary - 1
    if mask < 0:
        raise ValueError("the mask token cannot be told from the model: give mask_id=")
    length = int(seq_len or run.setting("seq_len", "max_position_embeddings", "n_positions") or 128)
    if feed.rows:
        if feed.given:  # whole rows, with their masks
            length = feed.rows[0].values.size
            if any(row.values.size != length for row in feed.rows):
                raise ValueError("rows of token ids with their own timesteps must be of one length: they run as they are")
        ids = windows(feed.rows, tokenizer, vocabulary, mask, length)[:samples]
        if len(ids) == 0:
            raise ValueError(f"the data set {feed.name} has fewer than {length} tokens: give a smaller seq_len=")
    else:
        ids = torch.randint(0, vocabulary - 1, (samples, length), generator=generator)
        ids += ids >= mask  # any token but the mask
    rows = feed.levels(run.num_timesteps) if feed.given else levels(len(ids), timesteps, run.num_timesteps, generator)
    named = run.timestep
    if named is None:  # the model counts its masks itself: so does the recorder
        run.timestep = lambda *inputs, **named: ((inputs or tuple(named.values()))[0] == mask).float().mean(-1)

    hidden = torch.zeros(0, dtype=torch.bool)

    def batch(begin):
        nonlocal hidden
        some = rows[begin : begin + batch_size]
        tokens = ids[[i for i, _ in some]]
        t = torch.tensor([at for _, at in some], dtype=torch.float32)
        hidden = torch.rand(tokens.shape, generator=generator) < t[:, None]
        if feed.given:
            hidden = tokens == mask
        x, t_in = run.like_weights(tokens.masked_fill(hidden, mask)), run.like_weights(t)
        if call is not None:
            out = call(run.module, x, t_in, None)
        else:
            out = run.module(x, **({named: t_in} if named else {}))
        if gradients is True and hidden.any():
            out = first_of(out, "logits").float().cpu()
            functional.cross_entropy(out[hidden], tokens[hidden]).backward()

    def predicted(out):
        logits = first_of(out, "logits")
        return logits[hidden.to(logits.device)]

    return Plan(-(-len(rows) // batch_size), later(batch, len(rows), batch_size), "text", "synthetic: uniform tokens", [mask, *hashed(ids)], predicted)


def sampling(run, feed, samples, timesteps, batch_size, seed, gradients, pipeline_options, **_):
    """A pipeline samples from prompts or class labels. Its passes are counted by the recorder: how many there are depends on the pipeline."""
    if run.pipeline is None:
        raise ValueError("task 'pipeline' needs a diffusers pipeline")
    if gradients is True:
        raise ValueError("a pipeline has no loss to differentiate: give gradients='output', or the module and its scheduler")
    if isinstance(timesteps, (list, tuple)):
        raise ValueError("a pipeline chooses its own timesteps: give their number")
    known = inspect.signature(run.pipeline.__call__).parameters
    generator = torch.Generator().manual_seed(seed)
    steps = timesteps or STEPS_OF_PIPELINES
    n = len(feed.rows) or samples
    if "class_labels" in known:
        y = feed.labels_of(n, int(run.setting("num_embeds_ada_norm", "num_class_embeds") or 1), generator).tolist()

    def batch(begin):
        some = range(begin, min(begin + batch_size, n))
        arguments = {"num_inference_steps": steps}
        if "class_labels" in known:
            arguments["class_labels"] = [y[i] for i in some]
        elif "prompt" in known:
            arguments["prompt"] = [feed.rows[i].text if feed.rows else "" for i in some]
        elif "batch_size" in known:
            arguments["batch_size"] = len(some)
        if "generator" in known:
            arguments["generator"] = torch.Generator().manual_seed(seed + begin)
        with silent(run.pipeline):
            run.pipeline(**(arguments | (pipeline_options or {})))

    return Plan(None, later(batch, n, batch_size), None, "synthetic: samples of the model itself")


def later(batch, n, batch_size):
    """Callables, one for each batch."""
    for begin in range(0, n, batch_size):
        yield lambda begin=begin: batch(begin)


# ---- parts of them ----


class Betas:
    """What a scheduler does here, by the shape of its noise schedule alone: 'linear' is that of DDPM (Ho et al., 2020: 1e-4 to 0.02 over 1000 timesteps),
    'cosine' that of Nichol and Dhariwal (2021). The model predicts the noise."""

    def __init__(self, shape, n=1000):
        if shape not in ("linear", "cosine"):
            raise ValueError("Invalid beta_schedule. Must be 'linear' or 'cosine'")
        if shape == "linear":
            betas = torch.linspace(1e-4, 0.02, n, dtype=torch.float64)
        else:
            left = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * torch.pi / 2) ** 2
            betas = (1 - left[1:] / left[:-1]).clamp(max=0.999)
        self.signal = torch.cumprod(1 - betas, 0)  # share of the data's variance at each timestep
        self.config = {"beta_schedule": shape}

    def add_noise(self, clean, noise, t):
        signal = self.signal[t].reshape(-1, *[1] * (clean.ndim - 1))
        return (signal.sqrt() * clean + (1 - signal).sqrt() * noise).to(clean.dtype)


def noised(scheduler, clean, noise, t, schedule):
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(clean, noise, t)
    sigma = ((t + 1) / schedule).reshape(-1, *[1] * (clean.ndim - 1))  # flow matching: a straight line
    return (1 - sigma) * clean + sigma * noise


def target_of(scheduler, clean, index, noise, t):
    """What the model is trained to predict."""
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon")
    if clean is None or kind == "epsilon":
        return noise if hasattr(scheduler, "add_noise") or clean is None else noise - clean[index]
    if kind == "sample":
        return clean[index]
    if kind == "v_prediction":
        return scheduler.get_velocity(clean[index], noise, t)
    raise ValueError(f"the loss of prediction type {kind!r} is not known: run the backward passes yourself, in a Recorder with gradients=True")


def first_of(out, name="sample"):
    if isinstance(out, torch.Tensor):
        return out
    return getattr(out, name) if hasattr(out, name) else out[0]


def input_shape(run):
    """[channels, height, width] from the config."""
    channels, size = run.setting("in_channels"), run.setting("sample_size")
    if channels is None or size is None:
        raise ValueError("the shape of an input cannot be told from the model's config: give sample_shape=")
    return (int(channels), *((int(size), int(size)) if isinstance(size, (int, float)) else map(int, size)))


def windows(rows, tokenizer, vocabulary, mask, length):
    """Token ids [n, length]: rows one after the other, cut into windows; a rest at the end is left out. Rows of token ids are taken as they are."""
    stream = []
    for row in rows:
        if row.text is not None:
            encoded = tokenizer(row.text) if tokenizer else row.text.encode()
            encoded = getattr(encoded, "input_ids", encoded)
            stream.extend(i for i in encoded if tokenizer or (i < vocabulary and i != mask))
        elif row.values is not None and row.integers:
            stream.extend(int(i) for i in row.values.reshape(-1))
        else:
            raise ValueError(f"sample {row.line} is neither text nor token ids")
    if any(not 0 <= i < vocabulary for i in stream):
        raise ValueError(f"there are token ids outside the model's vocabulary of {vocabulary}")
    n = len(stream) // length
    return torch.tensor(stream[: n * length]).reshape(n, length)


@contextmanager
def quiet(module):
    """Evaluation mode (no dropout) while it runs."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def own_gradients(module):
    """The caller's .grad are set aside while it runs."""
    kept = [(weight, weight.grad) for weight in module.parameters()]
    module.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for weight, gradient in kept:
            weight.grad = gradient


@contextmanager
def silent(pipeline):
    """Without the pipeline's own progress bar."""
    before = getattr(pipeline, "_progress_bar_config", None)
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is not None:
            pipeline._progress_bar_config = before
        elif hasattr(pipeline, "_progress_bar_config"):
            del pipeline._progress_bar_config


def state_sha256(module):
    """SHA-256 over names, types, shapes and bytes of all weights and buffers."""
    whole = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        whole.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\n".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def config_of(owner):
    config = getattr(owner, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config  # of transformers
    return {str(k): repr(v) for k, v in sorted(config.items())} if isinstance(config, dict) else None
