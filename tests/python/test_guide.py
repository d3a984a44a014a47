"""The guide: every code block of docs/python.md runs, from top to bottom."""

import re

import arrow_quant_v2 as aq
import pytest
from files import ROOT, write_sharded


def test_every_block_of_the_guide_runs(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    (tmp_path / "sharded").mkdir()
    write_sharded(tmp_path / "sharded", {"model-00001-of-00001.safetensors": {"a": [[1.0, 2.0]]}})
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = [(text[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]
    assert len(blocks) >= 10
    names = {}
    for line, block in blocks:
        exec(compile("\n" * line + block, "docs/python.md", "exec"), names)  # noqa: S102
    assert not (tmp_path / "out").exists() and (tmp_path / "dit-half" / "metadata.json").exists()


def test_the_guide_names_every_exception_and_function():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    missing = [name for name in aq.__all__ if not name.startswith("_") and isinstance(getattr(aq, name), type) and name not in text]
    assert set(missing) <= {"Layer", "Progress", "Reader", "Tensor", "ShardedSafeTensorsLoader", "ArrowQuantError"}
