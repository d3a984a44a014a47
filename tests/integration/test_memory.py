"""P7: peak memory is announced, kept under --max-memory, and does not depend on the size of the model."""

import json
import os
import resource
import struct
import subprocess

import pytest
from conftest import PROGRAM

LAYERS, ROWS, COLS = 48, 1024, 1024
MIB = 1 << 20


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """96 MiB of BF16 weights in 48 layers: far more than a run may take. Random mantissas, exponents near 2^-6: no value is special."""
    path = tmp_path_factory.mktemp("memory") / "large.safetensors"
    size = 2 * ROWS * COLS
    header = {f"blocks.{i}.ff.weight": {"dtype": "BF16", "shape": [ROWS, COLS], "data_offsets": [i * size, (i + 1) * size]} for i in range(LAYERS)}
    text = json.dumps(header).encode()
    high = bytes((0x3C, 0xBC)) * (ROWS * COLS // 2)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _ in range(LAYERS):
            data = bytearray(size)
            data[0::2], data[1::2] = os.urandom(ROWS * COLS), high
            f.write(data)
    return path


@pytest.mark.parametrize("threads", [1, 4])
def test_P7_peak_memory_stays_under_the_limit_and_the_prediction(cli, large_model, tmp_path, threads):
    done = cli("quantize", large_model, "-o", tmp_path / "out", "--bits", "8", "--method", "rtn", "--max-memory", "64MiB", "--threads", str(threads), "--json")
    assert done.code == 0, done.err
    memory = done.json["memory"]
    assert memory["peak_rss_bytes"] <= memory["predicted_peak_bytes"]
    assert memory["peak_rss_bytes"] <= 64 * MIB + 16 * MIB  # the limit is for what the work holds; the program itself and its libraries come on top


def test_P7_verify_diff_and_export_read_a_container_in_passing(cli, large_model, tmp_path):
    out = tmp_path / "out"
    assert cli("quantize", large_model, "-o", out, "--bits", "8", "--method", "rtn", "--json").code == 0
    commands = (
        ("verify", out, "--against", large_model),
        ("diff", large_model, out),
        ("export", out, "--to", "safetensors", "-o", tmp_path / "back.safetensors"),
    )
    for words in commands:
        process = subprocess.Popen([PROGRAM, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, words
        ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a child's peak counts what it shared with us before it became the program
        assert usage.ru_maxrss * 1024 <= max(64 * MIB, ours * 1024), words
