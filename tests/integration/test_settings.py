"""Where settings come from: default < profile < file < ARROW_QUANT_* environment < options; and what is said about wrong ones."""

import pytest


def settings(cli, *words, **environment):
    """The merged settings of `arrowquant quantize`, as a dict."""
    result = cli("quantize", *words, "--print-config", "--json", env=environment)
    assert (result.code, result.err) == (0, ""), result.err
    return result.json


def write(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_each_source_overrides_those_before_it(cli, tmp_path):
    file = write(tmp_path, "deployment_profile: cloud\ngroup_size: 32\nseed: 7\nmin_accuracy: 0.5\n")
    assert settings(cli)["bit_width"] == 4
    by_profile = settings(cli, "--profile", "edge")
    assert (by_profile["bit_width"], by_profile["group_size"], by_profile["min_accuracy"]) == (2, 256, 0.65)
    by_file = settings(cli, "--config", file)
    assert (by_file["bit_width"], by_file["group_size"], by_file["seed"], by_file["deployment_profile"]) == (8, 32, 7, "cloud")
    # The profile of the command line takes the place of the file's; the file's other keys still come after it.
    both = settings(cli, "--config", file, "--profile", "edge")
    assert (both["bit_width"], both["group_size"], both["min_accuracy"], both["deployment_profile"]) == (2, 32, 0.5, "edge")
    by_environment = settings(cli, "--config", file, ARROW_QUANT_GROUP_SIZE="64", ARROW_QUANT_SEED="8")
    assert (by_environment["bit_width"], by_environment["group_size"], by_environment["seed"]) == (8, 64, 8)
    by_option = settings(cli, "--config", file, "--group", "256", "--bits=4", ARROW_QUANT_GROUP_SIZE="64", ARROW_QUANT_SEED="8")
    assert (by_option["bit_width"], by_option["group_size"], by_option["seed"]) == (4, 256, 8)


def test_json_and_yaml_files_say_the_same(cli, tmp_path):
    yaml = write(tmp_path, "bit_width: 8\nexclude:\n  - 'a*'\n")
    json = write(tmp_path, '{"bit_width": 8, "exclude": ["a*"]}', "run.json")
    assert settings(cli, "--config", yaml) == settings(cli, "--config", json)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--profile", "edge", "--group", "row", "--sym", "--params", "f32", "--method", "rtn"],
        ["--exclude", "a'b*", "--exclude", '[xy]"?', "--include", "yes", "--layer", "*attn*=bits:8,group:64", "--fallback", "4,8"],
        ["--max-memory", "1.5GiB", "--threads", "3", "--min-accuracy", "0.123456789", "--convergence-threshold", "1e-7", "--no-spatial"],
        ["--target-model-size-mb", "12.5", "--calibration-path", "null#: x", "--layer-bit-widths", "a.b=8", "--layer-bit-widths", "c=2"],
    ],
)
def test_printed_settings_reproduce_the_run(cli, tmp_path, words):
    printed = cli("quantize", "model with space", *words, "--print-config", "-o", "out", "--overwrite")
    assert printed.code == 0, printed.err
    assert printed.out.startswith("# arrowquant quantize 'model with space' --config THIS-FILE --output out --overwrite\n")
    file = write(tmp_path, printed.out)
    assert settings(cli, "--config", file) == settings(cli, *words)
    again = cli("quantize", "--config", file, "--print-config").out
    assert again.splitlines()[1:] == printed.out.splitlines()[1:]


def test_printed_json_is_a_config_file_too(cli, tmp_path):
    words = ["--profile", "edge", "--exclude", "a*", "--layer-bit-widths", "b=8"]
    file = write(tmp_path, cli("quantize", "x", *words, "--print-config", "--json").out, "run.json")
    assert settings(cli, "--config", file) == settings(cli, *words)


def test_lists_of_the_command_line_replace_those_of_the_file(cli, tmp_path):
    file = write(tmp_path, "exclude:\n  - old\n")
    assert settings(cli, "--config", file)["exclude"] == ["old"]
    assert settings(cli, "--config", file, "--exclude", "a", "--exclude=b")["exclude"] == ["a", "b"]


