"""Runs the program as a person or script does. ARROWQUANT_PROGRAM names it; the default is the release build."""

import array
import json
import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("ARROWQUANT_PROGRAM", str(ROOT / "build/release/arrowquant"))


def clean_environment(**changes):
    """The environment without what would change the program's behaviour, in a UTF-8 locale."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ARROW", "LC_", "LANG", "NO_COLOR", "CLICOLOR", "TERM"))}
    return {**kept, "LANG": "C.UTF-8", **changes}


class Result:
    def __init__(self, process):
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    @property
    def json(self):
        """The one JSON object on stdout; anything beside it fails the test."""
        return json.loads(self.out)


@pytest.fixture
def cli(tmp_path):
    """cli("version", "--json", env={...}) runs in a fresh folder, where nothing may be left behind but what the test names."""

    def run(*args, env=None, cwd=None, timeout=60, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        command = [PROGRAM, *(os.fspath(a) for a in args)]
        return Result(subprocess.run(command, env=clean_environment(**(env or {})), cwd=cwd or tmp_path, text=True, timeout=timeout, check=False, **options))

    return run


def write_safetensors(path, tensors, metadata=None):
    """tensors: {name: (dtype, shape, bytes)}."""
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return path


def floats(n, seed=1):
    """n normally distributed F32 values, the same on every machine."""
    draw = random.Random(seed)
    return array.array("f", (draw.gauss(0, 0.05) for _ in range(n))).tobytes()


def layers(n_blocks=4, rows=64, cols=128):
    tensors = {}
    for i in range(n_blocks):
        tensors[f"blocks.{i}.attn.to_q.weight"] = ("F32", [rows, cols], floats(rows * cols, i))
        tensors[f"blocks.{i}.attn.to_q.bias"] = ("F32", [rows], floats(rows, 100 + i))
    return tensors


@pytest.fixture
def model(tmp_path):
    """A small model file: four layers, four biases."""
    return write_safetensors(tmp_path / "model.safetensors", layers(), {"modality": "image"})
