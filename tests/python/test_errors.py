"""Exceptions: their classes, attributes and whole texts."""

import inspect
import pickle
import re

import arrow_quant_v2 as aq
import numpy as np
import pytest
from arrow_quant_v2 import _core
from files import ROOT, write_model

ONE = np.ones(4, np.float32)


def bad(index, value, n=60):
    a = np.zeros(n, np.float32)
    a[index] = value
    return a


@pytest.mark.parametrize(
    "name, bases",
    [
        ("QuantizationError", [aq.ArrowQuantError]),
        ("ConfigurationError", [aq.ArrowQuantError]),
        ("ValidationError", [aq.ArrowQuantError]),
        ("ModelNotFoundError", [aq.ArrowQuantError, FileNotFoundError]),
        ("MetadataError", [aq.ArrowQuantError]),
        ("ShapeMismatchError", [aq.ArrowQuantError, ValueError]),
        ("FormatError", [aq.QuantizationError]),
        ("BudgetError", [aq.ConfigurationError]),
        ("Interrupted", [aq.ArrowQuantError]),
    ],
)
def test_every_exception_has_its_bases_and_attributes(name, bases):
    e = getattr(aq, name)("text")
    assert all(isinstance(e, base) for base in bases)
    assert (str(e), e.file, e.tensor, e.hint) == ("text", None, None, None)
    assert isinstance(e.code, int)
    assert type(pickle.loads(pickle.dumps(e))) is type(e)


def test_exit_codes_are_those_of_the_command_line():
    assert [aq.ConfigurationError.code, aq.FormatError.code, aq.ValidationError.code, aq.BudgetError.code, aq.Interrupted.code] == [2, 3, 4, 5, 130]
    assert aq.BudgetError("x").minimum is None


@pytest.mark.parametrize("bits", [3, 0, -4, 16, 10**30])
@pytest.mark.parametrize("entry", ["quantize", "quantize_batch", "quantize_batch_with_progress"])
@pytest.mark.parametrize("weights", [{}, {"X": "not even looked at"}, None])
def test_bit_width_is_checked_before_anything_else(entry, bits, weights):
    with pytest.raises(ValueError) as e:
        getattr(aq.ArrowQuantV2(), entry)(weights, bits)
    assert str(e.value) == f"Invalid bit_width: {bits}. Must be 2, 4, or 8"


def test_bit_width_is_checked_with_continue_on_error_too():
    with pytest.raises(ValueError, match=r"^Invalid bit_width: 5\. Must be 2, 4, or 8$"):
        aq.ArrowQuantV2().quantize_batch({}, bit_width=5, continue_on_error=True)


@pytest.mark.parametrize("value, type_name", [([1.0], "list"), ("abc", "str"), (None, "NoneType"), (3, "int"), (b"abcd", "bytes")])
def test_what_is_no_array_is_named(value, type_name):
    with pytest.raises(ValueError) as e:
        aq.ArrowQuantV2().quantize_batch({"X": value})
    assert str(e.value) == f"Expected numpy array for layer 'X', got {type_name}. Please pass numpy arrays with dtype=float32."


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int64", "bool", "uint8", "complex64", ">f4"])
def test_another_dtype_is_named(dtype):
    with pytest.raises(ValueError) as e:
        aq.ArrowQuantV2().quantize_batch({"X": np.zeros(3, dtype)})
    assert str(e.value) == f"Array for layer 'X' has dtype '{np.dtype(dtype)}', expected 'float32'. Use arr.astype(np.float32) to convert."


@pytest.mark.parametrize("array", [np.ones((4, 6), np.float32).T, np.ones((4, 6), np.float32)[:, ::2], np.ones(6, np.float32)[::-1]])
def test_what_is_not_contiguous_is_refused(array):
    with pytest.raises(ValueError) as e:
        aq.ArrowQuantV2().quantize_batch({"X": array})
    assert str(e.value) == "Array for layer 'X' is not contiguous (C-order). Use np.ascontiguousarray(arr) to fix."


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index, n", [(50, 60), (0, 1), (5000, 5001), (3_000_000, 3_000_001)])
def test_the_first_value_that_is_not_finite_is_named(index, n, value):
    a = bad(index, value, n)
    with pytest.raises(ValueError) as e:
        aq.ArrowQuantV2().quantize_batch({"X": a})
    assert str(e.value) == f"Array for layer 'X' contains NaN or Inf at index {index}. Please clean your data before quantization."


