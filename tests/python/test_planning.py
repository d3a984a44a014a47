"""plan(), GranularityAllocator, EvolutionarySearch."""

import dataclasses
import inspect
import json
import math
import pickle
from pathlib import Path

import arrow_quant_v2 as aq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

DIT = Path(__file__).resolve().parents[2] / "examples/dit-fashion"
FAST = {"method": "rtn", "sample_values": 2048}


def test_a_plan_keeps_its_budget_and_uses_it():
    sizes = [3e6, 4e6, 6e6]
    plans = [aq.plan(DIT, target_size=size, **FAST) for size in sizes]
    for size, plan in zip(sizes, plans, strict=True):
        assert plan.feasible
        assert 0.97 * size <= plan.size <= size
    objectives = [plan.summary["objective"] for plan in plans]
    assert objectives == sorted(objectives, reverse=True)


@settings(max_examples=8, deadline=None)
@given(st.floats(min_value=2.4e6, max_value=1.2e7))
def test_more_room_never_makes_it_worse(size):
    small, large = (aq.plan(DIT, target_size=s, **FAST) for s in (size, 1.03 * size))
    assert large.summary["objective"] <= small.summary["objective"] * (1 + 1e-12)
    assert small.size <= size


def test_an_impossible_budget_names_the_smallest_size():
    with pytest.raises(aq.BudgetError) as caught:
        aq.plan(DIT, target_size="1MB", **FAST)
    assert caught.value.minimum > 1e6
    assert str(caught.value.minimum) in str(caught.value)
    assert aq.plan(DIT, target_size=caught.value.minimum + 8, **FAST).feasible


def test_a_plan_is_saved_and_shown(tmp_path):
    plan = aq.plan(DIT, target_size="4MB", **FAST)
    plan.save(tmp_path / "p.json")
    with pytest.raises(FileExistsError):
        plan.save(tmp_path / "p.json")
    plan.save(tmp_path / "p.json", overwrite=True)
    saved = json.loads((tmp_path / "p.json").read_text())
    assert saved["schema"] == "arrowquant.plan/1"
    assert saved["layers"].keys() == plan.layers.keys()
    lines = plan.table().splitlines()
    assert len(lines) == 1 + len(plan.layers)
    assert len({len(line.rstrip()) for line in lines}) == 1
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert "layers" not in repr(plan)


def test_weights_of_layers_may_be_given(tmp_path):
    name = "transformer_blocks.0.attn1.to_q.weight"
    weights = dict.fromkeys(aq.plan(DIT, **FAST).layers, 1.0) | {name: 1e6}
    plan = aq.plan(DIT, target_size="3MB", layer_weights=weights, **FAST)
    assert plan.summary["weighting"] == "given"
    assert plan.layers[name].error == min(layer.error for layer in plan.layers.values())
    (tmp_path / "w.json").write_text(json.dumps(weights))
    assert aq.plan(DIT, target_size="3MB", layer_weights=tmp_path / "w.json", **FAST).layers == plan.layers
    (tmp_path / "w.json").write_text('{"a": -1}')
    with pytest.raises(aq.FormatError, match="weight must be a number, not negative, found -1"):
        aq.plan(DIT, layer_weights=tmp_path / "w.json", **FAST)
    with pytest.raises(aq.ConfigurationError, match='the list of weights names "nothing", which is not in the model'):
        aq.plan(DIT, layer_weights={"nothing": 1}, **FAST)
    assert aq.plan(DIT, layer_weights={"nothing": 1}, allow_unmatched=True, **FAST)


def test_what_is_excluded_is_not_up_to_the_plan():
    """A name alone is a suggestion, which the planner may overrule; an order is not."""
    free, ordered = (aq.plan(DIT, target_size="4MB", exclude=patterns, **FAST).layers for patterns in ([], ["proj_out_*", "*.attn1.to_q.weight"]))
    assert {"proj_out_1.weight", "transformer_blocks.0.attn1.to_q.weight"} <= free.keys()
    assert free.keys() - ordered.keys() == {name for name in free if name.startswith("proj_out_") or name.endswith(".attn1.to_q.weight")}


def test_unknown_keywords_and_wrong_models():
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'target_siz'; did you mean 'target_size'"):
        aq.plan(DIT, target_siz="1MB")
    with pytest.raises(TypeError, match="fitness must be callable or None, not int"):
        aq.plan(DIT, generations=1, fitness=3, **FAST)
    with pytest.raises(aq.ModelNotFoundError):
        aq.plan("nowhere")


