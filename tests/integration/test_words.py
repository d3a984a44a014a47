"""Commands, options, help, completion, and what is said about wrong ones."""

import os
import subprocess

import pytest
from conftest import PROGRAM, ROOT, clean_environment


def test_alone_it_prints_ten_lines_with_three_examples(cli):
    result = cli()
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert len(lines) == 10
    assert sum(line.startswith("  arrowquant") for line in lines[lines.index("Examples:") :]) == 3


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version(cli, words):
    result = cli(*words)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("arrowquant ") and result.out.count("\n") == 1


def test_version_json(cli):
    report = cli("version", "--json").json
    assert report["schema"] == "arrowquant.version/1"
    assert report["isa"] in ("scalar", "avx2", "avx512", "neon")
    assert set(report) == {"schema", "version", "container", "isa"}


def commands(cli):
    text = cli("help").out
    listed = text.split("Commands\n")[1].split("\n\n")[0]
    return [line.split()[0] for line in listed.splitlines()]


def test_each_command_has_help_with_examples(cli):
    for command in commands(cli):
        for words in (["help", command], [command, "--help"], [command, "-h"]):
            result = cli(*words)
            assert (result.code, result.err) == (0, "")
            assert result.out.startswith(f"Usage: arrowquant {command}")
            assert f"  arrowquant {command}" in result.out or command == "completion"
            assert "--json" in result.out
            # Lines of examples may be long, so that they can be copied.
            assert all(len(line) <= 100 for line in result.out.splitlines() if not line.startswith("  arrowquant"))


def test_commands_of_later_versions_are_unknown(cli):
    for command in ("serve", "download"):
        assert command not in commands(cli)
        assert cli(command, "x").code == 2


def test_manual_is_current(cli):
    """docs/cli.md is what `arrowquant help --markdown` prints: run that again when options change."""
    result = cli("help", "--markdown")
    assert result.code == 0
    assert (ROOT / "docs/cli.md").read_text() == result.out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["verson"], 'error: unknown command "verson"\n  hint: did you mean version?\n'),
        (["zzzz"], 'error: unknown command "zzzz"\n  hint: arrowquant help lists the commands\n'),
        (["help", "complete"], 'error: unknown command "complete"\n  hint: did you mean completion?\n'),
        (["model.safetensors"], 'error: unknown command "model.safetensors"\n  hint: a command comes first, as in: arrowquant quantize model.safetensors\n'),
        (["version", "--jsn"], "error: unknown option --jsn\n  hint: did you mean --json?\n"),
        (["version", "--progress=sometimes"], 'error: --progress: invalid value "sometimes"; must be auto, always, never or json\n'),
        (["--color", "blue", "version"], 'error: --color: invalid value "blue"; must be auto, always or never\n'),
        (["version", "--json=yes"], "error: --json takes no value\n"),
        (["version", "--log"], "error: --log needs a value: FILE\n  hint: append everything that is logged to a file\n"),
        (["version", "extra"], 'error: version: unexpected argument "extra"\n  hint: arrowquant version\n'),
        (["version", "--markdown"], "error: --markdown is not an option of version\n  hint: it belongs to: help\n"),
        (["completion"], "error: completion needs SHELL\n  hint: arrowquant completion SHELL; see arrowquant help completion\n"),
        (["completion", "tcsh"], 'error: completion: unknown SHELL "tcsh"; must be bash, zsh, fish or powershell\n'),
        (["version", "--\x1b[31m"], "error: unknown option --\\x1b[31m\n  hint: arrowquant help version lists the options\n"),
        (["version", "-z"], "error: unknown option -z\n  hint: arrowquant help lists the options; `--` goes before a path that begins with a dash\n"),
    ],
)
def test_wrong_words_are_refused_with_a_way_out(cli, words, error):
    result = cli(*words)
    assert (result.code, result.out, result.err) == (2, "", error)


