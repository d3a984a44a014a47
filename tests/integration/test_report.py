"""`arrowquant report`: one page that needs nothing else, shows what was measured, and names the command that makes the same bytes again."""

import hashlib
import html
import re
import shlex
from html.parser import HTMLParser

import pytest
from conftest import ROOT, floats, write_safetensors

SAMPLE = ROOT / "examples/dit-fashion"
VOID = {"meta", "wbr", "path", "rect", "circle"}


class Page(HTMLParser):
    """Reads a page and checks that its tags close in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text = [], [], path.read_text()
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def titles(self):
        return [html.unescape(t) for t in re.findall(r"<title>([^<]*)</title>", self.text)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The sample model at mixed bits."""
    import subprocess

    from conftest import PROGRAM, clean_environment

    out = tmp_path_factory.mktemp("report") / "mixed"
    command = [PROGRAM, "quantize", SAMPLE, "-o", out, "--bits", "2", "--layer", "*ff*=bits:8,group:64", "--layer", "*to_v*=bits:4", "-q"]
    subprocess.run(command, env=clean_environment(), check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return out


def test_the_page_is_whole_and_needs_nothing_else(cli, mixed, tmp_path):
    result = cli("report", mixed, "--against", SAMPLE, "-o", "page.html", "--json", "--progress", "never")
    assert result.code == 0, result.err
    report = result.json
    page = Page(tmp_path / "page.html")
    assert report["schema"] == "arrowquant.report/1" and report["n_layers"] == 42 and report["measured"] and report["size_bytes"] == len(page.text.encode())
    assert {tag for tag, _ in page.tags} <= set(
        "html head meta title style body main h1 h2 p strong section div b span figure svg text figcaption code pre details summary table tr th td".split()
    ) | VOID
    assert not re.search(r"(?i)<script|@import|url\(|src=|href=|https?:", page.text)
    for heading in ("Size", "Error of each layer", "Sensitivity and bits", "One layer before and after", "Fallbacks", "Layers"):
        assert f"<h2>{heading}</h2>" in page.text
    marks = page.titles()
    layers = [m for m in marks if re.search(r"dB, INT[248]$", m)]
    assert len(layers) == 42 and sum("INT8" in m for m in layers) == 12 and sum("INT4" in m for m in layers) == 6
    assert sum(m.endswith("%") for m in marks) == 42


def test_the_figures_are_those_of_verify(cli, mixed, tmp_path):
    cli("report", mixed, "--against", SAMPLE, "-o", "page.html")
    tensors = {t["name"]: t for t in cli("verify", mixed, "--against", SAMPLE, "--json").json["tensors"]}
    shown = [m for m in Page(tmp_path / "page.html").titles() if "dB, INT" in m]
    for mark in shown:
        name, value = re.fullmatch(r"(.*): (-?[0-9.]+) dB, INT.", mark).groups()
        assert abs(float(value) - tensors[name]["sqnr_db"]) <= 0.051


def test_it_is_the_same_at_any_number_of_threads(cli, mixed, tmp_path):
    pages = set()
    for threads in (1, 2, 5):
        assert cli("report", mixed, "--against", SAMPLE, "-o", f"{threads}.html", "--threads", str(threads)).code == 0
        pages.add((tmp_path / f"{threads}.html").read_bytes())
    assert len(pages) == 1


def command_of(page):
    return shlex.split(html.unescape(re.search(r"<pre>(.*?)</pre>", page.read_text(), re.S).group(1)))


def digest(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.parquet")}


def test_its_command_makes_the_same_bytes_again(cli, mixed, tmp_path):
    cli("report", mixed, "-o", "page.html")
    words = command_of(tmp_path / "page.html")
    assert words[:3] == ["arrowquant", "quantize", "dit-fashion"]
    assert cli(words[1], SAMPLE, *words[3:], "-o", "again").code == 0
    assert digest(tmp_path / "again") == digest(mixed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profile", "edge", "--min-accuracy", "0.9"], ["--profile=edge", "--min-accuracy=0.9"]),
        (["--target-size", "60KB"], ["--target-size=60000B"]),
        (["--plan", "my.plan"], ["--plan=PLAN"]),
        (["--lora", "my lora.safetensors:-0.35"], ["--lora=my lora.safetensors:-0.35"]),
        (["--calib", "my.aqcal"], ["--calib=FILE"]),
        (["--bits", "8", "--exclude", "*attn.to_q*"], ["--exclude=*attn.to_q*"]),
    ],
)
def test_whatever_made_it_is_in_the_command(cli, model, tmp_path, options, said):
    """Profiles, budgets, plans, adapters, statistics: with the files in their places the command makes the same bytes."""
    name = "blocks.0.attn.to_q"
    adapter = {f"{name}.lora_A.weight": ("F32", [2, 128], floats(256, 7)), f"{name}.lora_B.weight": ("F32", [64, 2], floats(128, 8))}
    write_safetensors(tmp_path / "my lora.safetensors", adapter)
    assert cli("plan", model, "--target-bpw", "5", "-o", "my.plan").code == 0
    if "--calib" in options:
        aq = pytest.importorskip("arrow_quant_v2")
        import numpy as np

        statistics = aq.Calibration(num_timesteps=10, groups=2, data_name="noise")
        for i in range(4):
            statistics.add_layer(f"blocks.{i}.attn.to_q.weight", 128)
            statistics.update(
                f"blocks.{i}.attn.to_q.weight", np.random.default_rng(i).standard_normal((64, 128), np.float32), np.arange(64, dtype=np.int32) % 10
            )
        statistics.save(tmp_path / "my.aqcal")
    done = cli("quantize", model, "-o", "out", *options)
    assert done.code == 0, done.err
    cli("report", "out", "-o", "page.html")
    words = command_of(tmp_path / "page.html")
    assert all(any(w.startswith(s) for w in words) for s in said), words
    given = [w.replace("=PLAN", "=my.plan").replace("=FILE", "=my.aqcal") for w in words[3:]]
    again = cli("quantize", model, *given, "-o", "again")
    assert again.code == 0, again.err
    assert digest(tmp_path / "again") == digest(tmp_path / "out")
    extra = ["--calib", "my.aqcal"] if "--calib" in options else []
    cli("report", "out", "--against", model, *extra, "-o", "full.html")
    words = command_of(tmp_path / "full.html")
    assert words[2] == str(model) and ("--calib=my.aqcal" in words) == bool(extra)


def test_names_from_the_file_are_text(cli, tmp_path):
    name = "blocks.0.<script>alert(1)</script>&\u202e.weight"
    write_safetensors(tmp_path / "m.safetensors", {name: ("F32", [64, 128], floats(64 * 128))}, {"modality": "image"})
    assert cli("quantize", "m.safetensors", "-o", "out", "-q", "--bits", "8").code == 0
    assert cli("report", "out", "-o", "page.html", "--against", "m.safetensors").code == 0
    page = Page(tmp_path / "page.html")
    assert "<script" not in page.text and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page.text and "\u202e" not in page.text


def test_fallbacks_are_listed_with_their_reasons(cli, model, tmp_path):
    assert cli("quantize", model, "-o", "out", "--bits", "2", "--min-accuracy", "0.99", "-q").code == 0
    cli("report", "out", "-o", "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "int2: cosine" in text and "4 of 4 layers." in text


def test_quantize_writes_it_as_well(cli, model, tmp_path):
    assert cli("quantize", model, "-o", "out", "--report", "page.html", "-q").code == 0
    assert "Sensitivity and bits" in Page(tmp_path / "page.html").text


def test_the_layer_that_is_asked_for(cli, mixed, tmp_path):
    name = "transformer_blocks.3.attn1.to_q"
    assert cli("report", mixed, "-o", "page.html", "--show", name).code == 0
    assert f"<strong>{name}.weight</strong>" in (tmp_path / "page.html").read_text()
    result = cli("report", mixed, "-o", "other.html", "--show", "nothing")
    assert result.code == 2 and 'no quantized layer "nothing"' in result.err and not (tmp_path / "other.html").exists()


def test_wrong_inputs(cli, mixed, model, tmp_path):
    (tmp_path / "there.html").write_text("mine")
    result = cli("report", mixed, "-o", "there.html")
    assert result.code == 6 and "--overwrite" in result.err and (tmp_path / "there.html").read_text() == "mine"
    assert cli("report", mixed, "-o", "there.html", "--overwrite").code == 0
    result = cli("report", model, "-o", "x.html")
    assert result.code == 3 and "not a container" in result.err
    assert cli("report", "missing", "-o", "x.html").code == 6
    assert cli("report", mixed, "-o", "no/folder/x.html").code == 6
    result = cli("report", mixed, "-o", "x.html", "--calib", model, "--against", SAMPLE)
    assert result.code == 3 and "model.safetensors" in result.err
    assert not (tmp_path / "x.html").exists()