def test_evolution_by_a_fitness_of_the_caller(tmp_path):
    calls, told = [], []

    def fitness(layers):
        calls.append(layers)
        return sum(layer["error"] for layer in layers.values())

    options = dict(FAST, target_size="4MB", generations=3, population=5, fitness=fitness, on_generation=told.append)
    plan = aq.plan(DIT, **options)
    assert len({json.dumps(c, sort_keys=True) for c in calls}) == len(calls)
    assert plan.history == told
    best = [g["best_fitness"] for g in plan.history]
    assert best == sorted(best, reverse=True)
    assert best[-1] == sum(layer.error for layer in plan.layers.values()) == min(map(fitness, list(calls)))
    assert plan.size <= 4e6
    assert aq.plan(DIT, **options).layers == plan.layers
    # The state of a search that failed on the way is taken up.
    state = tmp_path / "state.json"
    budget = [6]

    def failing(layers):
        if budget[0] == 0:
            raise RuntimeError("the model cannot be run")
        budget[0] -= 1
        return fitness(layers)

    with pytest.raises(RuntimeError, match="cannot be run"):
        aq.plan(DIT, **(options | {"fitness": failing, "state_path": state}))
    budget[0] = -1
    assert aq.plan(DIT, **(options | {"fitness": failing, "state_path": state})).layers == plan.layers


# ---- group sizes ----


def allocator(**changes):
    return aq.GranularityAllocator(aq.GranularityConfig(**({"sensitivity_method": "variance"} | changes)))


def test_defaults_are_those_of_the_first_api():
    c = aq.GranularityConfig()
    assert dataclasses.astuple(c) == ("gradient", 32, 10.0, 0.70, [32, 64, 128, 256], 0.7)
    assert aq.GranularityConfig().available_group_sizes is not c.available_group_sizes
    assert inspect.signature(aq.GranularityConfig).parameters["available_group_sizes"].default == [32, 64, 128, 256]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sensitivity_method", "random"),
        ("num_samples", 0),
        ("target_compression_ratio", 0),
        ("target_compression_ratio", math.inf),
        ("min_accuracy", 1.1),
        ("min_accuracy", math.nan),
        ("accuracy_weight", -0.1),
        ("available_group_sizes", []),
        ("available_group_sizes", [17]),
    ],
)
def test_bad_settings_are_configuration_errors(field, value):
    with pytest.raises(aq.ConfigurationError, match=field.replace("sensitivity_method", "sensitivity method")):
        allocator(**{field: value})


def test_recommended_sizes():
    a = allocator()
    assert [a.recommend_group_size(s) for s in (1, 0.9, 0.75, 0.5, 0.25, 0.1, 0)] == [32, 32, 32, 64, 128, 256, 256]
    assert allocator(available_group_sizes=[128, 64]).recommend_group_size(0.9) == 64
    assert allocator(available_group_sizes=[128, 64]).recommend_group_size(0.1) == 128


@given(st.floats(0, 1), st.floats(0, 1), st.sets(st.sampled_from([32, 64, 128, 256]), min_size=1))
def test_recommendations_are_monotone_and_available(a, b, sizes):
    g = allocator(available_group_sizes=sorted(sizes))
    low, high = sorted((a, b))
    assert g.recommend_group_size(high) <= g.recommend_group_size(low)
    assert g.recommend_group_size(a) in sizes


def test_estimates():
    a = allocator()
    assert a.estimate_compression_ratio(256, 2) > 10
    assert a.estimate_compression_ratio(32, 8) < 5
    assert 5 <= a.estimate_compression_ratio(128, 4) <= 10
    assert a.estimate_compression_ratio(64, 4) == 32 / (4 + 64 / 64)
    impacts = [a.estimate_accuracy_impact(0.5, g) for g in (32, 64, 128, 256)]
    assert impacts == sorted(impacts)
    assert a.estimate_accuracy_impact(0.9, 64) > a.estimate_accuracy_impact(0.1, 64) >= 0


def test_allocation_of_all_layers():
    a = allocator().allocate(DIT, aq.DiffusionQuantConfig(bit_width=2))
    assert len(a.layer_group_sizes) == len(a.layer_sensitivities) == 42
    assert set(a.layer_group_sizes.values()) <= {32, 64, 128, 256}
    assert 0.7 <= a.estimated_accuracy <= 1
    assert a.estimated_compression_ratio > 10
    assert a.analysis_time_s > 0
    scores = {s.layer_name: s.sensitivity_score for s in a.layer_sensitivities}
    assert min(scores.values()) == 0
    assert max(scores.values()) == 1
    by_score = sorted(scores, key=scores.get)
    sizes = [a.layer_group_sizes[name] for name in by_score]
    assert sizes == sorted(sizes, reverse=True)
    summary = a.report["summary"]
    assert summary["estimate_error"] == pytest.approx(summary["avg_accuracy"] - summary["measured_accuracy"])
    assert allocator().allocate(DIT, aq.DiffusionQuantConfig(bit_width=2)).layer_group_sizes == a.layer_group_sizes


