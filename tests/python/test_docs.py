"""Every public name is documented, introspectable, and its example runs."""

import doctest
import importlib
import inspect
import subprocess
import sys

import arrow_quant_v2 as aq
import pytest
from files import ROOT, write_sharded


def documented():
    for name in aq.__all__:
        thing = getattr(aq, name)
        if isinstance(thing, str):
            continue
        yield name, thing
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            for member in dir(thing):
                value = getattr(thing, member)
                if not member.startswith("_") and callable(value):
                    yield f"{name}.{member}", value


def run_examples(name, thing):
    assert thing.__doc__, name
    test = doctest.DocTestParser().get_doctest(thing.__doc__, {}, name, None, None)
    assert test.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test).failed == 0


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory):
    """Where the examples run: the sample model, a container made of it, and a small sharded model."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    (folder / "sharded").mkdir()
    write_sharded(folder / "sharded", {"model-00001-of-00002.safetensors": {"a": [[1.0, 2.0]]}, "model-00002-of-00002.safetensors": {"b": [[3.0, 4.0]]}})
    aq.quantize(folder / "examples/dit-fashion", folder / "dit-int4")
    return folder


@pytest.mark.parametrize("name, thing", [pytest.param(n, t, id=n) for n, t in documented()])
def test_every_name_has_a_docstring_and_its_example_runs(name, thing, example_folder, monkeypatch):
    monkeypatch.chdir(example_folder)
    run_examples(name, thing)


def of_others(cls, name):
    """Whether a method has its name, and so its meaning, from a class of another library."""
    return any(name in vars(base) for base in cls.__mro__ if not base.__module__.startswith("arrow_quant_v2"))


@pytest.mark.parametrize("module", ["torch", "diffusers", "transformers"])
@pytest.mark.filterwarnings("ignore")
def test_the_modules_for_other_libraries_are_documented_too(module, example_folder, monkeypatch):
    pytest.importorskip(module)
    monkeypatch.chdir(example_folder)
    ours = importlib.import_module(f"arrow_quant_v2.{module}")
    n = 0
    for name in ours.__all__:
        thing = getattr(ours, name)
        members = [m for m in dir(thing) if not m.startswith("_") and not of_others(thing, m)] if inspect.isclass(thing) else []
        for called, value in [(name, thing), *((f"{name}.{m}", getattr(thing, m)) for m in members)]:
            if callable(value):
                run_examples(f"{module}.{called}", value)
                n += 1
    assert n >= len(ours.__all__)


@pytest.mark.parametrize("name, thing", [pytest.param(n, t, id=n) for n, t in documented()])
def test_parameters_can_be_given_by_position_or_by_name(name, thing):
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return  # they take what Exception takes
    kinds = {p.name: p.kind for p in inspect.signature(thing).parameters.values() if p.name != "self"}
    if name == "ValidationSystem.cosine_similarity_batch":
        return  # the fixed name of its first parameter is a keyword of Python: as
    assert set(kinds.values()) <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


SIGNATURES = {
    "ArrowQuantV2": "(mode='diffusion')",
    "ArrowQuantV2.quantize": "(self, /, weights, bit_width=None, *, as_numpy=False)",
    "ArrowQuantV2.quantize_batch": "(self, /, weights_dict, bit_width=None, continue_on_error=None, *, as_numpy=False)",
    "ArrowQuantV2.quantize_batch_with_progress": "(self, /, weights_dict, bit_width=None, progress_callback=None, continue_on_error=None, *, as_numpy=False)",
    "ArrowQuantV2.quantize_layer_auto": "(self, /, weights, params, enable_simd=True)",
    "ArrowQuantV2.quantize_arrow": "(self, /, weights_table, bit_width=None)",
    "ArrowQuantV2.quantize_arrow_batch": "(self, /, record_batch, bit_width=None)",
    "ArrowQuantV2.quantize_batch_arrow": "(self, /, weights_table, bit_width=None, continue_on_error=None)",
    "PyArrowQuantizedLayer.dequantize_group": "(self, /, group_id, *, as_numpy=False)",
    "quantize_array": "(a, bits=4, group=128, *, method='rtn', as_numpy=False, threads=0)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_show_the_names_and_defaults(name):
    assert str(inspect.signature(dict(documented())[name])) == SIGNATURES[name]


@pytest.mark.parametrize(
    ("function", "stub", "others"),
    [("quantize", "QuantizeSettings", "path output"), ("quantize_async", "QuantizeSettings", "path output"), ("plan", "PlanSettings", "path")]
    + [("inspect", "Settings", "path component variant")],
)
def test_signatures_and_stubs_show_every_setting(function, stub, others):
    parameters = inspect.signature(getattr(aq, function)).parameters
    settings = getattr(importlib.import_module("arrow_quant_v2._settings"), stub).__annotations__
    fields = aq.DiffusionQuantConfig().to_dict()
    assert set(parameters) == set(settings) | set(others.split()) and set(fields) <= set(settings)
    assert {name: parameters[name].default for name in fields} == fields
    assert all(p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters.values())


def test_the_type_stubs_say_what_the_module_is():
    """The C part alone has a stub; the rest is annotated, and mypy checks it."""
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy.stubtest", "arrow_quant_v2._core", "--ignore-missing-stub"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
