"""The guide to calibration: every code block of docs/calibration.md runs, from top to bottom."""

import re
import warnings

import arrow_quant_v2 as aq
import pytest
from files import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


class MDLM(torch.nn.Module):
    """A masked language model, as small as can be."""

    def __init__(self):
        super().__init__()
        self.tok, self.time, self.head = torch.nn.Embedding(129, 8), torch.nn.Linear(1, 8), torch.nn.Linear(8, 128)

    def forward(self, ids, t):
        return self.head(self.tok(ids) + self.time(t[:, None])[:, None])


def test_every_block_of_the_guide_runs(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    blocks = [(text[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]
    names = {"mdlm": MDLM()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no timestep fell into")
        for line, block in blocks:
            exec(compile("\n" * line + block, "docs/calibration.md", "exec"), names)  # noqa: S102
    sampled = aq.Calibration.open("dit-sampled.aqcal")
    assert sampled.check("examples/dit-fashion") == [] and all(sampled.stats(0, g)["count"] for g in range(10))
    assert aq.Calibration.open("dit.aqcal").check("examples/dit-fashion") == [] and aq.Calibration.open("mdlm.aqcal").modality == "text"
    assert len(names["rows"]) == len(names["columns"]) == 192
