"""The documents: every command and code block of them runs, from top to bottom, in a fresh folder; messages of the troubleshooting guide are really said."""

import os
import pathlib
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from files import ROOT, write_safetensors, write_short_dit

DOCS = ROOT / "docs"


def blocks_of(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    return [(m[1], m[2], text[: m.start()].count("\n") + 1) for m in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the examples (one block of the sample model, which is faster), and the program on the path."""
    (tmp_path / "examples").mkdir()
    write_short_dit(tmp_path / "examples" / "dit-fashion")
    shutil.copy(ROOT / "examples" / "fashion-calib.npz", tmp_path / "examples")
    program = os.environ.get("ARROWQUANT_PROGRAM") or shutil.which("arrowquant") or str(ROOT / "build" / "release" / "arrowquant")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "arrowquant").symlink_to(pathlib.Path(program).resolve())
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(block):
    return subprocess.run(["bash", "-e", "-c", block], capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["quickstart.md", "torch.md"])
def test_every_block_runs(name, folder):
    for package in ("torch", "diffusers", "transformers", "accelerate"):
        pytest.importorskip(package)
    names, n = {}, 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no timestep fell into")
        for language, block, line in blocks_of(name):
            if language == "python":
                exec(compile("\n" * line + block, name, "exec"), names)  # noqa: S102
            elif language == "sh":
                done = shell(block.replace("5MB", "1.3MB"))
                assert done.returncode == 0, f"{name}:{line}: {block}\n{done.stderr}"
            n += language in ("python", "sh")
    assert n >= 3


def test_messages_of_the_troubleshooting_guide(folder):
    rng = np.random.default_rng(0)
    write_safetensors(folder / "model.safetensors", {f"blocks.{i}.attn.weight": rng.standard_normal((64, 128)).astype(np.float32) for i in range(4)})
    found = blocks_of("troubleshooting.md")
    pairs = [(a, b) for a, b in zip(found, found[1:], strict=False) if a[0] == "sh" and b[0] == "text"]
    assert len(pairs) >= 7
    for (_, command, line), (_, message, _) in pairs:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode not in (0, 1), f"troubleshooting.md:{line}: {command}: exit code {done.returncode}"
        assert message.strip() in done.stdout + done.stderr, f"troubleshooting.md:{line}: {done.stdout}{done.stderr}"
