"""Commands outside the guides: the examples of docs/cli.md and docs/quality.md run; commands, options and scripts that prose and tables spell exist."""

import json
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from files import ROOT, write_model, write_safetensors
from program import PROGRAM

RECORDED = ROOT / "tests" / "fixtures" / "calibration" / "blocks.aqcal"  # inputs of the three layers below
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "bench" / "README.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def weights(*others):
    rng = np.random.default_rng(0)
    names = [f"blocks.{i}.attn.to_q.weight" for i in range(3)] + list(others)
    return {name: rng.standard_normal((256, 128)).astype(np.float32) for name in names}


def shell(line, cwd):
    """What a person's shell does with a line: the program is on its path, its home is the folder."""
    (cwd / ".bin").mkdir(exist_ok=True)
    if not (cwd / ".bin" / "arrowquant").exists():
        (cwd / ".bin" / "arrowquant").symlink_to(pathlib.Path(PROGRAM).resolve())
    environment = {**os.environ, "PATH": f"{cwd / '.bin'}:{os.environ['PATH']}", "HOME": str(cwd)}
    return subprocess.run(["bash", "-e", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def commands_of(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    return [line for language, block in FENCED.findall(text) if language == "sh" for line in block.splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The files that the examples of docs/cli.md name."""
    folder = tmp_path_factory.mktemp("models")
    write_safetensors(folder / "model.safetensors", weights("head.weight"), {"modality": "image"})
    unet = folder / "pipeline-folder" / "unet"
    unet.mkdir(parents=True)
    shutil.copy(folder / "model.safetensors", unet / "diffusion_pytorch_model.safetensors")
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1}))
    (folder / "pipeline-folder" / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}))
    for name in ("model.aqcal", "a.aqcal", "b.aqcal"):
        shutil.copy(RECORDED, folder / name)
    for bits in ("4", "8"):
        done = shell(f"arrowquant quantize model.safetensors --bits {bits} -o model-int{bits}", folder)
        assert done.returncode == 0, done.stderr
    (folder / ".zfunc").mkdir()
    (folder / ".config" / "fish" / "completions").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("line", [line for line in commands_of("docs/cli.md") if not line.startswith("arrowquant bench")])  # tests/integration/test_bench.py
def test_the_examples_of_the_reference_run(models, tmp_path, line):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True, symlinks=True)
    if line == "arrowquant quantize model.safetensors":
        shutil.rmtree(tmp_path / "model-int4")  # which it writes
    done = shell(line, tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_commands_of_the_quality_page_run(tmp_path):
    """docs/quality.md, on three small layers under the names of the sample models."""
    write_model(tmp_path / "dit-fashion", weights("pos_embed.weight", "proj_out_1.weight"))
    write_model(tmp_path / "mdlm-text", weights("local.weight", "head.weight", "tok.weight", "pos.weight", "time.weight"), modality="text")
    shutil.copy(RECORDED, tmp_path / "inputs.aqcal")
    lines = commands_of("docs/quality.md")
    assert len(lines) == 2
    for line in lines:
        done = shell(line, tmp_path)
        assert done.returncode == 0, done.stderr


def options_of(command):
    done = subprocess.run([PROGRAM, "help", command], capture_output=True, text=True)
    assert done.returncode == 0, command
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout))


def test_spelled_commands_and_options_exist():
    """What begins with a command, a script or an option, in a code span or a line of a block: each is known, and takes the options that follow."""
    listed = subprocess.run([PROGRAM, "help", "--markdown"], capture_output=True, text=True, check=True).stdout
    table = {command: options_of(command) for command in re.findall(r"^## `arrowquant (\w+)", listed, re.M)}
    assert len(table) == 12
    for action in ("show", "merge", "check", "import", "synth"):
        table[action] = table["calib"]
    folders = {folder: "".join(p.read_text() for p in (ROOT / folder).glob("*.py")) for folder in ("bench", "scripts", "examples")}
    known = set().union(*table.values(), *(re.findall(r"\"(--[a-z][\w-]*)\"", text) for text in folders.values()), {"--help", "--field-name"})
    targets, n = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)), 0
    for document in DOCUMENTS:
        if document.name == "cli.md":
            continue  # printed from the table itself
        text = document.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)) <= targets, document
        lines = [line.split(" #")[0] for _, block in FENCED.findall(text) for line in block.splitlines() if line.startswith(("arrowquant ", "python "))]
        for span in re.findall(r"`([^`\n]+)`", FENCED.sub("", text)) + lines:
            words = re.sub(r"'[^']*'", "VALUE", span).split()
            where = f"{document.relative_to(ROOT)}: `{span}`"
            options = {re.split("[=|]", w)[0] for w in words if re.match("--[a-z]", w)}
            if words[0] == "python" or re.fullmatch(r"(bench|scripts|tests|examples)/[\w/]+\.py", words[0]):
                script = words[words[0] == "python"]
                assert script.startswith("../") or (ROOT / script).is_file(), where
                source = folders.get(script.split("/")[0], "")
                assert all(f'"{option}"' in source for option in options), where
            elif words[0] == "arrowquant" or (words[0] in table and options):
                command = words[words[0] == "arrowquant" :][:1]
                if command == ["COMMAND"]:
                    assert all(options <= table[name] for name in ("inspect", "quantize", "plan", "verify", "diff", "export", "calib")), where
                elif command:
                    assert command[0] in table and options <= table[command[0]], where
            else:
                assert options <= known, where
            n += bool(options)
    assert n > 80
