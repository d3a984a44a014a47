"""The container in the hands of others: pyarrow, duckdb and polars read what was written, and files that pyarrow wrote are read back."""

import json
import os
import re
import subprocess
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from extension import with_extension
from legacy_models import coded, write_base_model, write_row, write_v1_model
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("ARROWQUANT_PROGRAM", str(ROOT / "build/release/arrowquant"))


def run(*arguments, code=0):
    done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr + done.stdout
    return done


@pytest.fixture(scope="session")
def container(tmp_path_factory):
    """A small model, quantized at 4 bits with each of the two list-or-bytes forms of parameters."""
    folder = tmp_path_factory.mktemp("container")
    rng = np.random.default_rng(1)
    tensors = {f"blocks.{i}.weight": rng.standard_normal((64, 100 + 16 * i)).astype(np.float32) for i in range(6)}
    tensors |= {f"blocks.{i}.bias": rng.standard_normal(64).astype(np.float32) for i in range(6)}
    save_file(tensors, folder / "model.safetensors")
    run(
        "quantize",
        folder / "model.safetensors",
        "-o",
        folder / "out",
        "--bits",
        4,
        "--group",
        32,
        "--modality",
        "image",
        "--layer",
        "blocks.1.*=params:f32,bits:8",
        "--layer",
        "blocks.2.*=bits:2,params:f16",
        "--min-accuracy",
        0,
    )
    return folder / "out"


@pytest.fixture(scope="session")
def rows(container):
    return [row for f in sorted(container.glob("*.parquet")) for row in pq.read_table(f).to_pylist()]


def exported(path, tmp_path):
    run("export", path, "--to", "safetensors", "--dtype", "f32", "-o", tmp_path / "back.safetensors")
    return load_file(tmp_path / "back.safetensors")


def test_pyarrow_duckdb_and_polars_see_the_same_rows(container, rows):
    pattern = str(container / "*.parquet")
    query = f"SELECT layer_name, quality.sqnr_db FROM '{pattern}' ORDER BY 2, 1"
    from_duckdb = duckdb.sql(query).fetchall()
    frame = pl.read_parquet(pattern)
    from_polars = {r["layer_name"]: r for r in frame.to_dicts()}
    from_arrow = {r["layer_name"]: r for r in rows}
    assert len(rows) == 12 and len(from_arrow) == 12
    assert {name: db for name, db in from_duckdb} == {r["layer_name"]: r["quality"]["sqnr_db"] for r in rows}
    for name, row in from_arrow.items():
        assert from_polars[name] == row
    assert all(15 < r["quality"]["sqnr_db"] for r in rows if r["quant_type"] == "int4")
    assert duckdb.sql(f"SELECT sum(octet_length(data)) FROM '{pattern}'").fetchall()[0][0] == sum(len(r["data"]) for r in rows)