def test_the_first_problem_in_the_order_given_is_the_one_that_is_raised():
    q = aq.ArrowQuantV2()
    with pytest.raises(ValueError, match="layer 'z' contains NaN or Inf at index 50"):
        q.quantize_batch({"ok": ONE, "z": bad(50, np.nan), "a": [1.0]})
    with pytest.raises(ValueError, match="Expected numpy array for layer 'a'"):
        q.quantize_batch({"ok": ONE, "a": [1.0], "z": bad(50, np.nan)})


def test_no_callback_runs_before_all_layers_are_checked():
    calls = []
    with pytest.raises(ValueError):
        aq.ArrowQuantV2().quantize_batch_with_progress({"a": ONE, "b": bad(1, np.inf)}, 4, lambda *c: calls.append(c))
    assert calls == []


def test_names_must_be_str_and_weights_a_dict():
    with pytest.raises(TypeError, match="^Layer names must be str, got 1$"):
        aq.ArrowQuantV2().quantize_batch({1: ONE})
    for weights, name in (([ONE], "list"), (None, "NoneType"), ("abc", "str"), (ONE, "ndarray")):
        with pytest.raises(TypeError, match=f"^Expected a dict of layer names and arrays, got {name}$"):
            aq.ArrowQuantV2().quantize_batch(weights)


def test_continue_on_error_leaves_out_failing_layers_and_warns_once():
    with pytest.warns(UserWarning) as caught:
        r = aq.ArrowQuantV2().quantize_batch({"bad": bad(7, np.nan), "ok": ONE, "list": [1.0]}, continue_on_error=True)
    assert list(r) == ["ok"]
    assert [str(w.message) for w in caught] == [
        "Left out 2 of 3 layers:\n"
        "  Array for layer 'bad' contains NaN or Inf at index 7. Please clean your data before quantization.\n"
        "  Expected numpy array for layer 'list', got list. Please pass numpy arrays with dtype=float32."
    ]
    with pytest.warns(UserWarning):
        assert aq.ArrowQuantV2().quantize_batch({"bad": bad(7, np.nan)}, continue_on_error=True) == {}


def test_mode_is_checked():
    for mode in ("fast", "", None, 3):
        with pytest.raises(ValueError, match="^Invalid mode. Must be 'diffusion' or 'base'"):
            aq.ArrowQuantV2(mode)
    assert [aq.ArrowQuantV2(m).mode for m in ("diffusion", "base", "time_aware")] == ["diffusion", "base", "diffusion"]


def test_quantize_layer_auto_names_what_is_missing():
    q, good = aq.ArrowQuantV2(), {"scale": 1.0, "zero_point": 0.0, "group_size": 64, "time_range": (0, 10)}
    for key in good:
        with pytest.raises(KeyError) as e:
            q.quantize_layer_auto(ONE, [{k: v for k, v in good.items() if k != key}])
        assert e.value.args == (f"Missing '{key}'",)
    for params in (None, 3, [1.0], good, ["scale"]):
        with pytest.raises(TypeError, match="^Params must be a list of dictionaries$"):
            q.quantize_layer_auto(ONE, params)
    for change in ({"scale": 0.0}, {"scale": np.nan}, {"zero_point": np.inf}, {"group_size": 0}, {"time_range": (5, 1)}, {"time_range": 3}):
        with pytest.raises(ValueError, match=f"^Invalid {next(iter(change))} of time group 0: {re.escape(str(next(iter(change.values()))))}. Must be "):
            q.quantize_layer_auto(ONE, [good | change])
    with pytest.raises(ValueError, match="at least one"):
        q.quantize_layer_auto(ONE, [])
    with pytest.raises(aq.ShapeMismatchError, match=r"^Shape mismatch: expected a flat array of one dimension, got shape \[2, 2\]$"):
        q.quantize_layer_auto(ONE.reshape(2, 2), [good])


