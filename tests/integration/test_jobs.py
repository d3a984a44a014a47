"""inspect, quantize, verify, diff, export: what they print, write and return."""

import json
import os
import shlex
import shutil
import struct

import pytest
from conftest import floats, layers, write_safetensors

PLAN = "model.safetensors: 8 tensors, 33024 weights, F32, image, 132 kB\n"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def container(cli, model):
    result = cli("quantize", model.name, "-q")
    assert (result.code, result.out, result.err) == (0, "", "")
    return model.parent / "model-int4"


# ---- the main job ----


def test_the_shortest_command_says_what_it_did_and_what_comes_next(cli, model, tmp_path):
    result = cli("quantize", model.name)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("kept 4 tensors (") and lines[0].endswith("4 fewer than two dimensions")
    assert lines[1].startswith("wrote model-int4/  ") and "kB (" in lines[1] and " bit/weight  verified  cos .9" in lines[1]
    assert lines[2] == "next: arrowquant export model-int4 --to gguf"
    assert result.err.startswith(PLAN + "plan: 4 tensors to int4, 4 kept; at most ")
    assert " peak memory " in result.err.splitlines()[1]
    assert names(tmp_path) == ["model-int4", "model.safetensors"]
    following = cli(*shlex.split(lines[2].removeprefix("next: arrowquant ")))
    assert following.code == 0 and following.out.startswith("wrote model-int4.gguf  ")
    assert names(tmp_path) == ["model-int4", "model-int4.gguf", "model.safetensors"]


def test_the_next_command_works_for_any_path(cli, model, tmp_path):
    result = cli("quantize", model.name, "-o", "it's a $HOME")
    following = shlex.split(result.out.splitlines()[-1].removeprefix("next: arrowquant "))
    assert following[:2] == ["export", "it's a $HOME"] and cli(*following).code == 0


def test_a_path_that_begins_with_a_dash_follows_two_dashes(cli, model, tmp_path):
    shutil.copy(model, tmp_path / "-model.safetensors")
    assert cli("quantize", "-o", "out", "--", "-model.safetensors").code == 0


def test_json_is_one_object_whatever_the_progress(cli, model):
    for index, progress in enumerate(("auto", "always", "never", "json")):
        result = cli("quantize", model.name, "-o", f"out{index}", "--json", "--progress", progress)
        report = result.json
        assert result.code == 0 and report["schema"] == "arrowquant.quantize/1" and "error" not in report
        assert report["output"]["path"] == f"out{index}" and report["summary"]["n_layers"] == 4
    for words in (["inspect", model.name], ["inspect", "out0"], ["verify", "out0"], ["diff", model.name, "out0"], ["export", "out0", "--to", "safetensors"]):
        result = cli(*words, "--json")
        assert result.code == 0 and result.json["schema"] == f"arrowquant.{words[0]}/1"


def test_options_reach_the_result(cli, model):
    report = cli(
        "quantize", model.name, "-o", "out", "--bits", "8", "--group", "32", "--params", "f32", "--method", "rtn", "--exclude", "blocks.0.*",
        "--layer", "blocks.1.*=bits:2,group:64", "--min-accuracy", "0", "--json",
    ).json  # fmt: skip
    made = {layer["name"]: (layer["bits"], layer["group_size"], layer["params"], layer["method"]) for layer in report["layers"]}
    assert made == {
        "blocks.1.attn.to_q.weight": (2, 64, "f32", "rtn"),
        "blocks.2.attn.to_q.weight": (8, 32, "f32", "rtn"),
        "blocks.3.attn.to_q.weight": (8, 32, "f32", "rtn"),
    }


def test_a_printed_configuration_gives_the_same_bytes(cli, model, tmp_path):
    words = ["--profile", "edge", "--layer", "*.1.*=bits:8", "--min-accuracy", "0.5"]
    (tmp_path / "run.yaml").write_text(cli("quantize", model.name, *words, "--print-config").out)
    assert cli("quantize", model.name, "-o", "a", *words).code == 0
    assert cli("quantize", model.name, "-o", "b", "--config", "run.yaml").code == 0
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_P6_threads_do_not_change_a_byte(cli, model, tmp_path):
    for threads in ("1", "3"):
        assert cli("quantize", model.name, "-o", f"t{threads}", "--threads", threads).code == 0
    for name in names(tmp_path / "t1"):
        assert (tmp_path / "t1" / name).read_bytes() == (tmp_path / "t3" / name).read_bytes()