def test_the_numpy_lines_of_the_documentation_dequantize(container, rows, tmp_path):
    text = (ROOT / "docs/format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(code, "docs/format.md", "exec"), names)
    weights = exported(container, tmp_path)
    forms = set()
    for row in rows:
        if row["quant_type"].startswith("int"):
            forms.add((row["params_form"], row["bit_width"]))
            np.testing.assert_array_equal(names["dequantize"](row), weights[row["layer_name"]])
        else:
            np.testing.assert_array_equal(np.frombuffer(row["data"], np.float32), weights[row["layer_name"]].ravel())
    assert forms == {("f16", 4), ("f32", 8), ("f16", 2)}
    wanted = ["blocks.3.weight", "blocks.0.bias"]
    for f in container.glob("*.parquet"):
        assert sorted(name for name, _ in names["read_layers"](f, wanted)) == sorted(wanted)


def test_a_file_rewritten_by_pyarrow_reads_the_same(container, tmp_path):
    before = exported(container, tmp_path)
    for options in (
        {"compression": "zstd"},
        {"compression": "snappy", "use_dictionary": True, "data_page_version": "2.0"},
        {"compression": "gzip", "row_group_size": 3},
    ):
        again = tmp_path / "again"
        again.mkdir(exist_ok=True)
        for f in container.glob("*.parquet"):
            pq.write_table(pq.read_table(f), again / f.name, **options)
        (tmp_path / "back.safetensors").unlink()
        after = exported(again, tmp_path)
        assert before.keys() == after.keys()
        for name, values in before.items():
            np.testing.assert_array_equal(values, after[name])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("writer", ["pyarrow", "polars"])
def test_spatial_parts_of_other_writers_are_undone(container, tmp_path, writer, folded):
    """Equalization scales and a rotation, put in by pyarrow, or by polars, whose structs are optional at every level: readers give back the weights."""
    names = {}
    exec(re.findall(r"```python\n(.*?)```", (ROOT / "docs/format.md").read_text(), re.S)[0], names)
    folder = tmp_path / "extended"
    folder.mkdir()
    (source,) = container.glob("*.parquet")
    table = with_extension(pq.read_table(source), folded=folded)
    if writer == "polars":
        metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        pl.from_arrow(table).write_parquet(folder / source.name, metadata=metadata)
    else:
        pq.write_table(table, folder / source.name)
    weights = exported(folder, tmp_path)
    plain = {row["layer_name"]: names["dequantize"](row) for row in pq.read_table(source).to_pylist() if row["bit_width"]}
    for row in table.to_pylist():
        if row["bit_width"]:
            np.testing.assert_allclose(weights[row["layer_name"]], names["dequantize"](row), rtol=1e-5, atol=1e-5)
            assert np.abs(weights[row["layer_name"]] - plain[row["layer_name"]]).max() > 0.1
    run("verify", folder)


def test_base_v2_folders_are_read(tmp_path):
    values = write_base_model(tmp_path / "model")
    found = exported(tmp_path / "model", tmp_path)
    assert found.keys() == values.keys()
    for name, v in values.items():
        np.testing.assert_array_equal(found[name].reshape(v.shape), v)


def test_v1_folders_are_read(tmp_path):
    values = write_v1_model(tmp_path / "model")
    found = exported(tmp_path / "model", tmp_path)
    for name, v in values.items():
        np.testing.assert_array_equal(found[name], v)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": b"\x00" * 11}, "bytes of codes"),
        ({"data": b"\x10" * 12}, "too large"),
        ({"scales": [1.0, 1.0]}, "fit no grouping"),
        ({"scales": [float("nan")]}, "scale"),
        ({"scales": [0.0]}, "scale"),
        ({"quant_type": "int3"}, "quant_type"),
        ({"num_params": 13}, "num_params"),
        ({"shape": [2**40, 2**40]}, "63 bits"),
        ({"quant_axis": 7}, "quant_axis"),
        ({"time_aware_quant_json": "{broken"}, "json"),
        (
            {
                "time_aware_quant_json": json.dumps(
                    {"time_group_params": [{"time_range": r, "scale": 1, "zero_point": 0, "group_size": 64} for r in ([0, 5], [6, 9])]}
                )
            },
            "gap",
        ),
        ({"time_aware_quant_json": '{"time_group_params": [{"time_range": [0, 5], "scale": 0, "zero_point": 0, "group_size": 64}]}'}, "scale of a time group"),
        ({"time_aware_quant_json": '{"time_group_params": [{"time_range": [0, 5], "scale": 1, "zero_point": 0}]}'}, "group size of a time group"),
        ({"time_aware_quant_json": '{"num_time_groups": 2, "time_group_params": []}'}, "num_time_groups"),
        ({"spatial_quant_json": '{"equalization_scales": [1.0]}'}, "equalization"),
        ({"spatial_quant_json": '{"channel_equalization": false, "equalization_scales": [1, 1, 1, 1]}'}, "channel_equalization"),
        ({"activation_stats_json": '{"mean": [0], "std": [1], "min": [1, 2], "max": [2]}'}, "activation_stats"),
        ({"activation_stats_json": '{"mean": [0], "std": [1], "min": [3], "max": [2]}'}, "minimum"),
    ],
)
def test_PQ10_base_v2_rows_that_contradict_themselves_are_refused(tmp_path, change, words):
    _, row = coded("w", (3, 4), 4, None, None, [1.0], [0.0], np.random.default_rng(0))
    write_row(tmp_path / "w.parquet", row | change, extended=True)
    message = run("export", tmp_path, "--to", "safetensors", "-o", tmp_path / "out.safetensors", code=3).stderr
    assert words in message and "w.parquet" in message


@pytest.mark.parametrize(
    "options", [{"compression": "zstd"}, {"compression": "snappy", "use_dictionary": True}, {"compression": "gzip"}], ids=["zstd", "snappy_dictionary", "gzip"]
)
def test_PQ06_PQ07_damaged_frames_and_dictionaries_of_other_writers_are_refused(container, tmp_path, options):
    """Bytes in the compressed pages and dictionaries of a file that pyarrow wrote: an error or the same values, never a crash and never other values."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (source,) = container.glob("*.parquet")
    target = folder / source.name
    pq.write_table(pq.read_table(source), target, **options)
    run("verify", folder, "--against", container)
    good = target.read_bytes()
    size = pq.ParquetFile(target).metadata.serialized_size
    refused = 0
    for at in np.linspace(4, len(good) - size - 9, 60).astype(int):
        bad = bytearray(good)
        bad[at] ^= 0x55
        target.write_bytes(bad)
        done = subprocess.run([PROGRAM, "verify", str(folder), "--against", str(container), "--json", "-q"], capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, 3, 4), done.stderr
        refused += done.returncode != 0
    assert refused > 50
