"""The short functions: quantize, verify, diff, export, inspect. They have the names and settings of the command line and write the same bytes."""

from __future__ import annotations

from . import _core, _jobs
from ._progress import Watch

__all__ = ["diff", "export", "inspect", "quantize", "report", "verify"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Unpack

    from ._settings import QuantizeSettings, Settings
    from ._types import Path, ProgressLike
    from .results import Result

RUN_KEYWORDS = {
    "config": None,
    "profile": None,
    "progress": None,
    "overwrite": False,
    "mkdir": False,
    "restart": False,
    "verify": True,
    "strict": False,
    "allow_unmatched": False,
    "side_files": True,
    "component": None,
    "variant": None,
    "follow_symlinks": True,
    "skip_unknown_dtype": False,
    "shard_size": None,
    "lora": None,
}


def adapters_of(lora):
    """Adapters as the library takes them, 'FILE:STRENGTH': from one path, or from paths and (path, strength) pairs."""
    import os

    items = [lora] if isinstance(lora, (str, os.PathLike)) else list(lora)
    return [f"{os.fspath(item[0])}:{float(item[1]):.12f}" if isinstance(item, tuple) else os.fspath(item) for item in items]


def run_quantize(path, output, keywords, keep_going=None):
    """Runs the job of quantize(); `keywords` are all its keyword arguments."""
    run = {name: keywords.pop(name) for name in RUN_KEYWORDS if name in keywords}
    config = _jobs.config_of(run.pop("config", None), run.pop("profile", None), keywords, "quantize", RUN_KEYWORDS)
    config.validate()
    if "mkdir" in run:
        run["make_parents"] = run.pop("mkdir")
    if "shard_size" in run:
        run["shard_bytes"] = int(_jobs.bytes_of(run.pop("shard_size") or 0))
    if run.get("lora") is not None:
        run["lora"] = adapters_of(run["lora"])
    source = _jobs.require_model(path)
    target = None if output is None else _jobs.path_of(output)
    with Watch(run.pop("progress", None), keep_going) as watch:
        report = _jobs.report_of(_core.run_quantize(source, target, config, watch, _jobs.log, **run))
    from .results import result_of

    return result_of(report["output"]["path"] if target is None else target, report)


def quantize(path: Path, output: Path | None = None, **settings: Unpack[QuantizeSettings]) -> Result:
    """Quantizes a model into a container folder and measures the result.

    path: a .safetensors or .gguf file, a *.safetensors.index.json, or a model folder; output: the folder to write (None: "NAME-int4" beside the source).
    Keywords, all optional. Settings: every field of DiffusionQuantConfig, and short names as on the command line: bits, group, time_groups, calib, samples,
    target_size ("6.5GB"), plan (a file), threads, max_memory ("4GB"), spatial, time_aware; config: a DiffusionQuantConfig to start from; profile: 'edge',
    'local' or 'cloud' (its values, which the other keywords change). Run: overwrite, mkdir, restart, verify (True), strict, allow_unmatched,
    side_files (True), component,
    variant, follow_symlinks (True), skip_unknown_dtype, shard_size ("5GB"); lora: adapters to merge first, a path or a list of paths, "FILE:STRENGTH" or
    (path, strength); progress: True for a bar on a terminal, or a callable that takes a Progress and
    may return False to cancel.
    Returns a Result. Raises ModelNotFoundError, FormatError, ConfigurationError (BudgetError: target_size not met), ValidationError, OSError (FileExistsError
    without overwrite), MemoryError, Interrupted (cancelled; the same call continues), TypeError for an unknown keyword.

    >>> import arrow_quant_v2 as aq
    >>> r = aq.quantize('examples/dit-fashion', 'dit-int4-g64', bits=4, group=64)
    >>> r.bpw < 4.6, r.layers['transformer_blocks.0.ff.net.2.weight'].group_size
    (True, 64)
    """
    return run_quantize(path, output, settings)


def verify(path: Path, against: Path | None = None, *, min_accuracy: float | None = None, threads: int = 0, progress: ProgressLike = None) -> dict[str, Any]:
    """Checks a container: structure, hashes, every value; with `against` (the source model) the real error of each tensor.

    min_accuracy: floor of the cosine similarity per layer (None: that of the stored configuration). Returns the report (docs/json.md) as a dict; "ok" tells
    whether everything holds, "problems" lists what does not. Raises ModelNotFoundError, FormatError, Interrupted.

    >>> import arrow_quant_v2 as aq
    >>> aq.verify('dit-int4', 'examples/dit-fashion')['ok']
    True
    """
    source = None if against is None else _jobs.require_model(against)
    floor = -1.0 if min_accuracy is None else float(min_accuracy)
    if min_accuracy is not None and not 0 <= floor <= 1:
        raise ValueError(f"Invalid accuracy threshold: {min_accuracy}. Must be between 0.0 and 1.0")
    with Watch(progress) as watch:
        return _jobs.report_of(_core.run_verify(_jobs.require_model(path), source, watch, _jobs.log, threads=threads, min_accuracy=floor))


def diff(a: Path, b: Path, *, threads: int = 0, progress: ProgressLike = None) -> dict[str, Any]:
    """Compares two models of any readable kind, tensor by tensor: two containers, or a container and its source.

    Returns the report (docs/json.md) as a dict. Raises ModelNotFoundError, FormatError, Interrupted.

    >>> import arrow_quant_v2 as aq
    >>> aq.diff('dit-int4', 'examples/dit-fashion')['equal']
    False
    """
    with Watch(progress) as watch:
        return _jobs.report_of(_core.run_diff(_jobs.require_model(a), _jobs.require_model(b), watch, _jobs.log, threads=threads))


def export(
    path: Path,
    output: Path | None = None,
    *,
    to: str = "safetensors",
    dtype: str | None = None,
    type: str | None = None,
    source: Path | None = None,
    lora: Any = None,
    rotate: bool = False,
    overwrite: bool = False,
    mkdir: bool = False,
    shard_size: int | str | None = None,
    threads: int = 0,
    progress: ProgressLike = None,
) -> dict[str, Any]:
    """Exports a container to a format that other programs load (docs/exports.md).

    to: 'safetensors' (dequantized; a folder like the source's, or one file), 'gguf' or 'comfy-int8' (one file), 'gptq' (a folder).
    output: the folder or file to write (None: beside the container). dtype: 'f32', 'f16', 'bf16' or None (the source's).
    type: the blocks of a GGUF file, 'auto', 'q8_0', 'q4_0', 'q4_1', 'q4_k', 'q2_k', 'f16'.
    source: the original model; layers whose codes do not fit the format's grid are coded from it, not from the dequantized weights
    (lora: with the adapters that the container has merged, as for quantize). rotate: comfy-int8 with rotated inputs.
    shard_size: a folder gets a new file of weights beyond this ("5GB"), and their index.
    Returns the report (docs/json.md) as a dict; its 'recoding' tells per layer the error that the format adds.
    Raises ModelNotFoundError, FormatError, ConfigurationError, OSError.

    >>> import arrow_quant_v2 as aq
    >>> e = aq.export('dit-int4', 'dit-plain', dtype='f16')
    >>> e['dtype'], e['n_dequantized'] > 0
    ('F16', True)
    >>> aq.export('dit-int4', 'dit.gguf', to='gguf')['recoding']['n_dequantized']
    0
    """
    container = _jobs.require_model(path)
    suffix = {"gguf": ".gguf", "comfy-int8": "-comfy-int8.safetensors"}.get(to, f"-{to}")
    target = container.rstrip("/") + suffix if output is None else _jobs.path_of(output)
    options: dict[str, Any] = {"dtype": dtype, "type": type, "rotate": rotate, "overwrite": overwrite, "make_parents": mkdir, "threads": threads}
    if shard_size is not None:
        options["shard_bytes"] = int(_jobs.bytes_of(shard_size))
    if source is not None:
        options["source"] = _jobs.require_model(source)
    if lora is not None:
        options["lora"] = adapters_of(lora)
    with Watch(progress) as watch:
        return _jobs.report_of(_core.run_export(container, to, target, watch, _jobs.log, **options))


def inspect(path: Path, *, component: str | None = None, variant: str | None = None, **settings: Unpack[Settings]) -> dict[str, Any]:
    """What is in a model or container: format, modality, tensors, and what a run with these settings would do with each.

    Settings are those of quantize(). Returns the report (docs/json.md) as a dict. Raises ModelNotFoundError, FormatError, ConfigurationError.

    >>> import arrow_quant_v2 as aq
    >>> aq.inspect('examples/dit-fashion')['modality']
    'image'
    """
    config = _jobs.config_of(settings.pop("config", None), settings.pop("profile", None), settings, "inspect", ("component", "variant", "config", "profile"))
    return _jobs.report_of(_core.run_inspect(_jobs.require_model(path), config, component=component, variant=variant))


def report(
    path: Path,
    output: Path | None = None,
    *,
    against: Path | None = None,
    calib: Path | None = None,
    show: str | None = None,
    overwrite: bool = False,
    threads: int = 0,
    progress: ProgressLike = None,
) -> dict[str, Any]:
    """Writes one self-contained HTML page about a container: sizes, errors, bits, fallbacks, the command that makes it again.

    output: the file to write (None: "PATH.html"); against: the source model, to measure errors and sensitivities; calib: calibration statistics, to measure the
    errors of outputs over the schedule; show: the layer whose histograms are drawn (None: the one with the largest error).
    Returns the report (docs/json.md) as a dict. Raises ModelNotFoundError, FormatError, ConfigurationError, OSError.

    >>> import arrow_quant_v2 as aq
    >>> aq.report('dit-int4', 'dit-int4.html', against='examples/dit-fashion')['n_layers']
    42
    """
    source = _jobs.require_model(path)
    target = f"{source.rstrip('/')}.html" if output is None else _jobs.path_of(output)
    sides = [None if side is None else _jobs.require_model(side) for side in (against, calib)]
    with Watch(progress) as watch:
        return _jobs.report_of(
            _core.run_report(source, target, watch, _jobs.log, against=sides[0], calib=sides[1], layer=show, overwrite=overwrite, threads=threads)
        )


_jobs.show_keywords(quantize, RUN_KEYWORDS)
_jobs.show_keywords(inspect, {"config": None, "profile": None})
for _member in (quantize, verify, diff, export, report, inspect):
    _member.__module__ = "arrow_quant_v2"
for _member in (verify, diff, export, report):  # the others take **settings
    globals()[_member.__name__] = _jobs.suggesting(_member)
