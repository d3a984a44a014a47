"""Sensitive layers by score, and settings that change nothing."""

import warnings

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import SAMPLE, write_safetensors

NAMES = [f"blocks.{i}.fc.weight" for i in range(4)]
OPTIONS = {"modality": "image", "min_accuracy": 0.0, "overwrite": True}


@pytest.fixture
def model(tmp_path):
    """Four layers: by its weights blocks.0 is the most sensitive (outliers)."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((96, 128), np.float32) for name in NAMES}
    weights[NAMES[0]][:, ::32] *= 30
    return write_safetensors(tmp_path / "model.safetensors", weights)


@pytest.fixture
def calibration(tmp_path):
    """By the errors of outputs blocks.1 is (inputs with one large channel), by gradients blocks.2."""

    def make(gradients):
        c, rng = aq.Calibration(groups=1), np.random.default_rng(1)
        for i, name in enumerate(NAMES):
            x = rng.standard_normal((256, 128)).astype(np.float32)
            if i == 1:
                x += 20 * np.sign(np.random.default_rng(0).standard_normal((4, 96, 128))[1].mean(0)) * rng.standard_normal((256, 1))
            layer = c.add_layer(name, 128)
            c.update(layer, x.astype(np.float32))
            if gradients:
                c.add_gradient(layer, np.full((96, 128), 1e4 if i == 2 else 1.0, np.float32))
        path = tmp_path / f"c{gradients}.aqcal"
        c.save(path, overwrite=True)
        return path

    return make


def kept(report):
    return {t["name"]: t["reason"] for t in report["kept"]}


def most_sensitive(model, **settings):
    """The layer that the planner scores 1."""
    return next(name for name, layer in aq.plan(model, **OPTIONS_OF_PLAN, **settings).layers.items() if layer.sensitivity == 1)


OPTIONS_OF_PLAN = {name: value for name, value in OPTIONS.items() if name != "overwrite"}


def test_layers_of_a_high_score_are_kept_and_the_report_says_why(model, tmp_path):
    r = aq.quantize(model, tmp_path / "out", sensitive_layer_score=1.0, **OPTIONS)
    assert kept(r.report) == {NAMES[0]: "sensitive: score 1.00 by variance"}
    assert list(r.layers) == NAMES[1:]
    with aq.open(tmp_path / "out") as c:
        assert c[NAMES[0]].bits == 16 or c[NAMES[0]].dequantize().dtype == np.float32
    assert not kept(aq.quantize(model, tmp_path / "out", **OPTIONS).report)
    assert len(kept(aq.quantize(model, tmp_path / "out", sensitive_layer_score=0.0, **OPTIONS).report)) == 4


def test_the_score_is_by_the_best_that_the_calibration_knows(model, calibration, tmp_path):
    for gradients, method in ((False, "hessian"), (True, "gradient")):
        calib = calibration(gradients)
        r = aq.quantize(model, tmp_path / "out", calib=calib, sensitive_layer_score=1.0, **OPTIONS)
        assert kept(r.report) == {most_sensitive(model, calib=calib, sensitivity=method): f"sensitive: score 1.00 by {method}"}
    r = aq.quantize(model, tmp_path / "out", calib=calib, sensitive_layer_score=1.0, sensitivity_method="variance", **OPTIONS)
    assert kept(r.report) == {NAMES[0]: "sensitive: score 1.00 by variance"}
    assert most_sensitive(model, calib=calib, sensitivity="gradient") == NAMES[2]
    with pytest.raises(aq.ConfigurationError, match='"gradient" needs gradients'):
        aq.quantize(model, tmp_path / "out", sensitive_layer_score=0.5, sensitivity_method="gradient", **OPTIONS)


def test_what_is_said_of_one_layer_goes_before_its_score(model, tmp_path):
    r = aq.quantize(model, tmp_path / "out", sensitive_layer_score=1.0, layer_overrides=["blocks.0.*=bits:8"], **OPTIONS)
    assert r.layers[NAMES[0]].bits == 8 and NAMES[0] not in kept(r.report)


def test_a_budget_leaves_sensitive_layers_as_they_are(model, tmp_path):
    budget = {"sensitive_layer_score": 1.0, "target_size": "90KB"}
    plan = aq.plan(model, **OPTIONS_OF_PLAN, **budget)
    assert [plan.layers[name].bits == 16 for name in NAMES] == [True, False, False, False]
    r = aq.quantize(model, tmp_path / "out", **budget, **OPTIONS)
    assert kept(r.report) == {NAMES[0]: "sensitive: score 1.00 by variance"} and r.size <= 90_000
    plan.save(tmp_path / "plan.json")
    assert list(kept(aq.quantize(model, tmp_path / "out", plan_path=tmp_path / "plan.json", **OPTIONS).report)) == [NAMES[0]]
    assert aq.plan(model, **OPTIONS_OF_PLAN, target_size="90KB").layers[NAMES[0]].bits < 16


def test_a_plan_finds_the_statistics_in_the_models_folder_as_a_run_does(model, calibration, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    model.rename(folder / model.name)
    (folder / "metadata.json").write_text('{"modality": "image"}')
    assert aq.plan(folder).summary["weighting"] == "size"
    calibration(True).rename(folder / "calibration.aqcal")
    assert aq.plan(folder).summary["weighting"] == "gradient"
    assert aq.quantize(folder, tmp_path / "out", min_accuracy=0.0).report["summary"]["calibrated"]


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_scores_lie_between_0_and_1(value):
    with pytest.raises(aq.ConfigurationError, match=r"Invalid sensitive_layer_score: -?\d\.1\. Must be between 0\.0 and 1\.0"):
        aq.DiffusionQuantConfig.from_dict({"sensitive_layer_score": value}).validate()


# ---- settings that change nothing ----

IDLE = {"markov_weight": 0.5, "entropy_weight": 0.5, "learning_rate": 0.5, "max_iterations": 5, "convergence_threshold": 0.5}
IDLE |= {"calibration_samples": 5, "beta_schedule": "cosine"}


@pytest.mark.parametrize("name", IDLE)
def test_a_setting_that_changes_nothing_says_so_once(name, model, tmp_path):
    plain = aq.quantize(model, tmp_path / "plain", **OPTIONS)
    r = aq.quantize(model, tmp_path / "set", **{name: IDLE[name]}, **OPTIONS)
    told = [w for w in r.warnings if w.startswith(f"{name}: set, and changes nothing: ")]
    assert len(told) == 1 and len(r.warnings) == len(plain.warnings) + 1
    codes = [aq.open(tmp_path / folder)[NAMES[1]].codes for folder in ("plain", "set")]
    np.testing.assert_array_equal(*codes)


def test_several_are_told_in_one_sentence_and_profiles_in_none(model, tmp_path):
    r = aq.quantize(model, tmp_path / "out", **IDLE, **OPTIONS)
    told = [w for w in r.warnings if "changes nothing" in w]
    assert [w.split(":")[0] for w in told] == [
        "markov_weight, entropy_weight, learning_rate, max_iterations, convergence_threshold",
        "beta_schedule",
        "calibration_samples",
    ]
    for profile in ("edge", "local", "cloud"):
        r = aq.quantize(model, tmp_path / "out", profile=profile, **OPTIONS)
        assert not [w for w in r.warnings if "changes nothing" in w]


def test_num_samples_says_that_it_changes_nothing():
    with pytest.warns(RuntimeWarning, match="num_samples: set, and changes nothing"):
        some = aq.GranularityAllocator(aq.GranularityConfig("variance", num_samples=8)).allocate(SAMPLE, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert aq.GranularityAllocator(aq.GranularityConfig("variance")).allocate(SAMPLE, None).layer_group_sizes == some.layer_group_sizes
