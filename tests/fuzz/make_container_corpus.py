"""Writes the seed corpus of fuzz_container: small files of every kind that the reader knows.

Run from the repository root with the program built: python3 tests/fuzz/make_container_corpus.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests/fuzz/corpus/container"
sys.path.insert(0, str(ROOT / "tests/python"))
from extension import with_extension  # noqa: E402
from legacy_models import write_base_model, write_v1_model  # noqa: E402


def quantized(folder, name, *options):
    """One file of the program's own: a layer, a small tensor, a scalar."""
    rng = np.random.default_rng(3)
    tensors = {
        "blocks.0.weight": rng.standard_normal((16, 256)).astype(np.float32),
        "blocks.0.bias": rng.standard_normal(3).astype(np.float32),
        "s": np.ones((), np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    out = folder / name
    subprocess.run(
        [ROOT / "build/release/arrowquant", "quantize", folder / "model.safetensors", "-o", out, "--modality", "image", "--min-accuracy", "0", *options],
        check=True,
        capture_output=True,
    )
    data = next(out.glob("*.parquet")).read_bytes()
    (CORPUS / f"{name}.parquet").write_bytes(data)
    return next(out.glob("*.parquet"))


def main():
    CORPUS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = quantized(folder, "int4-f16", "--bits", "4", "--group", "32", "--params", "f16")
        quantized(folder, "int8-f32", "--bits", "8", "--group", "row", "--params", "f32")
        quantized(folder, "int2-two-level", "--bits", "2", "--params", "two-level", "--group", "256")
        table = pq.read_table(own)
        pq.write_table(table, CORPUS / "rewritten-zstd-dictionary.parquet", compression="zstd")
        pq.write_table(table, CORPUS / "rewritten-v2-pages.parquet", compression="snappy", data_page_version="2.0", row_group_size=1)
        pq.write_table(with_extension(table), CORPUS / "spatial-and-time-groups.parquet", compression="none", use_dictionary=False, write_statistics=False)
        pq.write_table(table.slice(0, 0), CORPUS / "no-rows.parquet")
        for write in (write_base_model, write_v1_model):
            write(folder / "old")
        for f in (folder / "old").glob("*.parquet"):
            (CORPUS / f"old-{f.name}").write_bytes(f.read_bytes())
        good = (CORPUS / "int4-f16.parquet").read_bytes()
        (CORPUS / "cut.parquet").write_bytes(good[: len(good) // 2])
        (CORPUS / "frame.parquet").write_bytes(b"PAR1\0\0\0\0PAR1")


if __name__ == "__main__":
    main()
