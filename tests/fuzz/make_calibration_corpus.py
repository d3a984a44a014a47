"""Writes the seed corpora of fuzz_calibration and fuzz_dataset: small good files of each kind, and some that are wrong.

Run from the repository root, with numpy and pyarrow: python3 tests/fuzz/make_calibration_corpus.py
"""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent
LINES, ARCHIVE, ARRAY, ROWS = (bytes([kind]) for kind in range(4))


def array(values) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def archive(save, **arrays) -> bytes:
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def table(columns, **options) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


IMAGES = np.arange(24, dtype=np.uint8).reshape(3, 2, 4)
SETS = {
    "lines_text": LINES + b'{"text": "a"}\r\n\n{"prompt": "b", "timestep": 3}\n{"text": "last"}',
    "lines_data": LINES + b'{"data": [1, 2.5, -3e2, 4], "timestep": 999, "shape": [2, 2], "synthetic": true}\n{"input": [[1, 2], [3, 4]]}\n',
    "lines_bad": LINES
    + b'{"text": 3}\n{"data": []}\n{"input": [[1], [2, 3]]}\n[1\n\xff\xfe\n{"data": [1], "shape": [9]}\n'
    + b"x" * 5000
    + b'\n{"text": "after"}',
    "archive_stored": ARCHIVE + archive(np.savez, images=IMAGES, labels=np.arange(3), timesteps=np.array([1, 2, 999])),
    "archive_deflated": ARCHIVE + archive(np.savez_compressed, x=IMAGES.astype("f4"), t=np.array([0, 5, 7], "i4")),
    "array_f2": ARRAY + array(IMAGES.astype("f2")),
    "array_f8": ARRAY + array(IMAGES.astype("f8")),
    "array_fortran": ARRAY + array(np.asfortranarray(IMAGES)),
    "array_object": ARRAY + array(np.array([1, None], dtype=object)),
    "array_scalar": ARRAY + array(np.float32(3)),
    "rows_data": ROWS + table({"data": [[1.0, 2.0], [3.0]], "timestep": [5, None], "shape": [[2, 1], None]}),
    "rows_text": ROWS + table({"text": ["a", None, "b"]}, compression="zstd"),
    "rows_tokens": ROWS + table({"input": pa.array([[1, 2], [], None], pa.list_(pa.int32()))}, compression="none"),
}


def main():
    folder = ROOT / "corpus/dataset"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in SETS.items():
        (folder / name).write_bytes(content)
    folder = ROOT / "corpus/calibration"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in sorted((ROOT.parent / "fixtures/calibration").glob("*.aqcal")):
        shutil.copy(path, folder / path.stem)
    whole = (ROOT.parent / "fixtures/calibration/small.aqcal").read_bytes()
    (folder / "cut").write_bytes(whole[: len(whole) // 2])
    (folder / "foreign").write_bytes(table({"layer": ["a"], "count": [1]}))


if __name__ == "__main__":
    main()
