"""plan: the table, the file, what quantize makes of it, an impossible budget, group sizes by sensitivity."""

import json
import resource

SIZE = "60KB"


def test_a_plan_is_shown_written_and_carried_out(cli, model, tmp_path):
    result = cli("plan", model.name, "--target-size", SIZE, "-o", "plan.json")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["tensor", "bits", "group", "params", "method", "size", "est.", "dB"]
    assert len([line for line in lines if line.startswith("blocks.")]) == 4
    assert any(line.startswith("plan: ") and " of 60.0 kB" in line for line in lines)
    assert lines[-2:] == ["wrote plan.json", "next: arrowquant quantize model.safetensors --plan plan.json"]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["schema"] == "arrowquant.plan/1"
    done = cli("quantize", model.name, "--plan", "plan.json", "-o", "out", "--json")
    assert done.code == 0, done.err
    assert done.json["output"]["size_bytes"] <= 60000
    for layer in done.json["layers"]:
        planned = plan["layers"][layer["name"]]
        assert {k: layer[k] for k in ("bits", "group_size", "params", "method")} == {k: planned[k] for k in ("bits", "group_size", "params", "method")}
    assert done.json["estimates"]["n_layers"] == len(done.json["layers"])
    assert done.json["estimates"]["mean_off_db"] < 0.2


def test_a_run_tells_how_far_the_estimates_were_off(cli, model):
    assert cli("plan", model.name, "--target-size", SIZE, "-o", "plan.json", "-q").out == ""
    result = cli("quantize", model.name, "--plan", "plan.json")
    assert "plan: estimated errors of 4 layers were off by " in result.out


def test_an_existing_plan_stays_without_overwrite(cli, model, tmp_path):
    (tmp_path / "plan.json").write_text("mine")
    result = cli("plan", model.name, "-o", "plan.json")
    assert result.code == 6 and "plan.json: exists already" in result.err
    assert result.out == ""  # nothing was planned for it
    assert (tmp_path / "plan.json").read_text() == "mine"
    assert cli("plan", model.name, "-o", "plan.json", "--overwrite").code == 0


def test_FA01_a_plan_that_cannot_be_written_is_shown_and_not_said_to_be_written(cli, model, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    before = sorted(tmp_path.iterdir())
    result = cli("plan", model.name, "--target-size", SIZE, "-o", "plan.json", preexec_fn=small_files, restore_signals=False)
    assert result.code == 6 and "error: plan.json: cannot write: " in result.err
    assert "plan: " in result.out and "wrote" not in result.out and "next" not in result.out
    assert sorted(tmp_path.iterdir()) == before


def test_FA04_the_folder_of_a_plan_is_missed_before_the_work(cli, model):
    result = cli("plan", model.name, "--target-size", SIZE, "-o", "nowhere/plan.json")
    assert (result.code, result.out) == (6, "") and "error: nowhere: the folder for the output does not exist" in result.err


def test_layers_that_a_plan_does_not_name_are_told(cli, model, tmp_path):
    assert cli("plan", model.name, "--target-size", SIZE, "-o", "plan.json", "-q").code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    (name, *_) = plan["layers"]
    del plan["layers"][name]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    result = cli("quantize", model.name, "--plan", "plan.json")
    assert result.code == 0 and f'the plan does not name 1 layer (the first is "{name}"): the settings choose for it' in result.err


def test_an_impossible_budget_is_5_with_the_smallest_size(cli, model):
    result = cli("plan", model.name, "--target-size", "10KB", "--json")
    assert result.code == 5
    message = result.json["error"]["message"]
    assert "the budget of 10000 bytes" in message
    smallest = int(message.split(" is ")[1].split()[0])
    assert cli("plan", model.name, "--target-size", f"{smallest - 1}B", "-q").code == 5
    assert cli("plan", model.name, "--target-size", f"{smallest}B", "-q").code == 0
    assert cli("quantize", model.name, "--target-size", "10KB").code == 5


def test_the_same_plan_with_and_without_a_cache_and_at_any_threads(cli, model, tmp_path):
    plain = cli("plan", model.name, "--target-size", SIZE, "--json", "--threads", "1").json
    cached = [cli("plan", model.name, "--target-size", SIZE, "--json", "--threads", "3", "--cache", "cache").json for _ in range(2)]
    assert plain == cached[0] == cached[1]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["measured.aqplan"]


def test_evolution_is_told_and_never_worse(cli, model):
    plain = cli("plan", model.name, "--target-size", SIZE, "--json").json
    result = cli("plan", model.name, "--target-size", SIZE, "--json", "--generations", "2", "--population", "6", "-v")
    assert "generation 2: best " in result.err
    assert result.json["summary"]["objective"] <= plain["summary"]["objective"]


def test_group_sizes_by_sensitivity(cli, model, tmp_path):
    options = ["--bits", "2", "--sensitivity", "variance", "--min-accuracy", "0.70", "--accuracy-weight", "0.7", "--target-compression", "10"]
    result = cli("plan", model.name, "-o", "allocation.json", *options)
    assert result.code == 0, result.err
    for text in ("average accuracy", "estimated; measured", "average compression", "group sizes:", "most sensitive layers:"):
        assert text in result.out
    saved = json.loads((tmp_path / "allocation.json").read_text())
    assert set(saved) == {"layers", "summary"} and saved["summary"]["num_layers"] == 4
    assert cli("quantize", model.name, "--bits", "2", "--plan", "allocation.json", "-o", "out").code == 0
    result = cli("plan", model.name, "--sensitivity", "gradient", "--target-compression", "10")
    assert result.code == 2 and "gradients=True" in result.err
