"""The guide to calibration: every code block of docs/calibration.md runs, from top to bottom."""

import re
import warnings

import arrow_quant_v2 as aq
import pytest
from files import ROOT

pytest.importorskip("torch")
pytest.importorskip("diffusers")


def test_every_block_of_the_guide_runs(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    blocks = [(text[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no timestep fell into")
        for line, block in blocks:
            exec(compile("\n" * line + block, "docs/calibration.md", "exec"), names)  # noqa: S102
    sampled = aq.Calibration.open("dit-sampled.aqcal")
    assert sampled.check("examples/dit-fashion") == [] and all(sampled.stats(0, g)["count"] for g in range(10))
    assert len(names["rows"]) == len(names["columns"]) == 192