# ---- looking at results ----


def test_inspect_shows_decisions_and_equal_blocks_as_one_line(cli, model):
    result = cli("inspect", model.name)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("model.safetensors: safetensors, image (by ")
    assert "8 tensors, 33.0 k weights, 132 kB (129 KiB): 8 F32\nquantize would take 4 and keep 4\n" in result.out
    assert "4 ×  blocks.*.attn.to_q.weight  [64, 128]  F32    131 kB  int4 g128 f16 search" in result.out
    assert "blocks.2" not in result.out and "blocks.2" in cli("inspect", model.name, "-v").out
    assert "4 x  blocks.*" in cli("inspect", model.name, env={"LANG": "C"}).out.replace("    ", "  ")
    assert "int8 g64" in cli("inspect", model.name, "--bits", "8", "--group=64").out


def test_inspect_of_a_container(cli, container):
    result = cli("inspect", container.name)
    assert result.code == 0 and "4 quantized, 4 kept" in result.out and "int4 g128 search" in result.out


def test_tables_fit_100_columns_and_long_lists_say_how_to_see_all(cli, tmp_path):
    tensors = {f"a.very.long.name.of.a.block.that.takes.more.room.than.there.is.{i}x.weight": ("F32", [64, 64], floats(4096, i)) for i in range(60)}
    write_safetensors(tmp_path / "many.safetensors", tensors, {"modality": "image"})
    assert cli("quantize", "many.safetensors", "-q", "-o", "out", "--method", "rtn").code == 0
    for words in (["inspect", "many.safetensors"], ["inspect", "out"], ["verify", "out"], ["diff", "many.safetensors", "out"]):
        short, whole = cli(*words, "--progress", "never"), cli(*words, "-v", "--progress", "never")
        assert "more; -v shows all" in short.out and "more; -v" not in whole.out
        assert len(whole.out.splitlines()) > 60
        table = [line for line in short.out.splitlines() if "a.very" in line and "[64, 64]" in line]
        assert table and all(len(line) <= 100 for line in table)


def test_verify_measures_and_judges(cli, model, container):
    result = cli("verify", container.name, "--against", model.name)
    assert result.code == 0
    assert "model-int4  ok  8 tensors, 4 quantized" in result.out and "measured against model.safetensors" in result.out
    assert "as stored; --against SOURCE measures it" in cli("verify", container.name).out
    bad = cli("verify", container.name, "--against", model.name, "--min-accuracy", "0.9999")
    assert bad.code == 4 and bad.out.count("is below the floor") == 4 and "model-int4  4 problems" in bad.out
    assert bad.err.splitlines()[-1].startswith("error: model-int4: 4 problems: ")
    as_json = cli("verify", container.name, "--min-accuracy", "0.9999", "--json")
    assert as_json.code == 4 and as_json.json["ok"] is False and as_json.json["error"]["kind"] == "quality" and len(as_json.json["problems"]) == 4


def test_FA15_verify_finds_a_flipped_bit_and_names_the_tensor(cli, container):
    (parquet,) = container.glob("*.parquet")
    data = bytearray(parquet.read_bytes())
    data[1000] ^= 4
    parquet.write_bytes(data)
    result = cli("verify", container.name)
    assert result.code == 4 and "blocks.0.attn.to_q.weight" in result.out + result.err, result.err
    problems = [line for line in result.out.splitlines() if line.startswith("problem: ")]
    assert len([p for p in problems if "its bytes are damaged" in p]) == 1, problems


def test_a_container_without_its_metadata_is_verified_with_a_warning(cli, container):
    (container / "metadata.json").unlink()
    result = cli("verify", container.name)
    assert result.code == 0 and "warning: metadata.json is missing" in result.err


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["quantize", "-o", "again"], ["export", "--to", "gguf"]])
def test_a_container_that_has_lost_its_file_says_so(cli, container, command):
    (parquet,) = container.glob("*.parquet")
    parquet.unlink()
    result = cli(*command, container.name)
    assert result.code == 3 and f'error: {container.name}: its file "{parquet.name}" is missing\n  hint: ' in result.err


