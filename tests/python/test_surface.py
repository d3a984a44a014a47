"""The pieces of the fixed surface (python-api.md, section 7): their signatures, and what they say to wrong arguments."""

import inspect
import math
import pickle

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import SAMPLE, write_model

# ---- signatures ----

SIGNATURES = {
    "SpatialQuantizer": "(group_size=64)",
    "SpatialQuantizer.per_group_quantize": "(self, weights)",
    "SpatialQuantizer.channel_equalization": "(self, weights, activations)",
    "SpatialQuantizer.activation_smoothing": "(self, x, alpha=0.5)",
    "TimeAwareQuantizer": "(num_time_groups=10)",
    "TimeAwareQuantizer.group_timesteps": "(self, num_timesteps)",
    "TimeAwareQuantizer.compute_params_per_group": "(self, stats)",
    "TimeAwareQuantizer.quantize_layer": "(self, weights, params)",
    "GranularityConfig": "(sensitivity_method='gradient', num_samples=32, target_compression_ratio=10.0, min_accuracy=0.7, "
    "available_group_sizes=[32, 64, 128, 256], accuracy_weight=0.7)",
    "GranularityAllocator": "(config)",
    "GranularityAllocator.allocate": "(self, model_path, base_config, layer_names=None)",
    "GranularityAllocator.analyze_layer_sensitivity": "(self, model_path, layer_name, base_config)",
    "GranularityAllocator.recommend_group_size": "(self, score)",
    "GranularityAllocator.estimate_accuracy_impact": "(self, score, group_size)",
    "GranularityAllocator.estimate_compression_ratio": "(self, group_size, bit_width)",
    "LayerSensitivity": "(layer_name, sensitivity_score, recommended_group_size, accuracy_impact, compression_ratio)",
    "EvolutionarySearch": "(population_size=20, num_generations=10, mutation_rate=0.2, crossover_rate=0.7, elite_ratio=0.1, "
    "target_metric='cosine_similarity', max_evaluations=200, seed=0)",
    "EvolutionarySearch.search": "(self, model_path, output_path, base_config, layer_names=None, start=None)",
    "CalibrationLoader": "(max_samples=128, cache_dir=None)",
    "CalibrationLoader.load_from_file": "(self, path)",
    "CalibrationLoader.generate_synthetic_data": "(self, num_samples, sample_shape, num_timesteps)",
    "CalibrationLoader.clear_cache": "(self)",
    "ValidationSystem": "(min_accuracy=0.85, bit_width=None)",
    "ValidationSystem.cosine_similarity": "(self, a, b)",
    "ShardedSafeTensorsLoader.get_tensor": "(self, name)",
    "DiffusionQuantConfig.from_profile": "(profile)",
    "DiffusionQuantConfig.validate": "(self)",
    "DiffusionQuantConfig.from_yaml": "(path)",
    "DiffusionQuantConfig.to_yaml": "(self, path)",
    "DiffusionQuantConfig.from_dict": "(d)",
    "DiffusionQuantConfig.to_dict": "(self)",
    "DiffusionQuantConfig.apply_env_overrides": "(self)",
    "numpy_to_arrow_table": "(weights_dict)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_names_order_and_defaults_are_the_fixed_ones(name):
    thing = aq
    for part in name.split("."):
        thing = getattr(thing, part)
    signature = inspect.signature(thing)
    plain = [p.replace(annotation=p.empty, kind=p.POSITIONAL_OR_KEYWORD) for p in signature.parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)) == SIGNATURES[name]
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) or p.name == "self" for p in signature.parameters.values())


def test_an_allocation_has_its_five_fields_first():
    names = list(inspect.signature(aq.GranularityAllocation).parameters)
    assert names[:5] == ["layer_group_sizes", "layer_sensitivities", "estimated_accuracy", "estimated_compression_ratio", "analysis_time_s"]


# ---- wrong arguments ----


def allocator():
    return aq.GranularityAllocator(aq.GranularityConfig("variance"))