def test_every_field_is_an_option(cli):
    for name, value in settings(cli).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            assert settings(cli, option)[name] is True
            assert settings(cli, option + "=false")[name] is False if name != "fail_fast" else True
            assert settings(cli, "--no-" + option[2:].removeprefix("enable-"))[name] is False
        elif isinstance(value, (int, float)):
            assert settings(cli, option, str(value))[name] == value


@pytest.mark.parametrize(
    ("size", "mib"), [("4GB", 3814), ("4GiB", 4096), ("1.5 gib", 1536), ("500MiB", 500), ("2000000k", 1907), ("1048576B", 1), ("0.5TiB", 524288)]
)
def test_size_words(cli, size, mib):
    assert settings(cli, "--max-memory", size)["max_memory_limit_mb"] == mib


@pytest.mark.parametrize(("size", "n"), [("6.5GB", 6500000000), ("6.5GiB", 6656 << 20), ("512KiB", 512 << 10), ("1B", 1), ("2289674B", 2289674)])
def test_a_target_size_takes_size_words_to_the_byte(cli, size, n):
    mib = settings(cli, "--target-size", size)["target_model_size_mb"]
    assert round(mib * 2**20) == n and abs(mib * 2**20 - n) < 0.01


def test_the_hint_of_a_missed_target_size_names_an_option(cli, model):
    missed = cli("quantize", model, "--modality", "image", "--target-size", "10kB")
    assert missed.code == 5 and "--target-size" in missed.err
    assert cli("quantize", model, "--modality", "image", "--target-size", "1GB", "-q").code == 0
    zero = cli("quantize", model, "--target-size", "0B")
    assert zero.code == 2 and "--target-size" in zero.err and "above 0" in zero.err


def test_short_names_set_the_same_fields(cli):
    short = settings(cli, "--time-groups", "7", "--calib", "data.jsonl", "--samples", "9")
    assert short == settings(cli, "--num-time-groups", "7", "--calibration-path", "data.jsonl", "--calibration-samples", "9")


