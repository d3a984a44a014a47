"""What all long calls share: settings, paths, log."""

import errno
import os
from copy import copy

from ._core import DiffusionQuantConfig, ModelNotFoundError, config_sources, spelled

__all__ = ["config_of", "loads", "log", "path_of", "report_of", "require_model"]

SHORT_NAMES = {
    "bits": "bit_width",
    "group": "group_size",
    "time_groups": "num_time_groups",
    "calib": "calibration_path",
    "plan": "plan_path",
    "samples": "calibration_samples",
    "target_size": "target_model_size_mb",
    "threads": "num_threads",
    "max_memory": "max_memory_limit_mb",
    "spatial": "enable_spatial",
    "time_aware": "enable_time_aware",
}


def loads(text):
    """Parses JSON; the parser is loaded when first needed."""
    import json

    return json.loads(text)


def report_of(text):
    """A job's report as a dict. Its sentences of advice name settings as Python does: overwrite=True, not --overwrite."""
    report = loads(text)
    for key in ("warnings", "problems"):
        if key in report:
            report[key] = [spelled(sentence) for sentence in report[key]]
    if "rule" in report:
        report["rule"] = spelled(report["rule"])
    return report


def log(level, message):
    """A line of the library's log, into the logger of this module. Where nobody listens nothing is printed, logging's last resort included."""
    import logging

    logger = logging.getLogger("arrow_quant_v2")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logger.log(level, "%s", message)


def path_of(path):
    """str or os.PathLike as str; anything else is a TypeError."""
    text = os.fspath(path)
    return os.fsdecode(text)


def sentence(error):
    """str() of a ModelNotFoundError: what OSError gives would be "[Errno 2] …: 'path'"."""
    return error.strerror or BaseException.__str__(error)


ModelNotFoundError.__str__ = sentence  # type: ignore[method-assign]


def require_model(path):
    """The path, or ModelNotFoundError when there is nothing at it."""
    text = path_of(path)
    reason = None
    if not text or not os.path.exists(text):
        reason = f"Model not found: {text if text and text.isprintable() else repr(text)}"
    elif os.path.isdir(text) and not os.listdir(text):
        reason = f"Model not found: {text} is an empty folder"
    if reason:
        error = ModelNotFoundError(errno.ENOENT, reason, text)
        error.file = text
        error.hint = "give a .safetensors file, a *.safetensors.index.json, or a model folder"
        raise error
    return text


def whole(value, name):
    """An int, NumPy's among them, as int; TypeError for anything else."""
    from operator import index

    if not isinstance(value, bool):
        try:
            return index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def one_of(value, allowed, what):
    """A whole number among the allowed ones: `Invalid bit_width: 3. Must be 2, 4, or 8`."""
    if whole(value, what) not in allowed:
        *first, last = map(str, allowed)
        raise ValueError(f"Invalid {what}: {value}. Must be {', '.join(first)}, or {last}")
    return int(value)


def bytes_of(size):
    """Bytes of a size in words: "6.5GB" (10**9), "4GiB" (2**30), or a number of bytes."""
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        return float(size)
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    text = str(size).strip().upper().replace(" ", "")
    digits = text.rstrip("BKMGTI")
    try:
        return float(digits) * units[text[len(digits) :]]
    except (KeyError, ValueError):
        raise ValueError(f"Invalid size: {size!r}. Expected a number of bytes or words such as '6.5GB' (10**9) or '4GiB' (2**30)") from None


def nearest(word, words):
    """ "; did you mean 'x'?", or nothing when no word is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, words, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def suggesting(function):
    """The function, with a suggestion in the TypeError for an unknown keyword."""
    code = function.__code__
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

    def checked(*args, **keywords):
        for name in keywords:
            if name not in known:
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{nearest(name, known)}")
        return function(*args, **keywords)

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(checked, attribute, getattr(function, attribute))
    checked.__wrapped__ = function  # what inspect.signature() shows
    return checked


def config_of(config, profile, keywords, function, others=()):
    """A copy of `config` (None: all defaults) with a profile's values and keyword settings, which go by field names or short names.

    An unknown keyword is a TypeError with a suggestion.
    """
    if profile is not None and config is not None:
        raise TypeError(f"{function}() takes config or profile, not both: DiffusionQuantConfig.from_profile() gives a configuration to change")
    if config is not None and not isinstance(config, DiffusionQuantConfig):
        raise TypeError(f"config must be a DiffusionQuantConfig or None, not {type(config).__name__}")
    config = copy(config) if config is not None else DiffusionQuantConfig() if profile is None else DiffusionQuantConfig.from_profile(profile)
    for name, value in keywords.items():
        field = SHORT_NAMES.get(name, name)
        if not is_field(field):
            known = sorted(filter(is_field, dir(DiffusionQuantConfig))) + sorted(SHORT_NAMES) + sorted(others)
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{nearest(name, known)}")
        if value is not None and name in ("target_size", "max_memory"):
            value = bytes_of(value) / 2**20
            value = max(1, int(value)) if name == "max_memory" else value
        setattr(config, field, value)
    return config


def show_keywords(function, keywords):
    """Lets inspect.signature() and help() show what `function` takes as **settings: every setting with its default, and the `keywords` given with theirs.

    The function itself keeps **settings, so that an unknown keyword is answered with a suggestion; what is shown is its __wrapped__.
    """
    fields = DiffusionQuantConfig().to_dict()
    values = fields | {short: fields[field] for short, field in SHORT_NAMES.items()} | keywords | (function.__kwdefaults__ or {})
    code, first = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    values |= dict(zip(names[len(names) - len(first) :], first, strict=True))
    shown = ", ".join(f"{n}=values[{n!r}]" if n in values else n for n in names) + ", *, " + ", ".join(f"{n}=values[{n!r}]" for n in values if n not in names)
    scope = {"values": values, "__name__": "arrow_quant_v2"}
    exec(f"def {function.__name__}({shown}): ...", scope)  # noqa: S102 - of names in our own tables
    function.__wrapped__ = scope[function.__name__]
    function.__wrapped__.__doc__ = function.__doc__


def config_from_sources(profile=None, path=None, environment=True):
    """A configuration from all sources below a caller's own settings: default < profile < file < ARROW_QUANT_* environment."""
    return DiffusionQuantConfig.from_dict(loads(config_sources(profile, path, environment)))


def is_field(name):
    return isinstance(getattr(DiffusionQuantConfig, name, None), property)