def test_diff_tells_equal_from_different(cli, model, container):
    same = cli("diff", model.name, model.name)
    assert same.code == 0 and same.out.endswith("equal: 8 tensors with the same values\n")
    other = cli("diff", model.name, container.name)
    assert other.code == 0 and "different: 4 of 8 compared tensors have the same values  cos .99" in other.out


@pytest.mark.parametrize(("dtype", "size"), [("f32", 4), ("f16", 2), ("bf16", 2), (None, 4)])
def test_exported_files_have_the_source_layout(cli, model, container, tmp_path, dtype, size):
    words = ["--dtype", dtype] if dtype else []
    assert cli("export", container.name, "--to", "safetensors", *words, "-o", "out.safetensors").code == 0
    data = (tmp_path / "out.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    entry = header["blocks.0.attn.to_q.weight"]
    assert entry["shape"] == [64, 128] and entry["data_offsets"][1] - entry["data_offsets"][0] == 64 * 128 * size
    assert set(header) - {"__metadata__"} == set(layers())


# ---- refusals ----


def test_P4_the_source_is_never_the_output(cli, model, tmp_path):
    before = model.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(model)
    os.link(model, tmp_path / "hard.safetensors")
    for out in (model.name, ".", "./model.safetensors", "link.safetensors", "hard.safetensors", tmp_path):
        result = cli("quantize", model.name, "-o", out, "--overwrite")
        assert result.code == 2 and "source" in result.err, (out, result.err)
    assert model.read_bytes() == before


def test_FA05_an_existing_output_is_kept_unless_told_otherwise(cli, model, container):
    before = {p.name: p.read_bytes() for p in container.iterdir()}
    result = cli("quantize", model.name, "--bits", "4", "--method", "rtn", "--progress", "never")
    assert (result.code, result.out) == (6, "")
    assert result.err.endswith(
        "error: model-int4: exists already\n  hint: choose another output, or add --overwrite to replace it when the new one is complete\n"
    )
    assert {p.name: p.read_bytes() for p in container.iterdir()} == before
    assert cli("quantize", model.name, "--method", "rtn", "--overwrite").code == 0
    assert {p.name: p.read_bytes() for p in container.iterdir()} != before
    assert names(model.parent) == ["model-int4", "model.safetensors"]


def test_FA04_a_missing_folder_is_named_and_made_when_asked(cli, model, tmp_path):
    result = cli("quantize", model.name, "-o", "deep/er/out")
    assert result.code == 6 and "--mkdir" in result.err and not (tmp_path / "deep").exists()
    assert cli("quantize", model.name, "-o", "deep/er/out", "--mkdir").code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_FA04_a_read_only_folder_is_refused(cli, model, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert cli("quantize", model.name, "-o", "locked/out").code == 6


@pytest.mark.parametrize("words", [["inspect"], ["quantize"], ["verify"], ["diff", "model.safetensors"], ["export", "--to", "safetensors"]])
def test_a_missing_path_is_named(cli, model, words):
    result = cli(*words, "no-such-model")
    assert (result.code, result.out) == (6, "") and "error: Model not found: no-such-model\n  hint: " in result.err


@pytest.mark.parametrize(("cut", "part"), [(0, "is 0 bytes long"), (7, "is 7 bytes long"), (5000, "do not lie within")])
def test_ST01_a_truncated_file_is_refused_and_named(cli, model, tmp_path, cut, part):
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:cut])
    result = cli("quantize", "cut.safetensors")
    assert (result.code, result.out) == (3, "") and result.err.startswith("error: cut.safetensors: ") and part in result.err
    as_json = cli("inspect", "cut.safetensors", "--json").json["error"]
    assert (as_json["code"], as_json["kind"], as_json["file"]) == (3, "format", "cut.safetensors")
    assert names(tmp_path) == ["cut.safetensors", "model.safetensors"]


