"""Progress, logs and signals: what stderr shows while a job runs, and how a job is stopped and continued."""

import fcntl
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess

import pytest
from conftest import PROGRAM, clean_environment, floats, layers, write_safetensors


def events(text):
    """Each line of --progress json is one object."""
    return [json.loads(line) for line in text.splitlines()]


def on_terminal(words, cwd, **env):
    """The exit code and what a terminal of 100 columns is sent."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    environment = clean_environment(**{"TERM": "xterm", **env})
    process = subprocess.Popen([PROGRAM, *words], stdout=slave, stderr=slave, stdin=slave, env=environment, cwd=cwd)
    os.close(slave)
    text = b""
    while True:
        select.select([master], [], [], 1)
        try:
            piece = os.read(master, 65536)
        except BlockingIOError:
            continue
        except OSError:
            break
        if not piece:
            break
        text += piece
    os.close(master)
    return process.wait(), text.decode()


# ---- progress ----


def test_json_events_rise_and_end_at_1(cli, model):
    result = cli("quantize", model.name, "--progress", "json")
    told = [e for e in events(result.err) if e["event"] == "progress"]
    keys = {"event", "stage", "tensor", "n_done", "n_total", "bytes_done", "bytes_total", "fraction", "elapsed_s", "eta_s", "rss_bytes"}
    assert all(set(e) == keys for e in told)
    fractions = [e["fraction"] for e in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    finished = [e["tensor"] for e in told if e["stage"] == "quantize" and e["tensor"]]
    assert finished == list(layers())
    assert [e["message"] for e in events(result.err) if e["event"] == "log"][0].startswith("model.safetensors: 8 tensors")


def test_elsewhere_than_on_a_terminal_there_are_few_lines(cli, model):
    result = cli("quantize", model.name)
    assert "\r" not in result.err and "\x1b" not in result.err
    told = [line for line in result.err.splitlines() if " % " in line]
    percents = [int(re.search(r"(\d+) %", line)[1]) for line in told]
    assert percents == sorted(percents) and percents[-1] == 100 and len({p // 10 for p in percents}) == len(percents) <= 11
    assert "RSS" in told[-1]


@pytest.mark.parametrize("words", [["--progress", "never"], ["-q"], ["-q", "--progress=auto"]])
def test_progress_can_be_turned_off(cli, model, words):
    result = cli("quantize", model.name, *words)
    assert result.code == 0 and " % " not in result.err
    assert (result.err == "") == ("-q" in words)


def test_warnings_are_told_even_when_quiet(cli, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", layers(1))
    result = cli("quantize", "model.safetensors", "-q")
    assert result.out == "" and result.err.startswith("warning: ") and result.err.count("\n") == 1


def test_many_warnings_are_cut_and_counted(cli, tmp_path):
    """Each layer is under its floor and goes up the ladder: one warning each, and one about so many of them."""
    block = floats(4096)
    write_safetensors(tmp_path / "model.safetensors", {f"a.{i}.weight": ("F32", [64, 64], block) for i in range(25)}, {"modality": "image"})
    words = ["quantize", "model.safetensors", "--method", "rtn", "--bits", "2", "--min-accuracy", "0.99", "--progress", "never"]
    short, whole = cli(*words, "-o", "a"), cli(*words, "-o", "b", "-v")
    assert short.err.count("warning: ") == 20 and "... 6 more warnings; -v shows all\n" in short.err
    assert whole.err.count("warning: ") == 26 and "more warnings" not in whole.err
    assert "  26 warnings" in short.out


def test_verbose_has_a_line_for_each_tensor(cli, model):
    lines = cli("quantize", model.name, "-v", "--progress", "never").err.splitlines()
    told = [line for line in lines if re.match(r"\d/8 blocks\.", line)]
    assert len(told) == 8
    assert re.fullmatch(r"1/8 blocks\.0\.attn\.to_q\.weight  \[64, 128\] F32 -> int4 g128 search  32\.8 kB -> 4\.\d+ kB  cos 0\.99\d+", told[0])


def test_a_terminal_shows_one_bar_that_is_cleared(model):
    code, text = on_terminal(["quantize", model.name], model.parent)
    assert code == 0
    bars = [piece for piece in text.split("\r") if re.search(r"\[[█░]{22}\]", piece)]
    assert bars and all(len(re.sub(r"\x1b\[K|\n", "", bar).split("\x1b")[0]) <= 100 for bar in bars)
    assert re.search(r"\r\x1b\[K[^\r]*(kept|wrote)", text) or "\r\x1b[K" in text
    assert text.rstrip().endswith("next: arrowquant export model-int4 --to gguf")


def test_a_bar_is_ascii_where_the_locale_is(model):
    code, text = on_terminal(["quantize", model.name], model.parent, LANG="C")
    assert code == 0 and re.search(r"\[[#-]{22}\]", text) and text.isascii()


def test_a_dumb_terminal_gets_lines(model):
    code, text = on_terminal(["quantize", model.name], model.parent, TERM="dumb")
    assert code == 0 and "\x1b" not in text and " % " in text


# ---- the log file ----


def test_FA01_a_log_that_cannot_grow_is_told_once_and_the_job_goes_on(cli, model, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (90, 90))

    result = cli("inspect", model.name, "--log", "run.log", "-vv", preexec_fn=small_files, restore_signals=False)
    assert result.code == 0 and "blocks.0.attn.to_q.weight" in result.out
    full = cli("quantize", "nothing", "--log", "run.log", preexec_fn=small_files, restore_signals=False)
    assert full.code == 6 and full.err.count("warning: the log ends here, as it cannot be written: ") == 1
    assert "error: Model not found: nothing" in full.err


def test_the_log_gets_everything_and_grows(cli, model, tmp_path):
    assert cli("quantize", model.name, "-q", "--log", "run.log").code == 0
    text = (tmp_path / "run.log").read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (info|warning|error|debug): ", line) for line in text.splitlines())
    assert "arrowquant " in text.splitlines()[0] and "4 tensors to int4" in text and text.count("/8 blocks.") == 8
    assert cli("quantize", model.name, "-q", "--log", "run.log").code == 6
    assert (tmp_path / "run.log").read_text().startswith(text) and "error: model-int4: exists already" in (tmp_path / "run.log").read_text()


def test_P4_the_log_never_is_an_input(cli, model):
    before = model.read_bytes()
    link = model.parent / "link"
    link.symlink_to(model)
    for path in (model, link):
        result = cli("quantize", model.name, "--log", path)
        assert result.code == 2 and "--log" in result.err
    assert model.read_bytes() == before


def test_a_log_that_cannot_be_written_is_an_error(cli, model):
    result = cli("quantize", model.name, "--log", "no/such/run.log")
    assert result.code == 6 and "no/such/run.log" in result.err


# ---- signals ----


@pytest.fixture(scope="session")
def large_model(tmp_path_factory):
    block = floats(512 * 256)
    tensors = {f"blocks.{i}.weight": ("F32", [512, 256], block) for i in range(60)}
    return write_safetensors(tmp_path_factory.mktemp("large") / "model.safetensors", tensors, {"modality": "image"})


@pytest.fixture
def long_job(large_model, tmp_path):
    """A job of seconds with the scalar kernels: words and folder."""
    shutil.copy(large_model, tmp_path)
    return ["quantize", "model.safetensors", "--threads", "1", "--method", "search", "--progress", "json"], tmp_path


class Running:
    """The program after it has finished a third of the tensors, when some of them are durable. Its events go through a pipe of one page: it
    waits for us when it is about sixteen events ahead, so it can never be done before the signal comes."""

    def __init__(self, words, folder, marker=b'"n_done":20,'):
        self.read, write = os.pipe()
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        environment = clean_environment(ARROWQUANT_ISA="scalar")
        self.process = subprocess.Popen([PROGRAM, *words], stdout=subprocess.PIPE, stderr=write, text=True, env=environment, cwd=folder)
        os.close(write)
        self.text = b""
        while marker not in self.text:
            self.text += os.read(self.read, 256)
            assert self.process.poll() is None, self.text

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """Exit code, stdout, and events that are no progress; a line that is no event as {"text": line}."""
        while piece := os.read(self.read, 65536):
            self.text += piece
        os.close(self.read)
        out, _ = self.process.communicate(timeout=30)
        lines = self.text.decode().splitlines()
        told = [json.loads(line) if line.startswith("{") else {"text": line} for line in lines]
        return self.process.returncode, out, [e for e in told if e.get("event") not in ("progress", "log")]


def run(words, folder):
    return subprocess.run([PROGRAM, *words], capture_output=True, text=True, cwd=folder, env=clean_environment(), check=False)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_FA10_a_signal_stops_and_the_same_command_goes_on(long_job, number, code):
    words, folder = long_job
    running = Running(words, folder)
    running.send(number)
    ended, out, err = running.end()
    assert (ended, out, err[-1]["event"], err[-1]["code"]) == (code, "", "error", code)
    assert err[-1]["message"] == "interrupted: the state is kept; the same command continues"
    assert not (folder / "model-int4").exists() and len(list(folder.glob("model-int4.partial-*"))) == 1
    again = run(words, folder)
    assert again.returncode == 0 and "continuing an interrupted run" in again.stderr
    assert run([*words, "-o", "whole"], folder).returncode == 0
    assert contents(folder / "model-int4") == contents(folder / "whole")
    assert not list(folder.glob("*.partial-*"))


def test_FA10_an_interruption_is_one_line_of_text(long_job):
    words, folder = long_job
    running = Running([*words[:-2], "-v", "--progress", "always"], folder, b"20/60 blocks")
    running.send(signal.SIGTERM)
    code, out, err = running.end()
    assert (code, out) == (143, "")
    assert err[-1]["text"].removeprefix("\x1b[K") == "interrupted: the state is kept; the same command continues"


def test_FA10_an_interruption_is_one_json_object_when_asked_for(long_job):
    words, folder = long_job
    running = Running([*words, "--json"], folder)
    running.send(signal.SIGTERM)
    code, out, err = running.end()
    assert (code, err) == (143, [])
    assert json.loads(out)["error"]["kind"] == "interrupted" and json.loads(out)["error"]["code"] == 143


def test_FA10_an_early_interruption_promises_nothing(long_job):
    words, folder = long_job
    running = Running(words, folder, b'"n_done":1,')
    running.send(signal.SIGINT)
    code, _, err = running.end()
    kept = list(folder.glob("model-int4.partial-*"))
    assert code == 130 and ("the state is kept" if kept else "nothing is kept") in err[-1]["message"]
    assert run(words, folder).returncode == 0


def test_FA10_a_second_signal_stops_at_once(long_job):
    words, folder = long_job
    running = Running(words, folder)
    running.send(signal.SIGINT)
    running.send(signal.SIGINT)
    code, _, _ = running.end()
    assert code == 130 and not (folder / "model-int4").exists()
    assert run(words, folder).returncode == 0


def test_FA10_signals_that_were_ignored_stay_so(long_job):
    """As under nohup or in the background of a script."""
    words, folder = long_job
    shell = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", PROGRAM, *words]
    process = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(), cwd=folder)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_FA14_another_command_does_not_continue_what_it_did_not_begin(long_job):
    words, folder = long_job
    running = Running(words, folder)
    running.send(signal.SIGINT)
    running.end()
    other = [*words, "--group", "32", "--progress=never"]
    refused = run(other, folder)
    assert refused.returncode == 2 and "--restart" in refused.stderr
    assert run([*other, "--restart"], folder).returncode == 0 and not list(folder.glob("*.partial-*"))


def test_ST18_a_file_that_shrinks_while_it_is_read_is_refused(long_job):
    words, folder = long_job
    running = Running(words, folder)
    os.truncate(folder / "model.safetensors", 8192)
    code, _, err = running.end()
    message = err[0].get("message") or err[0]["text"]
    assert code == 3 and ("changed during read" in message or "became shorter" in message)
    assert not (folder / "model-int4").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_ST18_a_page_of_a_map_that_is_gone_is_one_sentence(long_job, as_json):
    """What the system sends when a mapped file was cut under a read."""
    words, folder = long_job
    running = Running([*words, *(["--json"] if as_json else [])], folder)
    running.send(signal.SIGBUS)
    code, out, err = running.end()
    assert code == 3 and not (folder / "model-int4").exists()
    told = json.loads(out)["error"]["message"] if as_json else err[0]["text"]
    assert "an input file became shorter or unreadable while it was read" in told


def test_FA09_a_reader_of_progress_that_goes_away_does_not_stop_the_job(model):
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([PROGRAM, "quantize", model.name], stdout=subprocess.PIPE, stderr=write, cwd=model.parent, env=clean_environment(), check=False)
    os.close(write)
    assert result.returncode == 0 and (model.parent / "model-int4").exists()


def test_FA09_closed_streams_do_not_become_the_output(model):
    """Without the three streams, files that are opened would get their numbers and be written into."""
    shell = f"'{PROGRAM}' quantize model.safetensors -v <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", shell], cwd=model.parent, env=clean_environment(), check=False).returncode == 0
    verify = subprocess.run(
        [PROGRAM, "verify", "model-int4", "--against", model.name], cwd=model.parent, capture_output=True, env=clean_environment(), check=False
    )
    assert verify.returncode == 0