def test_errors_are_one_json_object_when_asked_for(cli):
    result = cli("--json", "verson")
    assert result.code == 2 and result.err == ""
    assert result.json == {
        "error": {"code": 2, "kind": "usage", "message": 'unknown command "verson"', "file": "", "tensor": "", "hint": "did you mean version?"}
    }


def test_help_is_one_json_object_when_asked_for(cli):
    for words in ([], ["help"], ["help", "version"], ["help", "--markdown"], ["completion", "bash"]):
        assert cli(*words, "--json").json["text" if words != ["completion", "bash"] else "script"]


def test_options_before_the_command_and_in_clusters(cli):
    assert cli("--json", "version").json == cli("version", "--json").json
    assert "kernels" in cli("-v", "version").out
    assert "kernels" in cli("version", "-qv").out


# ---- streams ----


def test_colors_follow_the_usual_variables(cli):
    def colored(*words, **env):
        return "\x1b[" in cli("help", *words, env=env).out

    assert not colored()
    assert colored(CLICOLOR_FORCE="1")
    assert not colored(CLICOLOR_FORCE="0")
    assert not colored(CLICOLOR_FORCE="1", NO_COLOR="1")
    assert colored("--color=always", NO_COLOR="1", TERM="dumb")
    assert not colored("--color", "never", CLICOLOR_FORCE="1")


def on_terminal(words, env):
    """What the program writes when stdout and stderr are a terminal."""
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen([PROGRAM, *words], stdout=slave, stderr=slave, stdin=slave, env=clean_environment(**env))
    os.close(slave)
    text = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        text += piece
    os.close(master)
    return process.wait(), text.decode()


@pytest.mark.parametrize(("env", "colored"), [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({}, False)])
def test_a_terminal_gets_colors_unless_it_is_dumb(env, colored):
    code, text = on_terminal(["verson"], env)
    assert code == 2 and ("\x1b[" in text) == colored


def test_FA09_head_ends_the_output_quietly():
    shell = f"set -o pipefail; '{PROGRAM}' help --markdown | head -1"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=clean_environment(), check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "# The command line\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["version"], ["help", "--markdown"], ["version", "--json"], ["completion", "bash"]])
def test_FA09_a_full_disk_under_stdout_is_an_error(cli, words):
    with open("/dev/full", "w") as full:
        result = cli(*words, stdout=full)
    assert (result.code, result.err) == (6, "error: standard output: cannot write: No space left on device\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_FA09_closed_streams_are_survived(closed):
    result = subprocess.run(["bash", "-c", f"'{PROGRAM}' version {closed}"], capture_output=True, text=True, env=clean_environment(), check=False)
    assert (result.returncode, result.stderr) == (0, "")


# ---- completion ----


def complete(tmp_path, line):
    """What bash offers after `line`."""
    script = tmp_path / "completion.bash"
    script.write_text(subprocess.run([PROGRAM, "completion", "bash"], capture_output=True, text=True, check=True).stdout)
    words = line.split(" ")
    shell = f"""
        source {script}
        COMP_WORDS=({" ".join(f"'{w}'" for w in words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()
        _arrowquant
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stderr == ""
    return result.stdout.split()


def test_bash_completes_commands_options_and_values(cli, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert set(complete(tmp_path, "arrowquant ")) == set(commands(cli))
    assert complete(tmp_path, "arrowquant compl") == ["completion"]
    assert complete(tmp_path, "arrowquant completion z") == ["zsh"]
    assert complete(tmp_path, "arrowquant version --js") == ["--json"]
    assert complete(tmp_path, "arrowquant version --progress a") == ["auto", "always"]
    assert complete(tmp_path, "arrowquant version --color = n") == ["never"]
    assert complete(tmp_path, "arrowquant help --mark") == ["--markdown"]
    assert complete(tmp_path, "arrowquant version --log mod") == ["model.safetensors"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_have_valid_syntax(cli, tmp_path, shell):
    script = tmp_path / "script"
    script.write_text(cli("completion", shell).out)
    try:
        result = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"{shell} is not installed")
    assert (result.returncode, result.stderr) == (0, "")
