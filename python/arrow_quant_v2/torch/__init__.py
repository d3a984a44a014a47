"""ArrowQuant for torch: recording calibration from a running model, loading quantized models into modules, running them.

Each part is imported when it is first asked for; `import arrow_quant_v2` alone never imports torch.
"""

# name -> the file here that holds it; one line for each public name.
_PARTS: dict[str, str] = {
    "IntegerLinear": "activations",
    "QuantConv": "modules",
    "QuantLinear": "modules",
    "StoredForm": "stored",
    "TimeContext": "time_context",
    "integer_activations": "activations",
    "load_into": "load",
    "quantize_module": "load",
    "Recorder": "recorder",
    "calibrate": "running",
}

__all__ = sorted(_PARTS)


def __getattr__(name):
    if name in _PARTS:
        from importlib import import_module

        value = globals()[name] = getattr(import_module("." + _PARTS[name], __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PARTS})
