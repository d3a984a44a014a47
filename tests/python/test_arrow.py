"""Arrow tables in and out: containers, layouts, errors, memory."""

import gc
import os
import subprocess
import sys
import threading

import arrow_quant_v2 as aq
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from helpers import dequantize
from hypothesis import given, settings
from test_arrays import resident_kib

RNG = np.random.default_rng(2)
COLUMNS = ["layer_name", "quantized_data", "scales", "zero_points", "shape", "bit_width"]
RESULT_SCHEMA = pa.schema(
    [
        ("layer_name", pa.string()),
        ("quantized_data", pa.binary()),
        ("scales", pa.list_(pa.float32())),
        ("zero_points", pa.list_(pa.float32())),
        ("shape", pa.list_(pa.int64())),
        ("bit_width", pa.uint8()),
    ]
)
ENTRIES = ["quantize_arrow", "quantize_arrow_batch", "quantize_batch_arrow"]
Q = aq.ArrowQuantV2()


def layers(n=5):
    shapes = [(3, 5), (200,), (2, 3, 130), (0, 4), (1, 1)]
    return {f"layer{i}": RNG.standard_normal(shapes[i % 5], dtype=np.float32) for i in reversed(range(n))}


def table(weights, weights_type=None, name_type=None, shape_type=None):
    return pa.table(
        {
            "layer_name": pa.array(list(weights), name_type or pa.string()),
            "weights": pa.array([a.ravel().tolist() for a in weights.values()], weights_type or pa.list_(pa.float32())),
            "shape": pa.array([list(a.shape) for a in weights.values()], shape_type or pa.list_(pa.int64())),
        }
    )


def one_row(name="X", weights=(1.0,), shape=(1,), **types):
    return pa.table(
        {
            "layer_name": pa.array([name], types.get("name_type", pa.string())),
            "weights": pa.array([weights], types.get("weights_type", pa.list_(pa.float32()))),
            "shape": pa.array([shape], types.get("shape_type", pa.list_(pa.int64()))),
        }
    )


def as_results(t):
    """Rows of an Arrow result as layer results by name."""
    rows = pa.table(t).to_pylist()
    return {r["layer_name"]: {k: r[k] for k in COLUMNS[1:]} | {"group_size": 128} for r in rows}


# ---- results ----


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_quantize_batch(entry, bits):
    weights = layers(11)
    t = getattr(Q, entry)(table(weights), bits)
    t.validate(full=True)
    assert t.schema.equals(RESULT_SCHEMA)
    assert t.schema.metadata[b"arrowquant.group_size"] == b"128" and b"arrowquant.packing" in t.schema.metadata
    assert t["layer_name"].to_pylist() == (sorted(weights) if entry == "quantize_batch_arrow" else list(weights))
    assert as_results(t) == {k: v for k, v in Q.quantize_batch(weights, bits).items()}


def test_the_result_is_the_same_kind_of_container():
    polars, duckdb, nanoarrow = (pytest.importorskip(m) for m in ("polars", "duckdb", "nanoarrow"))
    t = table(layers())
    batch = t.to_batches()[0]
    for entry in ENTRIES:
        f = getattr(Q, entry)
        expected = f(t)
        assert type(expected) is pa.Table
        assert type(f(batch)) is pa.RecordBatch and pa.table(f(batch)).equals(expected)
        relation = duckdb.connect().from_arrow(t)
        streams = [polars.from_arrow(t), polars.from_arrow(t).rechunk(), relation, nanoarrow.ArrayStream(t), nanoarrow.c_array(batch)]
        streams += [pa.RecordBatchReader.from_batches(t.schema, t.to_batches())]
        for other in streams:
            got = f(other)
            assert type(got) is pa.Table, type(other)
            assert got.equals(expected), type(other)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_empty_input_gives_an_empty_result_with_the_schema(entry):
    empty = [
        table({}),
        pa.table({"layer_name": [], "weights": [], "shape": []}),
        pa.table({"layer_name": pa.array([], pa.string()), "weights": pa.array([], pa.list_(pa.null()))}),
        table({}).schema.empty_table(),
        pa.Table.from_batches([], table({}).schema),
    ]
    for t in empty:
        r = getattr(Q, entry)(t)
        assert r.num_rows == 0 and r.schema.equals(RESULT_SCHEMA)
    assert type(getattr(Q, entry)(pa.RecordBatch.from_pylist([], table({}).schema))) is pa.RecordBatch