def test_IX09_containers_and_models_are_told_apart(cli, model, container):
    for words in (["verify", model.name], ["export", model.name, "--to", "safetensors"]):
        result = cli(*words, "--progress", "never")
        assert result.code == 3 and "source model" in result.err
    result = cli("quantize", container.name, "-o", "again", "--progress", "never")
    assert result.code == 0 and "quantized already: their values carry that error" in result.err


def test_FA08_too_little_memory_names_what_is_enough(cli, model):
    result = cli("quantize", model.name, "--max-memory", "1MiB")
    assert result.code == 7
    enough = result.err.split("--max-memory=")[1].split()[0]
    assert cli("quantize", model.name, "--max-memory", enough).code == 0


def test_CF06_a_pattern_without_a_match_is_an_error(cli, model):
    for option in ("--exclude", "--include"):
        result = cli("quantize", model.name, option, "blokcs.*")
        assert result.code == 2 and "blokcs.*" in result.err and "--allow-unmatched" in result.err
    assert cli("quantize", model.name, "--exclude", "blokcs.*", "--allow-unmatched").code == 0


def test_strict_turns_a_warning_into_exit_4(cli, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", layers(2))  # nothing tells its modality
    result = cli("quantize", "model.safetensors", "--strict")
    assert result.code == 4 and "--strict" in result.err and names(tmp_path) == ["model.safetensors"]
    warned = cli("quantize", "model.safetensors")
    assert warned.code == 0 and warned.err.count("warning: ") == 1 and warned.out.splitlines()[-2].endswith("  1 warning")
    assert cli("quantize", "model.safetensors", "--strict", "--modality", "image", "-o", "out").code == 0


def test_NU01_values_that_are_no_numbers(cli, tmp_path):
    tensors = layers(2)
    dtype, shape, data = tensors["blocks.1.attn.to_q.weight"]
    tensors["blocks.1.attn.to_q.weight"] = (dtype, shape, data[:400] + struct.pack("<f", float("nan")) + data[404:])
    write_safetensors(tmp_path / "model.safetensors", tensors, {"modality": "image"})
    result = cli("quantize", "model.safetensors")
    assert result.code == 3 and "blocks.1.attn.to_q.weight" in result.err and "100" in result.err
    kept = cli("quantize", "model.safetensors", "--nonfinite", "keep", "-o", "kept", "--json").json
    assert [layer["name"] for layer in kept["layers"]] == ["blocks.0.attn.to_q.weight"]
    zeroed = cli("quantize", "model.safetensors", "--nonfinite", "zero", "-o", "zeroed")
    assert zeroed.code == 0 and "1 warning" in zeroed.out


def test_a_budget_that_cannot_be_met_is_exit_5(cli, model, tmp_path):
    result = cli("quantize", model.name, "--target-model-size-mb", "0.001")
    assert result.code == 5 and "the smallest size" in result.err and names(tmp_path) == ["model.safetensors"]


def test_fail_fast_and_the_ladder(cli, model):
    result = cli("quantize", model.name, "--bits", "2", "--min-accuracy", "0.99", "--fail-fast", "-o", "out")
    assert result.code == 4 and "blocks." in result.err
    report = cli("quantize", model.name, "--bits", "2", "--min-accuracy", "0.99", "-o", "out", "--json").json
    assert {layer["bits"] for layer in report["layers"]} == {4} and report["summary"]["fallbacks"] == {"int4": 4}


def test_ST16_names_cannot_drive_the_terminal(cli, tmp_path):
    name = "evil\x1b[2J\u202e.weight"
    write_safetensors(tmp_path / "model.safetensors", {name: ("F32", [64, 64], floats(4096))}, {"modality": "image"})
    for words in (["inspect"], ["quantize", "-v", "--min-accuracy", "0.99999"], ["inspect", "-v"]):
        result = cli(*words, "model.safetensors")
        assert result.code == 0 and "\x1b" not in result.out + result.err and "\u202e" not in result.out + result.err
        assert "evil\\x1b[2J" in result.out + result.err
    assert cli("inspect", "model.safetensors", "--json").json["tensors"][0]["name"] == name