def test_dequantize_refuses_what_does_not_fit_together():
    r = aq.quantize_array(np.ones((2, 300), np.float32))
    for key in ("quantized_data", "scales", "zero_points", "shape", "bit_width"):
        with pytest.raises(KeyError) as e:
            aq.dequantize({k: v for k, v in r.items() if k != key})
        assert e.value.args == (f"Missing '{key}'",)
    for change, text in (
        ({"scales": [1.0]}, "Shape mismatch: scales holds 1 values, expected 6 for shape [2, 300]"),
        ({"zero_points": [1.0]}, "Shape mismatch: zero_points holds 1 values, expected 6 for shape [2, 300]"),
        ({"quantized_data": b"ab"}, "Shape mismatch: quantized_data holds 2 values, expected 300 for shape [2, 300]"),
        ({"shape": [2, 301]}, "Shape mismatch: quantized_data holds 300 values, expected 302 for shape [2, 301]"),
    ):
        with pytest.raises(aq.ShapeMismatchError) as e:
            aq.dequantize(r | change)
        assert str(e.value) == text
    with pytest.raises(aq.FormatError, match="^group 2: the scale is not a finite number above 0$"):
        aq.dequantize(r | {"scales": [1.0, 1.0, -1.0, 1.0, 1.0, 1.0]})
    with pytest.raises(ValueError, match="negative dimension"):
        aq.dequantize(r | {"shape": [-2, 300]})
    with pytest.raises(ValueError, match="too large"):
        aq.dequantize(r | {"shape": [2, 2**40, 2**40]})
    with pytest.raises(TypeError, match="^Expected a layer result, a dict of them or an Arrow result, got int$"):
        aq.dequantize(3)


def test_arguments_of_quantize_array_are_checked():
    with pytest.raises(ValueError, match="^Invalid group: 0. Must be 1 or more$"):
        aq.quantize_array(ONE, group=0)
    with pytest.raises(ValueError, match="^Invalid method: 'best'. Must be 'rtn' or 'search'$"):
        aq.quantize_array(ONE, method="best")
    with pytest.raises(ValueError, match="^threads must be 0"):
        aq.quantize_array(ONE, threads=-1)
    with pytest.raises(TypeError, match="^Array must be an array or a list of numbers, not NoneType$"):
        aq.quantize_array(None)
    with pytest.raises(ValueError, match="^Array has dtype 'int64', expected float32, float16, bfloat16 or float64$"):
        aq.quantize_array(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="ragged"):
        aq.quantize_array([[1.0, 2.0], [3.0]])
    with pytest.raises(ValueError, match="^Array contains NaN or Inf at index 1"):
        aq.quantize_array([1.0, float("nan")])


def test_metrics_refuse_lengths_that_differ():
    for f in (aq.cosine_similarity, aq.sqnr_db):
        with pytest.raises(ValueError, match=r"^Shape mismatch: a has shape \[2\], b has shape \[1\]$"):
            f([1.0, 2.0], [1.0])


def test_an_unknown_keyword_is_answered_with_a_suggestion():
    with pytest.raises(TypeError) as e:
        aq.quantize_array(ONE, bit=4)
    assert str(e.value) == "quantize_array() got an unexpected keyword argument 'bit'; did you mean 'bits'?"
    with pytest.raises(TypeError) as e:
        aq.ArrowQuantV2().quantize_batch({}, bitwidth=4)
    assert str(e.value) == "quantize_batch() got an unexpected keyword argument 'bitwidth'; did you mean 'bit_width'?"
    with pytest.raises(TypeError) as e:
        aq.ArrowQuantV2(xyz=1)
    assert str(e.value) == "ArrowQuantV2() got an unexpected keyword argument 'xyz'"


class Items:
    """A mapping whose items() says what it likes."""

    def __init__(self, *items):
        self._items = items

    def __getitem__(self, key):
        return 1

    def items(self):
        return list(self._items)