def test_allocation_of_named_layers():
    names = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.5.ff.net.2.weight"]
    a = allocator().allocate(DIT, aq.DiffusionQuantConfig(bit_width=2), names)
    assert sorted(a.layer_group_sizes) == sorted(n if n.endswith(".weight") else n + ".weight" for n in names)
    with pytest.raises(aq.ConfigurationError, match="nothing.weight"):
        allocator().allocate(DIT, None, ["nothing.weight"])


def test_an_unreachable_accuracy_is_an_error():
    with pytest.raises(aq.ValidationError, match="estimated accuracy"):
        allocator(min_accuracy=0.99).allocate(DIT, None)


def test_what_a_method_needs_is_said():
    for method in ("gradient", "hessian"):
        with pytest.raises(aq.ConfigurationError, match=f'"{method}" needs .*Recorder'):
            allocator(sensitivity_method=method).allocate(DIT, None)


def test_one_layer():
    a = allocator()
    s = a.analyze_layer_sensitivity(DIT, "transformer_blocks.0.attn1.to_q", None)
    assert s.layer_name == "transformer_blocks.0.attn1.to_q.weight"
    assert 0 <= s.sensitivity_score <= 1
    assert s.recommended_group_size == a.recommend_group_size(s.sensitivity_score)
    with pytest.raises(aq.ConfigurationError, match="did you mean"):
        a.analyze_layer_sensitivity(DIT, "transformer_blocks.0.attn1.to_x.weight", None)


def test_an_allocation_is_saved(tmp_path):
    allocator().allocate(DIT, aq.DiffusionQuantConfig(bit_width=2)).save(tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert {"num_layers", "avg_accuracy", "avg_compression", "min_accuracy", "target_compression", "accuracy_weight", "bit_width"} <= saved["summary"].keys()
    for layer in saved["layers"].values():
        assert {"sensitivity", "group_size", "estimated_accuracy", "estimated_compression"} <= layer.keys()


# ---- evolution of group sizes ----

TWO_BITS = {"bit_width": 2, "min_accuracy": 0.0}


def test_search_is_never_worse_than_its_start_and_repeatable():
    names = ["transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.1.attn1.to_q.weight", "transformer_blocks.2.ff.net.2.weight"]
    start = dict(zip(names, (128, 64, 32), strict=True))
    search = aq.EvolutionarySearch(population_size=6, num_generations=4, target_metric="balanced", seed=3)
    config = aq.DiffusionQuantConfig(**TWO_BITS)
    still = aq.EvolutionarySearch(population_size=2, num_generations=0, mutation_rate=0, max_evaluations=1, target_metric="balanced")
    first = still.search(DIT, None, config, names, start)
    found = search.search(DIT, None, config, names, start)
    assert found == search.search(DIT, None, config, names, start)
    assert first["best"]["layer_group_sizes"] == start
    assert found["best"]["fitness"] >= first["best"]["fitness"]
    history = [g["best_fitness"] for g in found["generation_history"]]
    assert history == sorted(history)
    assert history[-1] == found["best"]["fitness"]
    assert all(g["worst_fitness"] <= g["avg_fitness"] <= g["best_fitness"] for g in found["generation_history"])
    assert 0 < found["total_evaluations"] <= 200


def test_metrics_are_measured(tmp_path):
    config = aq.DiffusionQuantConfig(bit_width=4)
    search = aq.EvolutionarySearch(population_size=4, num_generations=1)
    best = search.search(DIT, tmp_path / "out", config)["best"]
    assert best["fitness"] == best["metrics"]["cosine_similarity"]
    assert set(best["layer_group_sizes"].values()) == {32}
    with aq.open(tmp_path / "out") as container:
        written = container["transformer_blocks.0.ff.net.2.weight"]
        assert written.group_size == 32
    smallest = aq.EvolutionarySearch(population_size=4, num_generations=1, target_metric="compression_ratio").search(DIT, None, config)
    assert smallest["best"]["fitness"] == smallest["best"]["metrics"]["compression_ratio"] > best["metrics"]["compression_ratio"]


@pytest.mark.parametrize(
    "bad",
    [{"population_size": 1}, {"num_generations": -1}, {"mutation_rate": 2}, {"crossover_rate": math.nan}, {"elite_ratio": -1}, {"max_evaluations": 0}],
)
def test_bad_search_settings(bad):
    with pytest.raises(aq.ConfigurationError, match=next(iter(bad))):
        aq.EvolutionarySearch(**bad)
    with pytest.raises(aq.ConfigurationError, match="target_metric"):
        aq.EvolutionarySearch(target_metric="beauty")