PARAMS = [{"scale": "x", "zero_point": 0.0, "group_size": 64, "time_range": (0, 10)}]
VALUES = np.ones(4, np.float32)
WRONG = [
    (lambda: aq.SpatialQuantizer(17), ValueError, "Invalid group size: 17. Must be 32, 64, 128, or 256"),
    (lambda: aq.SpatialQuantizer("64"), TypeError, "group size must be an int, not str"),
    (lambda: aq.TimeAwareQuantizer(True), TypeError, "num_time_groups must be an int, not bool"),
    (lambda: aq.TimeAwareQuantizer().group_timesteps(1.5), TypeError, "num_timesteps must be an int, not float"),
    (lambda: aq.TimeAwareQuantizer().compute_params_per_group(None), TypeError, "stats must be a list of dicts, a dict of arrays or a path, not NoneType"),
    (lambda: aq.TimeAwareQuantizer().quantize_layer(VALUES, PARAMS), TypeError, "scale of time group 0 must be a number, not 'x'"),
    (lambda: aq.ArrowQuantV2().quantize_layer_auto(VALUES, PARAMS), TypeError, "scale of time group 0 must be a number, not 'x'"),
    (lambda: aq.TimeAwareQuantizer().quantize_layer(VALUES, PARAMS[:0]), ValueError, "Params must hold at least one time group"),
    (lambda: aq.ArrowQuantV2().quantize({"a": [1.0, 1e300]}), ValueError, "Array for layer 'a' holds 1e+300, which float32 cannot hold"),
    (lambda: aq.GranularityAllocator(None), TypeError, "config must be a GranularityConfig, not NoneType"),
    (lambda: allocator().recommend_group_size(1.5), ValueError, "Invalid score: 1.5. Must be between 0.0 and 1.0"),
    (lambda: allocator().recommend_group_size(math.nan), ValueError, "Invalid score: nan. Must be between 0.0 and 1.0"),
    (lambda: allocator().estimate_accuracy_impact(0.5, 17), ValueError, "Invalid group size: 17. Must be 32, 64, 128, or 256"),
    (lambda: allocator().estimate_compression_ratio(17, 4), ValueError, "Invalid group size: 17. Must be 32, 64, 128, or 256"),
    (lambda: allocator().estimate_compression_ratio(64, 3), ValueError, "Invalid bit_width: 3. Must be 2, 4, or 8"),
    (lambda: allocator().allocate(SAMPLE, None, "blocks.0.linear.weight"), TypeError, "layer_names must be a list of str, not str"),
    (lambda: aq.EvolutionarySearch(seed="x"), aq.ConfigurationError, "Invalid seed: x. Must be at least 0"),
    (lambda: aq.CalibrationLoader(max_samples="x"), TypeError, "max_samples must be an int, not str"),
    (lambda: aq.CalibrationLoader().generate_synthetic_data("x", (3,), 10), TypeError, "num_samples must be an int, not str"),
    (lambda: aq.CalibrationLoader().generate_synthetic_data(32, (3,), 10.5), TypeError, "num_timesteps must be an int, not float"),
    (lambda: aq.gptq(np.ones((2, 3), np.float32), np.full((3, 3), np.nan)), ValueError, "the second moment of inputs 0 and 0 is not finite"),
]


@pytest.mark.parametrize(("call", "kind", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_arguments_are_named(call, kind, text):
    with pytest.raises(kind) as e:
        call()
    assert str(e.value) == text and type(e.value) is kind


def test_numpy_numbers_count_as_numbers():
    n, flag = np.int64(64), np.bool_(True)
    assert aq.SpatialQuantizer(n).group_size == 64 and aq.TimeAwareQuantizer(n).group_timesteps(n)[-1] == (63, 64)
    assert aq.CalibrationLoader(max_samples=n).max_samples == 64 and aq.EvolutionarySearch(n, n, max_evaluations=n, seed=n).seed == 64
    assert len(aq.CalibrationLoader().generate_synthetic_data(n, n, n)) == 64
    aq.GranularityConfig(num_samples=n, accuracy_weight=np.float32(0.5)).validate()
    config = aq.DiffusionQuantConfig(group_size=n, min_accuracy=np.float32(0.5), fail_fast=flag)
    assert (config.group_size, config.min_accuracy, config.fail_fast) == (64, 0.5, True)


def test_a_configuration_shows_numbers_as_numbers():
    nan = aq.DiffusionQuantConfig(min_accuracy=math.nan, learning_rate=math.inf)
    assert repr(nan) == "DiffusionQuantConfig(min_accuracy=nan, learning_rate=inf)"
    assert pickle.loads(pickle.dumps(nan)) == nan


# ---- sizes to begin with ----


def test_a_search_goes_over_all_layers_whatever_its_start_names(tmp_path):
    model = write_model(tmp_path / "m")
    still = aq.EvolutionarySearch(population_size=2, num_generations=0, mutation_rate=0, max_evaluations=1)
    best = still.search(model, None, aq.DiffusionQuantConfig(), None, {"blocks.1.linear": 32})["best"]
    assert best["layer_group_sizes"] == {"blocks.0.linear.weight": 256, "blocks.1.linear.weight": 32, "blocks.2.linear.weight": 256}
    for start, text in (
        ({"blocks.0.linear.weight": 17}, "Invalid group size of layer 'blocks.0.linear.weight' in start: 17. Must be 32, 64, 128, or 256"),
        ({"nothing.weight": 32}, "start names layers that are not searched: nothing"),
    ):
        with pytest.raises(aq.ConfigurationError) as e:
            still.search(model, None, None, None, start)
        assert str(e.value) == text
    with pytest.raises(TypeError, match="^start must be a dict of layers and group sizes, not list$"):
        still.search(model, None, None, None, [32])


# ---- results of models ----


def test_layers_that_all_stay_as_they_are_have_their_own_bits(tmp_path):
    config = aq.DiffusionQuantConfig(bit_width=2, min_accuracy=0.999999)
    config.fallback = [2]
    result = aq.ArrowQuantV2().quantize_diffusion_model(write_model(tmp_path / "m"), tmp_path / "out", config)
    assert result["bit_width"] == 32 and {layer["bits"] for layer in result["per_layer"].values()} == {32} and result["cosine_similarity"] is None


def test_the_smallest_size_that_an_impossible_budget_names_is_possible(tmp_path):
    model, config = write_model(tmp_path / "m"), aq.DiffusionQuantConfig()
    config.target_model_size_mb = 0.001
    with pytest.raises(aq.BudgetError) as e:
        aq.ArrowQuantV2().quantize_diffusion_model(model, tmp_path / "out", config)
    smallest = e.value.minimum
    assert str(e.value).startswith(
        f"the budget of 1048 bytes cannot be met: the smallest size that 3 layers can reach is {smallest} bytes; "
        "49152 weights at 2.00 bits are 12288 bytes before parameters. Hint: "
    )
    config.target_model_size_mb = smallest / 2**20
    result = aq.ArrowQuantV2().quantize_diffusion_model(model, tmp_path / "out", config)
    assert result["target_met"] is True and result["model_size_mb"] * 2**20 <= smallest
