"""The front page: its commands and its Python run in a fresh folder, with a block of the sample model for MODEL. Every document with commands has its test."""

import re
import subprocess

import pytest
from files import ROOT, write_short_dit
from program import PROGRAM

TESTED = {  # who runs the blocks of a document
    "README.md": "test_readme.py",
    "docs/calibration.md": "test_calibration_guide.py",
    "docs/cli.md": "test_commands.py",
    "docs/configuration.md": "test_readme.py",
    "docs/exports.md": "test_export_other.py",
    "docs/format.md": "test_container_readers.py",
    "docs/planning.md": "test_readme.py",
    "docs/python.md": "test_guide.py",
    "docs/quality.md": "test_commands.py",
    "docs/quickstart.md": "test_documents.py",
    "docs/torch.md": "test_documents.py",
    "docs/troubleshooting.md": "test_documents.py",
}


def blocks_of(name, language):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [m[1] for m in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """MODEL is one block of the sample."""
    write_short_dit(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    words = line.split()
    assert words[0] == "arrowquant"
    return subprocess.run([PROGRAM, *words[1:]], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_no_document_with_code_is_without_a_test():
    found = {
        str(p.relative_to(ROOT)) for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if re.search(r"^```(sh|python|yaml|sql)?\n", p.read_text(), re.M)
    }
    assert found == TESTED.keys()
    for document, test in TESTED.items():
        text = (ROOT / "tests" / "python" / test).read_text()
        assert document.split("/")[-1] in text, (document, test)


def test_the_commands_of_the_readme_run(folder):
    lines = [line for block in blocks_of("README.md", "sh") for line in block.splitlines() if line.startswith("arrowquant")]
    assert len(lines) >= 6
    for i, line in enumerate(lines):
        line = line.split("#")[0].replace("6.5GB", "1.3MB") + (" --overwrite" if "OUT --target-size" in line else "")
        done = run(line)
        assert done.returncode == 0, (i, line, done.stderr)
    assert {p.name for p in folder.iterdir()} == {"MODEL", "OUT", "OUT.gguf", "report.html"}


@pytest.mark.parametrize("document", ["README.md", "docs/format.md"])
def test_the_queries_run(folder, document):
    duckdb = pytest.importorskip("duckdb")
    assert run("arrowquant quantize MODEL -o OUT --method rtn").returncode == 0
    (query,) = blocks_of(document, "sql")
    found = duckdb.sql(query).fetchall()
    figures = [db for _, db in found if db is not None]
    assert len(found) > len(figures) == 7 and min(figures) > 15


def test_the_python_of_the_readme_runs(folder):
    for package in ("torch", "diffusers"):
        pytest.importorskip(package)
    import shutil

    import diffusers

    shutil.copy(ROOT / "examples" / "fashion-calib.npz", "images.npz")
    names = {
        "model": diffusers.DiTTransformer2DModel.from_pretrained("MODEL", subfolder="transformer").eval(),
        "scheduler": diffusers.DDIMScheduler.from_pretrained("MODEL", subfolder="scheduler"),
    }
    blocks = blocks_of("README.md", "python")
    assert len(blocks) == 1
    exec(compile(blocks[0].replace("samples=64", "samples=2"), "README.md", "exec"), names)  # noqa: S102
    assert sum(hasattr(m, "qweight") for m in names["model"].modules()) == 7


def test_the_settings_file_of_the_configuration_guide_is_read(folder):
    (yaml,) = blocks_of("docs/configuration.md", "yaml")
    (folder / "settings.yaml").write_text(yaml)
    done = run("arrowquant quantize MODEL --config settings.yaml --print-config")
    assert done.returncode == 0 and "group_size: 64" in done.stdout, done.stderr


def test_the_fitness_of_the_planning_guide_serves_a_search(folder):
    """docs/planning.md: the block, and the call that follows it, for one generation."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    import arrow_quant_v2 as aq

    (block,) = blocks_of("docs/planning.md", "python")
    names = {}
    exec(compile(block, "docs/planning.md", "exec"), names)  # noqa: S102
    model = diffusers.DiTTransformer2DModel.from_pretrained("MODEL", subfolder="transformer").eval()
    generator = torch.Generator().manual_seed(0)
    inputs = dict(hidden_states=torch.randn(1, 1, 28, 28, generator=generator), timestep=torch.tensor([500]), class_labels=torch.tensor([1]))
    run_model = lambda m: m(**inputs).sample  # noqa: E731
    with torch.no_grad():
        reference = run_model(model)
    fitness = names["fitness_of"]("MODEL", model, run_model, reference)
    plan = aq.plan("MODEL", target_size="1.2MB", generations=1, population=2, state_path="search.json", fitness=fitness)
    assert plan.feasible and (folder / "search.json").exists()