@pytest.mark.parametrize(
    "item, got", [(("a",), "a tuple of 1"), (("a", ONE, 3), "a tuple of 3"), ((), "a tuple of 0"), (["a", ONE], "list"), (5, "int"), ("ab", "str")]
)
@pytest.mark.parametrize("entry", [aq.quantize_batch, aq.numpy_to_arrow_table, aq.ArrowQuantV2().quantize, aq.ArrowQuantV2().quantize_batch])
def test_items_that_are_no_pairs_are_refused(entry, item, got):
    with pytest.raises(TypeError) as e:
        entry(Items(("good", ONE), item))
    assert str(e.value) == f"items() must give pairs of a name and a value, got {got}"


def test_items_of_results_that_are_no_pairs_are_refused():
    class Results(dict):
        def items(self):
            return [("a",)]

    with pytest.raises(TypeError, match=r"^items\(\) must give pairs of a name and a value, got a tuple of 1$"):
        aq.dequantize(Results(a=aq.quantize_array([1.0])))


@pytest.mark.parametrize("bits, name", [(4.0, "float"), ("4", "str")])
def test_a_bit_width_that_is_no_int_is_named(bits, name):
    with pytest.raises(TypeError) as e:
        aq.ArrowQuantV2().quantize_batch({"X": ONE}, bits)
    assert str(e.value) == f"bit_width must be an int (2, 4 or 8), not {name}"


@pytest.mark.parametrize(
    "values, error, text",
    [
        ([10**400], ValueError, "Array for layer 'X' holds an int that is too large for a float"),
        ([1, [3]], ValueError, "Array for layer 'X' is a ragged list: it has a list where a number stands elsewhere"),
        ([[1], 3], ValueError, "Array for layer 'X' is a ragged list: expected 1 values where another number was found"),
        (["x"], TypeError, "Array for layer 'X' is a list that holds str, expected numbers"),
        ([1.0, None], TypeError, "Array for layer 'X' is a list that holds NoneType, expected numbers"),
    ],
)
def test_a_list_that_holds_no_numbers_names_its_layer(values, error, text):
    with pytest.raises(error) as e:
        aq.ArrowQuantV2().quantize({"X": values})
    assert str(e.value) == text


class RefusesDlpack:
    def __dlpack__(self):
        raise BufferError("it requires a gradient")


class WrongDlpack:
    def __dlpack__(self):
        return 3


def test_an_array_that_refuses_dlpack_is_named():
    with pytest.raises(ValueError, match="^Array for layer 'X' cannot be read: it requires a gradient$"):
        aq.ArrowQuantV2().quantize({"X": RefusesDlpack()})
    with pytest.raises(TypeError, match="^Array for layer 'X' has a __dlpack__ that gave 3, expected a capsule named 'dltensor'$"):
        aq.ArrowQuantV2().quantize({"X": WrongDlpack()})
    with pytest.warns(UserWarning, match="layer 'X'"):
        assert aq.quantize_batch({"X": RefusesDlpack(), "Y": ONE}, continue_on_error=True).keys() == {"Y"}


def test_a_torch_tensor_without_readable_values_is_named():
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(4, requires_grad=True), torch.ones(4, device="meta")):
        with pytest.raises(ValueError, match="^Array for layer 'X' "):
            aq.ArrowQuantV2().quantize({"X": tensor})


@pytest.mark.parametrize(
    "field, value, error, text",
    [
        ("group_size", 2**64, ValueError, f"Invalid group_size: {2**64}. Must be 1 or more, below 2**63"),
        ("group_size", 0, ValueError, "Invalid group_size: 0. Must be 1 or more, below 2**63"),
        ("group_size", "x", TypeError, "group_size must be an int, not str"),
        ("shape", [2**64], ValueError, f"shape [{2**64}] is too large"),
        ("shape", ["x"], TypeError, "shape must be a list of int, not str"),
        ("shape", 4, TypeError, "shape must be a list of int, not int"),
        ("bit_width", 4.0, TypeError, "bit_width must be an int (2, 4 or 8), not float"),
    ],
)
def test_a_field_of_a_result_that_is_wrong_is_named(field, value, error, text):
    with pytest.raises(error) as e:
        aq.dequantize(aq.quantize_array([1.0, 2.0]) | {field: value})
    assert str(e.value) == text