LAYOUTS = {
    "large_list": {"weights_type": pa.large_list(pa.float32())},
    "float64": {"weights_type": pa.list_(pa.float64())},
    "large_list of float64": {"weights_type": pa.large_list(pa.float64())},
    "large_string": {"name_type": pa.large_string()},
    "string_view": {"name_type": pa.string_view()},
    "large shape": {"shape_type": pa.large_list(pa.int64())},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_physical_layouts_change_nothing(layout):
    weights = layers(5) | {"a name of more than twelve bytes": np.ones(3, np.float32)}
    assert Q.quantize_arrow(table(weights, **LAYOUTS[layout])).equals(Q.quantize_arrow(table(weights)))


def test_fixed_size_lists():
    weights = {f"l{i}": RNG.standard_normal((2, 100), dtype=np.float32) for i in range(4)}
    expected = Q.quantize_arrow(table(weights))
    fixed = table(weights, weights_type=pa.list_(pa.float32(), 200), shape_type=pa.list_(pa.int64(), 2))
    assert Q.quantize_arrow(fixed).equals(expected)
    assert Q.quantize_arrow(fixed.slice(1, 2)).equals(expected.slice(1, 2))


def test_columns_may_come_in_any_order_and_others_are_ignored():
    weights = layers()
    t = table(weights)
    mixed = pa.table(
        {
            "extra": pa.nulls(len(weights)),
            "shape": t["shape"],
            "nested": pa.array([{"a": [1]}] * len(weights)),
            "weights": t["weights"],
            "layer_name": t["layer_name"],
        }
    )
    assert Q.quantize_arrow(mixed).equals(Q.quantize_arrow(t))


def test_without_a_shape_column_layers_are_flat():
    t = table({"a": np.arange(300, dtype=np.float32).reshape(3, 100)}).drop_columns(["shape"])
    assert as_results(Q.quantize_arrow(t))["a"] == Q.quantize_batch({"a": np.arange(300, dtype=np.float32)})["a"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 20), max_size=6), st.integers(0, 8), st.integers(0, 20), st.sampled_from(["plain", "large", "double", "fixed"]))
