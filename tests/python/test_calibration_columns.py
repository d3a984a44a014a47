"""Any Parquet reader understands a file of calibration statistics (docs/format.md): the figures follow from its columns as documented."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

FILE = Path(__file__).parents[1] / "fixtures/calibration/small.aqcal"


def rows():
    return pq.read_table(FILE).to_pylist()


def test_pyarrow_reads_every_column():
    table = pq.read_table(FILE)
    assert table.num_columns == 28
    keys = pq.ParquetFile(FILE).metadata.metadata
    assert keys[b"arrowquant.calibration.schema_version"] == b"1.0"
    assert keys[b"arrowquant.calibration.synthetic"] == b"0"
    assert len(keys[b"arrowquant.calibration.hash"]) == 64


def test_figures_agree_with_each_other():
    for row in rows():
        assert row["start"] == 25 * row["time_group"]
        assert row["end"] == row["start"] + 25
        if row["count"] == 0:
            assert row["sum"] is None
            continue
        n = row["n_inputs"]
        assert all(len(row[name]) == n for name in ("sum", "sum_sq", "absmax", "min", "max"))
        mean = np.array(row["sum"]) / row["count"]
        assert np.all(np.array(row["min"]) <= mean)
        assert np.all(mean <= np.array(row["max"]))
        assert np.allclose(row["absmax"], np.maximum(np.abs(row["min"]), np.abs(row["max"])))
        assert sum(row["timestep_count"]) == row["count"] * n
        assert np.isclose(sum(row["timestep_sum"]), sum(row["sum"]))
        assert all(t == -1 or row["start"] <= t < row["end"] for t in row["timesteps"])


def test_the_second_moment_is_a_packed_upper_triangle_of_means():
    seen = 0
    for row in rows():
        if row["hessian"] is None:
            continue
        n, packed = row["n_inputs"], np.frombuffer(row["hessian"], "<f4")
        assert (row["hessian_row_begin"], row["hessian_row_end"]) == (0, n)
        h = np.zeros((n, n))
        h[np.triu_indices(n)] = packed
        assert np.allclose(np.diag(h), np.array(row["sum_sq"]) / row["count"], rtol=1e-5)
        h = h + np.triu(h, 1).T
        assert np.linalg.eigvalsh(h).min() > -1e-4 * np.diag(h).max()
        seen += 1
    assert seen == 6