class Interface:
    def __init__(self, **fields):
        self.__array_interface__ = {"shape": (4,), "typestr": "<f4", "data": (ONE.ctypes.data, True), "version": 3} | fields


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"shape": (-4,)}, "says in its __array_interface__ that it has a negative dimension"),
        ({"data": (0, True)}, "says in its __array_interface__ that it has no data (address 0) for its shape"),
        ({"shape": (2**62, 2**62)}, "says in its __array_interface__ that it has a shape of more values than memory can hold"),
        ({"shape": (2, 2), "strides": (4,)}, "has an __array_interface__ whose strides is (4,), expected a tuple of one int for each dimension"),
        ({"strides": "xx"}, "has an __array_interface__ whose strides is 'xx', expected a tuple of one int for each dimension"),
        ({"strides": (2**62,)}, "says in its __array_interface__ that it has strides beyond what memory can hold"),
        ({"shape": 4}, "has an __array_interface__ whose shape is 4, expected a tuple of at most 64 int"),
        ({"shape": (1.5,)}, "has an __array_interface__ whose shape is (1.5,), expected a tuple of at most 64 int"),
        ({"data": ("x", True)}, "has an __array_interface__ whose data is 'x', expected an address"),
    ],
)
@pytest.mark.parametrize("entry", [aq.ArrowQuantV2().quantize, aq.quantize_batch])
def test_an_array_interface_that_cannot_be_is_refused(entry, fields, text):
    with pytest.raises(ValueError) as e:
        entry({"X": Interface(**fields)})
    assert str(e.value) == f"Array for layer 'X' {text}"


def test_an_array_interface_that_can_be_is_taken():
    expected = aq.quantize_batch({"X": ONE})
    for fields in ({}, {"strides": None}, {"strides": (4,)}):
        assert aq.quantize_batch({"X": Interface(**fields)}) == expected
    assert aq.quantize_batch({"X": Interface(shape=(0, 3), data=(0, True))})["X"]["scales"] == []


# ---- options in texts ----


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("--overwrite replaces it", "overwrite=True replaces it"),
        ("--nonfinite=keep stores it, --nonfinite=zero does not", "nonfinite='keep' stores it, nonfinite='zero' does not"),
        ("give --target-size=123B or more, allow fewer bits (--allow-bits)", "give target_size='123B' or more, allow fewer bits (allow_bits)"),
        ("choose one with --component=NAME", "choose one with component=NAME"),
        ("leave out --fail-fast", "leave out fail_fast=True"),
        ("which --no-follow-symlinks refuses", "which follow_symlinks=False refuses"),
        ("a--overwrite.safetensors: --limit=json_depth=9, --unknown -- x", "a--overwrite.safetensors: --limit=json_depth=9, --unknown -- x"),
        ("é --mkdir", "é mkdir=True"),
    ],
)
def test_options_in_texts_are_spelt_as_keywords(text, spelled):
    assert _core.spelled(text) == spelled


def test_every_option_that_the_library_names_is_a_keyword_of_a_function():
    folder = ROOT / "src"
    if not folder.is_dir():
        pytest.skip("no sources here")
    literals = [text for file in folder.glob("*/*.c") if "page" not in file.name for text in re.findall(r'"((?:[^"\\\n]|\\.)*)"', file.read_text("utf-8"))]
    named = {flag for text in literals for flag in re.findall(r"(?:^|[ (])(--[a-z][a-z-]+)", text)} - {"--limit"}  # of the command line alone
    assert len(named) > 20
    known = set().union(*(inspect.signature(f).parameters for f in (aq.quantize, aq.plan, aq.export, aq.inspect, aq.CalibrationLoader.generate_synthetic_data)))
    for flag in named:
        word = re.match(r"\w+", _core.spelled(flag))
        assert word and word[0] in known, flag


def test_hints_name_arguments(tmp_path):
    model = write_model(tmp_path / "m")
    aq.quantize(model, tmp_path / "out")
    with pytest.raises(FileExistsError, match="add overwrite=True") as e:
        aq.quantize(model, tmp_path / "out")
    assert "--" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="mkdir=True"):
        aq.quantize(model, tmp_path / "deep" / "out")
    with pytest.raises(aq.BudgetError) as budget:
        aq.quantize(model, tmp_path / "none", target_size="1KB")
    assert "target_size" in budget.value.hint and "--" not in str(budget.value)