def test_every_chunking_and_slice_of_a_table_gives_the_same_bytes(cuts, offset, length, kind):
    weights = {f"l{i % 13}": np.full((2, 70 + (0 if kind == "fixed" else i)), i / 7, np.float32) for i in range(13)}
    kinds = {"plain": pa.list_(pa.float32()), "large": pa.large_list(pa.float32()), "double": pa.list_(pa.float64()), "fixed": pa.list_(pa.float32(), 140)}
    whole = table(weights, weights_type=kinds[kind])
    edges = [0, *sorted(c for c in cuts if c < 13), 13]
    parts = [whole.slice(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    chunked = pa.concat_tables(parts).slice(offset, length)
    expected = Q.quantize_arrow(whole.combine_chunks()).slice(offset, length).combine_chunks()
    assert Q.quantize_arrow(chunked).combine_chunks().equals(expected)
    assert Q.quantize_batch_arrow(chunked).sort_by("layer_name").equals(expected.sort_by("layer_name"))


def test_offsets_of_the_struct_itself_apply_to_its_columns():
    t = table(layers())
    whole = t.to_struct_array()
    struct = whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
    assert Q.quantize_arrow(struct.slice(2, 3)).equals(Q.quantize_arrow(t).slice(2, 3))


def test_rows_of_the_same_name_stay_in_order():
    t = pa.table({"layer_name": ["b", "a", "b"], "weights": [[1.0], [2.0], [3.0]]})
    assert Q.quantize_batch_arrow(t)["layer_name"].to_pylist() == ["a", "b", "b"]
    assert list(aq.PyArrowQuantizedLayer(Q.quantize_batch_arrow(t)).dequantize_group(0)) == [2.0, 1.0, 3.0]


def test_numpy_to_arrow_table_has_the_input_schema_and_copies_nothing():
    weights = layers()
    t = aq.numpy_to_arrow_table(weights)
    assert t.schema.equals(table(weights).schema) and t.to_pylist() == table(weights).to_pylist()
    assert t["weights"].chunk(0).values.buffers()[1].address == next(iter(weights.values())).ctypes.data
    assert Q.quantize_arrow(t).equals(Q.quantize_arrow(table(weights)))
    assert aq.numpy_to_arrow_table({}).schema.equals(table({}).schema)
    with pytest.raises(ValueError, match="^Array for layer 'X' has dtype 'float64', expected 'float32'"):
        aq.numpy_to_arrow_table({"X": np.zeros(3)})


# ---- errors ----


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "bad, name", [(None, "NoneType"), ("text", "str"), ([1], "list"), ({}, "dict"), (np.zeros(3), "ndarray"), (pa.Table, "type"), (3, "int")]
)
def test_what_is_no_table_is_named(entry, bad, name):
    with pytest.raises(TypeError) as e:
        getattr(Q, entry)(bad)
    assert str(e.value) == f"Expected a pyarrow.Table, a pyarrow.RecordBatch or an object with __arrow_c_stream__ or __arrow_c_array__, got {name}"


def test_arrow_data_that_is_no_table_is_named():
    with pytest.raises(TypeError, match="^Expected a table .an Arrow struct of columns., got Arrow data of type list<int64>$"):
        Q.quantize_arrow(pa.array([[1]]))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("bits", [3, 0, -1])
def test_bit_width_comes_first(entry, bits):
    with pytest.raises(ValueError) as e:
        getattr(Q, entry)(None, bits)
    assert str(e.value) == f"Invalid bit_width: {bits}. Must be 2, 4, or 8"


@pytest.mark.parametrize("name", ["layer_name", "weights", "shape"])
def test_two_columns_of_one_name_are_refused(name):
    t = table(layers())
    twice = pa.Table.from_arrays([*t.columns, t[name]], names=[*t.column_names, name])
    with pytest.raises(ValueError, match=f"^Duplicate column '{name}' in Arrow schema: there are 2 of that name$"):
        aq.ArrowQuantV2().quantize_arrow(twice)


@pytest.mark.parametrize("missing", ["layer_name", "weights"])
def test_a_missing_column_is_named(missing):
    with pytest.raises(ValueError) as e:
        Q.quantize_arrow(one_row().drop_columns([missing]))
    expected = "{layer_name: string, weights: list<float32>, shape: list<int64>}"
    assert str(e.value) == f"Missing required column '{missing}' in Arrow schema. Expected schema: {expected}"


@pytest.mark.parametrize(
    "types, text",
    [
        ({"weights": pa.array([[1]])}, "Invalid type for 'weights' field: list<int64>. Expected list<float32>."),
        ({"weights": pa.array([1.0])}, "Invalid type for 'weights' field: float64. Expected list<float32>."),
        ({"weights": pa.array([[[1.0]]])}, "Invalid type for 'weights' field: list<list<float64>>. Expected list<float32>."),
        ({"weights": pa.array([None])}, "Invalid type for 'weights' field: null. Expected list<float32>."),
        ({"weights": pa.array([[1.0]], pa.list_(pa.float16()))}, "Invalid type for 'weights' field: list<float16>. Expected list<float32>."),
        ({"layer_name": pa.array([1])}, "Invalid type for 'layer_name' field: int64. Expected string type."),
        ({"layer_name": pa.array(["a"]).dictionary_encode()}, "Invalid type for 'layer_name' field: dictionary. Expected string type."),
        ({"shape": pa.array([[1.0]])}, "Invalid type for 'shape' field: list<float64>. Expected list<int64>."),
        ({"shape": pa.array([[1]], pa.large_list(pa.int32()))}, "Invalid type for 'shape' field: large_list<int32>. Expected list<int64>."),
    ],
)
@pytest.mark.parametrize("go_on", [None, True])
def test_a_wrong_type_is_named(types, text, go_on):
    columns = {"layer_name": pa.array(["a"]), "weights": pa.array([[1.0]]), "shape": pa.array([[1]])} | types
    with pytest.raises(ValueError) as e:
        Q.quantize_batch_arrow(pa.table(columns), 4, go_on)
    assert str(e.value) == text


BAD_ROWS = pa.table(
    {
        "layer_name": ["a", None, "c", "d", "e", "f", "g", "good", "h", "i"],
        "weights": [[1.0, 2.0], [1.0], None, [1.0, None], [0.0, float("nan")], [-float("inf")], [1e300], [1.0], [1.0], [1.0] * 100],
        "shape": [[3], [1], [1], [2], [2], [1], [1], [1], None, [10, 20]],
    }
)
BAD_LINES = [
    "Shape mismatch in layer 'a': shape [3] has 3 values, but weights has 2 values",
    "Null in column 'layer_name' at row 1",
    "Layer 'c' has a null in column 'weights' at row 2",
    "Layer 'd' has a null in column 'weights' at row 3",
    "Layer 'e' contains NaN or Inf at index 1. The value is NaN. Use np.nan_to_num() to replace such values.",
    "Layer 'f' contains NaN or Inf at index 0. The value is -Inf. Use np.nan_to_num() to replace such values.",
    "Layer 'g' contains 1e+300 at index 0, which float32 cannot hold",
    "Layer 'h' has a null in column 'shape' at row 8",
    "Shape mismatch in layer 'i': shape [10, 20] has 200 values, but weights has 100 values",
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_all_bad_rows_are_told_at_once(entry):
    for t in (BAD_ROWS, pa.concat_tables([BAD_ROWS.slice(0, 4), BAD_ROWS.slice(4)])):
        with pytest.raises(ValueError) as e:
            getattr(Q, entry)(t)
        assert str(e.value).split("\n") == BAD_LINES


def test_continue_on_error_leaves_out_every_kind_of_bad_row():
    with pytest.warns(UserWarning) as caught:
        r = Q.quantize_batch_arrow(BAD_ROWS, 4, continue_on_error=True)
    assert r["layer_name"].to_pylist() == ["good"]
    assert [str(w.message) for w in caught] == ["Left out 9 of 10 layers:\n  " + "\n  ".join(BAD_LINES)]
    with pytest.warns(UserWarning):
        r = Q.quantize_batch_arrow(BAD_ROWS.slice(0, 3), 4, True)
    assert r.num_rows == 0 and r.schema.equals(RESULT_SCHEMA)


def test_shapes_that_do_not_fit():
    for shape, text in (
        ([-1, 5], "Shape mismatch in layer 'X': shape [-1, 5] has a negative dimension, weights has 1 values"),
        ([0, -5], "Shape mismatch in layer 'X': shape [0, -5] has a negative dimension, weights has 1 values"),
        ([5, 0], "Shape mismatch in layer 'X': shape [5, 0] has 0 values, but weights has 1 values"),
        ([2**62, 2**62], f"Shape mismatch in layer 'X': shape [{2**62}, {2**62}] has more than 2**63 values, but weights has 1 values"),
    ):
        with pytest.raises(aq.ShapeMismatchError) as e:
            Q.quantize_arrow(one_row(shape=shape))
        assert str(e.value) == text


def test_a_null_struct_is_a_null_row():
    struct = pa.StructArray.from_arrays([pa.array(["a", "b"]), pa.array([[1.0], [2.0]])], ["layer_name", "weights"], mask=pa.array([False, True]))
    with pytest.raises(ValueError, match="at row 1$"):
        Q.quantize_arrow(struct)


def test_a_stream_that_fails_is_told():
    def batches():
        yield table(layers()).to_batches()[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Q.quantize_arrow(pa.RecordBatchReader.from_batches(table({}).schema, batches()))


def test_without_pyarrow_the_call_says_so_before_the_work():
    pytest.importorskip("polars")
    code = """
import sys
sys.modules["pyarrow"] = None
import arrow_quant_v2 as aq, polars as pl
try:
    aq.ArrowQuantV2().quantize_arrow(pl.DataFrame({"layer_name": ["a"], "weights": [[1.0, float("nan")]]}))
except ModuleNotFoundError as e:
    print(e.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "pyarrow\n", done.stderr


# ---- PyArrowQuantizedLayer ----


def test_a_layer_exports_without_a_copy_and_outlives_its_source():
    t = Q.quantize_arrow(table(layers(8)))
    layer = aq.PyArrowQuantizedLayer(t)
    batch = layer.to_pyarrow()
    addresses = [b.address for b in t["quantized_data"].chunk(0).buffers()[1:]]
    assert [b.address for b in batch["quantized_data"].buffers()[1:]] == addresses
    assert pa.table(layer).equals(t) and pa.record_batch(layer).equals(batch)
    column, expected = batch["scales"], batch["scales"].to_pylist()
    del t, layer, batch
    gc.collect()
    assert column.to_pylist() == expected


def test_a_layer_gives_back_values_names_and_lengths():
    weights = layers(7)
    layer = aq.PyArrowQuantizedLayer(Q.quantize_arrow(table(weights)))
    assert layer.layers == list(weights) and len(layer) == sum(a.size for a in weights.values())
    expected = {k: dequantize(r) for k, r in Q.quantize_batch(weights).items()}
    for name in weights:
        assert np.array_equal(layer.dequantize(name, as_numpy=True), expected[name])
        assert layer.dequantize(name) == expected[name].ravel().tolist()
    assert {k: v.tolist() for k, v in aq.dequantize(layer).items()} == {k: expected[k].tolist() for k in weights}
    with pytest.raises(KeyError, match="No layer 'nothing'"):
        layer.dequantize("nothing")


def test_time_groups_cover_all_values_once():
    weights = layers(7)
    params = [{"scale": 1.0, "zero_point": 0.0, "group_size": 64, "time_range": (g, g + 1)} for g in range(4)]
    t = Q.quantize_arrow(table(weights))
    layer = aq.PyArrowQuantizedLayer(t, time_group_params=params)
    everything = aq.PyArrowQuantizedLayer(t).dequantize_group(0)
    groups = layer.dequantize_all_groups()
    assert [v for g in groups for v in g] == everything and len(everything) == len(layer)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert all(np.array_equal(a, g) for a, g in zip(layer.dequantize_all_groups(as_numpy=True), groups, strict=True))
    assert layer.get_time_group_params() == params
    layer.get_time_group_params()[0]["scale"] = 7
    assert layer.get_time_group_params() == params
    for bad in (4, -1, 2**70):
        with pytest.raises(ValueError, match=f"^Invalid group_id: {bad}. Must be between 0 and 3$"):
            layer.dequantize_group(bad)


def test_a_layer_refuses_what_is_no_result():
    good = Q.quantize_arrow(table(layers()))
    for column in COLUMNS:
        with pytest.raises(ValueError, match=f"^Missing column '{column}': not a quantized result$"):
            aq.PyArrowQuantizedLayer(good.drop_columns([column]))
    with pytest.raises(ValueError, match="^Column 'bit_width' has type string: not a quantized result$"):
        aq.PyArrowQuantizedLayer(good.set_column(5, "bit_width", pa.array(["4"] * 5)))
    with pytest.raises(aq.FormatError, match="^Layer 'layer4': its codes, scales or zero points do not have the sizes of its shape$"):
        aq.PyArrowQuantizedLayer(good.set_column(4, "shape", pa.array([[9]] * 5)))
    with pytest.raises(aq.FormatError, match="^Layer 'layer4': its bit width is not 2, 4 or 8$"):
        aq.PyArrowQuantizedLayer(good.set_column(5, "bit_width", pa.array([7] * 5, pa.uint8())))
    with pytest.raises(aq.FormatError, match="^Null in column 'scales' at row 0$"):
        aq.PyArrowQuantizedLayer(good.set_column(2, "scales", pa.array([None] * 5, pa.list_(pa.float32()))))
    bad = good.set_column(2, "scales", pa.array([[-1.0] * len(s) for s in good["scales"].to_pylist()], pa.list_(pa.float32())))
    with pytest.raises(aq.FormatError, match="the scale is not a finite number above 0"):
        aq.dequantize(bad)


def test_results_of_other_libraries_dequantize():
    polars = pytest.importorskip("polars")
    weights = layers()
    frame = polars.from_arrow(Q.quantize_arrow(table(weights)))
    assert {k: v.tolist() for k, v in aq.dequantize(frame).items()} == {k: v.tolist() for k, v in aq.dequantize(Q.quantize_arrow(table(weights))).items()}
    assert polars.DataFrame(aq.PyArrowQuantizedLayer(frame)).equals(frame)


# ---- memory and threads ----


def test_arrow_input_is_not_copied():
    code = """
import resource, numpy as np, pyarrow as pa, arrow_quant_v2 as aq
weights = {f"l{i}": np.ones((1000, 1000), np.float32) for i in range(60)}
t = aq.numpy_to_arrow_table(weights)
q = aq.ArrowQuantV2()
q.quantize_arrow(t.slice(0, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
r = q.quantize_arrow(t)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 60 * (1000 * 500 + 2 * 4 * 8000) / 2**20 + 16  # the input is 229 MiB


def test_twenty_thousand_calls_leak_nothing():
    t = table({"a": np.ones((2, 3), np.float32), "b": np.ones(200, np.float32)})
    bad = one_row(weights=[float("nan")])

    def calls(n):
        for _ in range(n):
            aq.PyArrowQuantizedLayer(Q.quantize_arrow(t)).dequantize_group(0)
            with pytest.raises(ValueError):
                Q.quantize_arrow(bad)

    calls(1000)
    gc.collect()
    before, pool = resident_kib(), pa.total_allocated_bytes()
    calls(20_000)
    gc.collect()
    assert resident_kib() - before < 4096
    assert pa.total_allocated_bytes() == pool


def test_capsules_that_nobody_takes_are_released():
    layer = aq.PyArrowQuantizedLayer(Q.quantize_arrow(table({"a": np.ones((1000, 1000), np.float32)})))
    for _ in range(3):
        capsules = [layer.__arrow_c_stream__(), layer.__arrow_c_array__(), layer.__arrow_c_stream__(None), layer.__arrow_c_array__(requested_schema=None)]
    del layer
    gc.collect()
    before = resident_kib()
    del capsules
    gc.collect()
    assert resident_kib() <= before


def test_eight_threads_at_once_agree_with_one():
    t = table(layers(20))
    expected, results = Q.quantize_batch_arrow(t), [None] * 8

    def work(i):
        for _ in range(5):
            results[i] = Q.quantize_batch_arrow(t)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(r.equals(expected) for r in results)


class Exporter:
    """Gives what it is told as its Arrow data."""

    def __init__(self, stream=None, array=None):
        if stream is not None:
            self.__arrow_c_stream__ = lambda *_: stream
        if array is not None:
            self.__arrow_c_array__ = lambda *_: array


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_arrow_capsule_is_named(entry):
    for exporter, text in (
        (Exporter(stream=3), "__arrow_c_stream__ must give a capsule named 'arrow_array_stream', got int"),
        (Exporter(array=3), "__arrow_c_array__ must give two capsules, got int"),
        (Exporter(array=(3, 4)), "__arrow_c_array__ must give a capsule named 'arrow_schema', got int"),
        (Exporter(stream=one_row().schema.__arrow_c_schema__()), "__arrow_c_stream__ must give a capsule named 'arrow_array_stream', got one of another name"),
    ):
        with pytest.raises(TypeError) as e:
            getattr(Q, entry)(exporter)
        assert str(e.value) == text


def test_an_arrow_capsule_that_was_taken_already_is_refused():
    stream, array = Exporter(stream=one_row().__arrow_c_stream__()), Exporter(array=one_row().to_batches()[0].__arrow_c_array__())
    assert pa.RecordBatchReader.from_stream(stream).read_all().num_rows == pa.record_batch(array).num_rows == 1
    for exporter in (stream, array):
        with pytest.raises(ValueError, match="whose data was taken already$"):
            Q.quantize_arrow(exporter)


@pytest.mark.skipif(not os.environ.get("AQ_LARGE"), reason="takes 5 GB of memory: AQ_LARGE=1 runs it")
def test_above_two_gib_of_codes_a_table_has_several_chunks_and_a_batch_is_refused():
    n, zeros = 3 << 28, np.zeros(3 << 28, np.float32)  # 0.8 GB of codes each, of memory that is never touched
    weights = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), pa.array(zeros))
    one = pa.table({"layer_name": ["a"], "weights": weights})
    t = pa.concat_tables([one] * 3)
    result = Q.quantize_arrow(t, 8)
    assert result["quantized_data"].num_chunks == 2 and [c.nbytes > 0 for c in result["quantized_data"].chunks] == [True, True]
    assert [len(v.as_buffer()) for v in result["quantized_data"]] == [n] * 3 and set(result["bit_width"].to_pylist()) == {8}