@pytest.mark.parametrize("size", ["4", "", "GB", "-1GB", "4 XB", "1..5GB", "1e3MB", "99999999999999999999GB", "inf", "100kB", "0x10GB", "4GBx"])
def test_sizes_that_are_none_are_refused(cli, size):
    result = cli("quantize", "x", "--max-memory", size)
    assert result.code == 2 and result.err.startswith("error: --max-memory: ") and "must be" in result.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--bits", "3"], 'error: --bits: invalid value "3"; must be 2, 4 or 8\n'),
        (["--bits=3"], 'error: --bits: invalid value "3"; must be 2, 4 or 8\n'),
        (["--group", "17"], 'error: --group: invalid value "17"; must be 32, 64, 128, 256 or row\n'),
        (["--method", "magic"], 'error: --method: invalid value "magic"; must be auto, rtn, search, gptq or r2q\n'),
        (["--profile", "desk"], 'error: --profile: invalid value "desk"; must be edge, local or cloud\n'),
        (["--bit", "4"], "error: unknown option --bit\n  hint: did you mean --bits?\n"),
        (["--exlude", "x"], "error: unknown option --exlude\n  hint: did you mean --exclude?\n"),
        (["--grup-size", "64"], "error: unknown option --grup-size\n  hint: did you mean --group-size?\n"),
        (["--against", "x"], "error: --against is not an option of quantize\n  hint: it belongs to: verify report\n"),
        (
            ["--limit", "n_tensor=5"],
            'error: --limit: unknown limit "n_tensor"; must be header_bytes, n_tensors, name_bytes, index_bytes, config_bytes, n_shards or json_depth\n'
            "  hint: did you mean n_tensors?\n",
        ),
        (["--config", "--print-config"], "error: --config needs a value: FILE\n  hint: read settings from a .yaml or .json file\n"),
        (["-o"], "error: --output needs a value: OUT\n  hint: where to write (beside the input: NAME-int4 by the bits, NAME-safetensors, NAME.gguf)\n"),
        (["--shard-size", "0B"], 'error: --shard-size: invalid size "0B"; must be above 0\n'),
    ],
)
def test_wrong_options_are_refused_with_the_allowed_values(cli, words, error):
    result = cli("quantize", "x", *words)
    assert (result.code, result.out, result.err) == (2, "", error)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--threads", "-1"], ["--threads", "at least 0"]),
        (["--threads", "many"], ["--threads", "many"]),
        (["--min-accuracy", "1.5"], ["--min-accuracy", "between 0.0 and 1.0"]),
        (["--min-accuracy", "nan"], ["--min-accuracy"]),
        (["--fallback", "8,4"], ["--fallback", "2, 4, 8"]),
        (["--layer", "x"], ["--layer", "GLOB=bits:8"]),
        (["--exclude", "[a"], ["--exclude", "[a"]),
        (["--seed", "1_000"], ["--seed", "1_000"]),
        (["--max-iterations", "0"], ["--max-iterations", "at least 1"]),
    ],
)
def test_CF04_values_out_of_range_name_the_option_and_the_range(cli, words, parts):
    result = cli("quantize", "x", *words)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and all(part in result.err for part in parts), result.err


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("bits: 4\n", 'unknown key "bits"'),
        ("bit_widht: 4\n", "bit_width"),
        ("bit_width: 4\nbit_width: 8\n", "bit_width"),
        ("bit_width: &a 4\n", "1:"),
        ("bit_width: 5\n", "2, 4, or 8"),
        ("fail_fast: yes\n", "fail_fast"),
        ("a: [", "run.yaml"),
    ],
)
def test_CF02_wrong_files_are_refused(cli, tmp_path, text, part):
    result = cli("quantize", "x", "--config", write(tmp_path, text))
    assert result.code == 2 and part in result.err, result.err


def test_a_missing_file_is_named(cli):
    result = cli("quantize", "x", "--config", "none.yaml")
    assert result.code in (2, 6) and "none.yaml" in result.err


def test_wrong_environment_names_the_variable(cli):
    result = cli("quantize", "x", env={"ARROW_QUANT_BIT_WIDTH": "5"})
    assert (result.code, result.err) == (2, "error: ARROW_QUANT_BIT_WIDTH: Invalid bit width: 5. Must be 2, 4, or 8\n")


@pytest.mark.parametrize("isa", ["sse9", "neon\x1b[31m"])
def test_an_unknown_instruction_set_is_refused(cli, isa):
    result = cli("version", env={"ARROWQUANT_ISA": isa})
    assert result.code == 2 and "ARROWQUANT_ISA" in result.err and "scalar, avx2, avx512 or neon" in result.err and "\x1b" not in result.err


def test_the_scalar_kernels_are_always_there(cli):
    assert cli("version", "--json", env={"ARROWQUANT_ISA": "scalar"}).json["isa"] == "scalar"


def test_names_are_escaped_where_the_terminal_is_ascii(cli, tmp_path):
    (tmp_path / "schl\u00fcssel").mkdir()
    shown = [cli("inspect", "schl\u00fcssel", env={"LC_ALL": locale}).err for locale in ("C.UTF-8", "C")]
    assert "schl\u00fcssel" in shown[0] and "schl\\u{fc}ssel" in shown[1]


def test_a_number_that_is_too_large_is_said_to_be(cli):
    result = cli("quantize", "model.safetensors", "--threads", "9" * 20)
    assert result.code == 2 and f'num_threads must be below 2^63, found "{"9" * 20}"' in result.err


def test_settings_do_not_depend_on_the_locale(cli):
    for locale in ("de_DE.UTF-8", "C", "tr_TR.UTF-8"):
        assert settings(cli, "--min-accuracy", "0.5", LC_ALL=locale) == settings(cli, "--min-accuracy", "0.5")
