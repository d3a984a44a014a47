"""DiffusionQuantConfig: signature, attributes, checks with their whole texts, sources, and every round trip."""

import copy
import gc
import inspect
import json
import os
import pickle
import string

import arrow_quant_v2 as aq
import numpy as np
import pytest
from arrow_quant_v2 import ConfigurationError, DiffusionQuantConfig
from hypothesis import given, settings
from hypothesis import strategies as st

PARAMETERS = {
    "bit_width": 4,
    "modality": None,
    "num_time_groups": 10,
    "group_size": 128,
    "enable_time_aware": True,
    "enable_spatial": True,
    "min_accuracy": 0.85,
    "calibration_samples": 128,
    "deployment_profile": "local",
    "fail_fast": False,
    "enable_entropy_adaptation": True,
    "enable_transition_optimization": False,
    "markov_weight": 0.1,
    "entropy_weight": 0.05,
    "learning_rate": 0.01,
    "max_iterations": 50,
    "convergence_threshold": 1e-4,
    "beta_schedule": "linear",
    "num_threads": 0,
    "enable_streaming": True,
    "enable_memory_aware_scheduling": True,
    "max_memory_limit_mb": None,
    "enable_mixed_precision": False,
    "skip_sensitive_layers": False,
    "enable_simd": True,
    "simd_threshold": 128,
}
ATTRIBUTES = {
    "sensitive_layer_names": [],
    "sensitive_layer_patterns": [],
    "layer_bit_widths": {},
    "target_model_size_mb": None,
    "calibration_path": None,
    "seed": 0,
    "smoothness_threshold": 0.3,
    "smoothing_window": 5,
    "smoothing_interpolation": "linear",
}


def raises_exactly(error, text, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    assert str(caught.value) == text


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("ARROW_QUANT_"):
            monkeypatch.delenv(name)


# ---- construction ----


def test_signature_and_defaults_are_the_documented_ones():
    signature = inspect.signature(DiffusionQuantConfig)
    assert {name: p.default for name, p in signature.parameters.items()} == PARAMETERS
    assert list(signature.parameters) == list(PARAMETERS)
    config = DiffusionQuantConfig()
    for name, default in {**PARAMETERS, **ATTRIBUTES}.items():
        assert getattr(config, name) == default
        assert isinstance(getattr(config, name), type(default)) and type(config.to_dict()[name]) is type(default)


def test_parameters_by_position_and_by_name():
    values = [8, "image", 3, 64, False, False, 0.5, 7, "edge"]
    config = DiffusionQuantConfig(*values, fail_fast=True)
    assert [getattr(config, name) for name in list(PARAMETERS)[:9]] == values
    assert config.fail_fast is True
    assert config == DiffusionQuantConfig(**dict(zip(PARAMETERS, values, strict=False)), fail_fast=True)
    assert DiffusionQuantConfig(*PARAMETERS.values()) == DiffusionQuantConfig(**PARAMETERS) == DiffusionQuantConfig()


def test_wrong_arguments():
    raises_exactly(
        TypeError,
        "DiffusionQuantConfig() got an unexpected keyword argument 'bitwidth'. Did you mean 'bit_width'?",
        DiffusionQuantConfig,
        bitwidth=4,
    )
    raises_exactly(TypeError, "DiffusionQuantConfig() got an unexpected keyword argument 'zzz'", DiffusionQuantConfig, zzz=4)
    raises_exactly(
        TypeError,
        "DiffusionQuantConfig() got an unexpected keyword argument 'seed', which is set as an attribute",
        DiffusionQuantConfig,
        seed=4,
    )
    raises_exactly(TypeError, "DiffusionQuantConfig() got multiple values for argument 'bit_width'", DiffusionQuantConfig, 4, bit_width=4)
    raises_exactly(TypeError, "DiffusionQuantConfig() takes at most 26 arguments (27 given)", DiffusionQuantConfig, *PARAMETERS.values(), 1)


@pytest.mark.parametrize(
    "name, text",
    [
        ("modality", "Invalid modality. Must be 'text', 'code', 'image', or 'audio'"),
        ("deployment_profile", "Invalid deployment profile. Must be 'edge', 'local', or 'cloud'"),
        ("beta_schedule", "Invalid beta_schedule. Must be 'linear' or 'cosine'"),
    ],
)
@pytest.mark.parametrize("word", ["video", "", "Text", "EDGE", "linear ", "'text'"])
def test_unknown_words_are_value_errors_at_once(name, text, word):
    raises_exactly(ValueError, text, DiffusionQuantConfig, **{name: word})
    raises_exactly(ValueError, text, setattr, DiffusionQuantConfig(), name, word)


def test_numbers_are_checked_by_validate_only():
    config = DiffusionQuantConfig(bit_width=3)
    assert config.bit_width == 3
    raises_exactly(ConfigurationError, "Invalid bit width: 3. Must be 2, 4, or 8", config.validate)
    config.bit_width = 2
    assert config.validate() is None


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("bit_width", 0, "Invalid bit width: 0. Must be 2, 4, or 8"),
        ("bit_width", -4, "Invalid bit width: -4. Must be 2, 4, or 8"),
        ("group_size", 17, 'Invalid group size: 17. Must be 32, 64, 128, or 256. Hint: "row" makes each whole row one group'),
        ("group_size", 0, 'Invalid group size: 0. Must be 32, 64, 128, or 256. Hint: "row" makes each whole row one group'),
        ("num_time_groups", 0, "Invalid number of time groups: 0. Must be between 1 and 100"),
        ("num_time_groups", 101, "Invalid number of time groups: 101. Must be between 1 and 100"),
        ("min_accuracy", 1.5, "Invalid accuracy threshold: 1.5. Must be between 0.0 and 1.0"),
        ("min_accuracy", -1, "Invalid accuracy threshold: -1.0. Must be between 0.0 and 1.0"),
        ("min_accuracy", float("nan"), "Invalid accuracy threshold: NaN. Must be between 0.0 and 1.0"),
        ("calibration_samples", 0, "Invalid calibration_samples: 0. Must be at least 1"),
        ("markov_weight", float("inf"), "Invalid markov_weight: Infinity. Must be at least 0"),
        ("learning_rate", 0.0, "Invalid learning_rate: 0.0. Must be above 0 and at most 1"),
        ("max_memory_limit_mb", 0, "Invalid max_memory_limit_mb: 0. Must be at least 1"),
        ("smoothing_window", 21, "Invalid smoothing_window: 21. Must be between 1 and 20"),
        ("layer_bit_widths", {"a": 5}, 'Invalid bit width of layer "a" in layer_bit_widths: 5. Must be 2, 4, 8, or 16'),
        ("sensitive_layer_patterns", ["(a"], 'sensitive_layer_patterns: Invalid pattern "(a": a group is not closed, at byte 3'),
        ("sensitive_layer_patterns", [r"(a)\1"], 'sensitive_layer_patterns: Invalid pattern "(a)\\1": back-references are not allowed, at byte 5'),
        ("exclude", ["[a"], 'exclude: Invalid pattern "[a": a bracket is not closed'),
    ],
)
def test_validate_names_field_value_and_range(name, value, text):
    config = DiffusionQuantConfig()
    setattr(config, name, value)
    raises_exactly(ConfigurationError, text, config.validate)


def test_infinite_markov_weight_is_refused_and_reads_back():
    config = DiffusionQuantConfig(markov_weight=float("-inf"), entropy_weight=float("nan"))
    assert config.markov_weight == float("-inf")
    assert np.isnan(config.entropy_weight)


@pytest.mark.parametrize(
    "name, value, error, text",
    [
        ("bit_width", "four", TypeError, 'bit_width must be a whole number, found "four". Hint: valid: 2, 4, or 8'),
        ("bit_width", 4.0, TypeError, "bit_width must be a whole number, found 4.0. Hint: valid: 2, 4, or 8"),
        ("bit_width", True, TypeError, "bit_width must be a whole number, found true. Hint: valid: 2, 4, or 8"),
        ("bit_width", None, TypeError, "bit_width must be a whole number, found null. Hint: valid: 2, 4, or 8"),
        ("bit_width", 2**64, ValueError, "bit_width cannot be set: 18446744073709551616 does not fit 64 bits"),
        ("fail_fast", 1, TypeError, "fail_fast must be true or false, found 1. Hint: valid: true or false"),
        ("modality", 4, TypeError, "modality must be a word, found 4. Hint: valid: 'text', 'code', 'image', or 'audio', or null"),
        ("sensitive_layer_names", "a", TypeError, 'sensitive_layer_names must be a list of texts, found "a". Hint: valid: names'),
        ("layer_bit_widths", [8], TypeError, "layer_bit_widths must be a map of layer names to bits, found [8]. Hint: valid: names with 2, 4, 8, or 16"),
        ("layer_bit_widths", {1: 8}, TypeError, "layer_bit_widths cannot be set: names must be str, found 1"),
        ("exclude", [b"a"], TypeError, "exclude cannot be set: a value of type <class 'bytes'>"),
        ("exclude", [[[[[["a"]]]]]], TypeError, "exclude cannot be set: lists are nested too deeply"),
        ("calibration_path", b"a", TypeError, "calibration_path cannot be set: a value of type <class 'bytes'>"),
    ],
)
def test_values_of_another_type(name, value, error, text):
    config = DiffusionQuantConfig()
    raises_exactly(error, text, setattr, config, name, value)
    assert config == DiffusionQuantConfig()


def test_a_lone_surrogate_is_a_value_error():
    with pytest.raises(ValueError, match="calibration_path cannot be set"):
        DiffusionQuantConfig().calibration_path = "\ud800"


def test_numpy_values_paths_and_tuples_are_taken(tmp_path):
    config = DiffusionQuantConfig(bit_width=np.int64(8), min_accuracy=np.float32(0.5))
    config.sensitive_layer_names = ("a", "b")
    config.calibration_path = tmp_path / "calibration.jsonl"
    assert (config.bit_width, config.min_accuracy, config.sensitive_layer_names) == (8, 0.5, ["a", "b"])
    assert config.calibration_path == str(tmp_path / "calibration.jsonl")


# ---- attributes ----


def test_unknown_attributes_are_attribute_errors_with_a_suggestion():
    config = DiffusionQuantConfig()
    text = "'DiffusionQuantConfig' object has no attribute 'bitwidth'. Did you mean 'bit_width'?"
    raises_exactly(AttributeError, text, getattr, config, "bitwidth")
    raises_exactly(AttributeError, text, setattr, config, "bitwidth", 4)
    raises_exactly(AttributeError, "'DiffusionQuantConfig' object has no attribute 'zzz'", getattr, config, "zzz")
    assert not hasattr(config, "zzz")
    with pytest.raises(AttributeError):
        del config.bit_width


def test_every_setting_is_a_documented_property():
    for name in DiffusionQuantConfig().to_dict():
        prop = vars(DiffusionQuantConfig)[name]
        assert isinstance(prop, property)
        assert "Valid: " in prop.__doc__
        assert name in dir(DiffusionQuantConfig())


def test_lists_and_dicts_can_be_changed_in_place():
    config = DiffusionQuantConfig()
    names, widths = config.sensitive_layer_names, config.layer_bit_widths
    names.append("a")
    config.sensitive_layer_names += ["b"]
    names.append("c")
    assert names == config.sensitive_layer_names == ["a", "b", "c"] and names.pop(0) == "a"
    config.sensitive_layer_names[0] = "d"
    del config.sensitive_layer_names[1]
    assert config.sensitive_layer_names == ["d"] == config.to_dict()["sensitive_layer_names"]
    widths["x"] = 8
    config.layer_bit_widths.update(y=4)
    config.layer_bit_widths |= {"z": 2}
    assert widths.setdefault("x", 2) == 8 and widths == config.layer_bit_widths == {"x": 8, "y": 4, "z": 2}
    del config.layer_bit_widths["y"]
    assert config.layer_bit_widths == {"x": 8, "z": 2} and repr(config.layer_bit_widths) == "{'x': 8, 'z': 2}"
    assert isinstance(names, list) and isinstance(widths, dict) and json.dumps([names, widths])
    assert type(pickle.loads(pickle.dumps(names))) is list and type(copy.deepcopy(widths)) is dict


def test_a_change_in_place_is_checked_and_a_refused_one_changes_nothing():
    config = DiffusionQuantConfig()
    config.layer_bit_widths["x"] = 8
    widths, names = config.layer_bit_widths, config.sensitive_layer_names
    with pytest.raises(TypeError, match="layer_bit_widths"):
        widths["x"] = "many"
    with pytest.raises(TypeError, match="sensitive_layer_names"):
        names.append(3)
    assert widths == config.layer_bit_widths == {"x": 8} and names == config.sensitive_layer_names == []


def test_repr_leaves_out_what_a_profile_notes_for_itself():
    config = DiffusionQuantConfig.from_profile("edge")
    assert config.target_size_is_wish and "target_size_is_wish" not in repr(config) and "target_model_size_mb=35" in repr(config)


def test_a_subclass_may_have_attributes_of_its_own():
    class Mine(DiffusionQuantConfig):
        def __init__(self, extra, **kwargs):
            super().__init__(**kwargs)
            self.extra = extra

    mine = Mine("x", bit_width=8)
    assert (mine.extra, mine.bit_width) == ("x", 8)
    assert repr(mine) == "Mine(bit_width=8)"
    assert mine == DiffusionQuantConfig(bit_width=8)


# ---- profiles ----


@pytest.mark.parametrize(
    "profile, bits, groups, group, accuracy, samples, target, spatial",
    [
        ("edge", 2, 5, 256, 0.65, 32, 35, False),
        ("local", 4, 10, 128, 0.85, 128, 200, True),
        ("cloud", 8, 20, 64, 0.95, 512, 2000, True),
    ],
)
def test_profiles(profile, bits, groups, group, accuracy, samples, target, spatial):
    c = DiffusionQuantConfig.from_profile(profile)
    assert (c.bit_width, c.num_time_groups, c.group_size, c.min_accuracy) == (bits, groups, group, accuracy)
    assert (c.calibration_samples, c.target_model_size_mb, c.enable_spatial) == (samples, target, spatial)
    assert c.enable_time_aware and c.enable_streaming and c.target_size_is_wish
    assert c.deployment_profile == profile
    assert c.validate() is None
    c.target_model_size_mb = target
    assert c.target_size_is_wish is False


def test_the_constructor_takes_a_profile_as_a_label():
    config = DiffusionQuantConfig(deployment_profile="edge")
    assert config.deployment_profile == "edge"
    assert config.bit_width == 4


def test_unknown_profile():
    raises_exactly(ValueError, "Invalid deployment profile. Must be 'edge', 'local', or 'cloud'", DiffusionQuantConfig.from_profile, "mobile")


# ---- environment ----


def test_environment_overrides(monkeypatch):
    for name, value in {
        "BIT_WIDTH": "2",
        "NUM_TIME_GROUPS": "7",
        "GROUP_SIZE": "64",
        "MIN_ACCURACY": "0.25",
        "CALIBRATION_SAMPLES": "9",
        "FAIL_FAST": "1",
        "NUM_THREADS": "3",
        "ENABLE_STREAMING": "false",
        "ENABLE_MEMORY_AWARE": "0",
        "MAX_MEMORY_MB": "100",
        "SEED": "5",
    }.items():
        monkeypatch.setenv(f"ARROW_QUANT_{name}", value)
    c = DiffusionQuantConfig(learning_rate=0.5)
    assert c.apply_env_overrides() is None
    assert (c.bit_width, c.num_time_groups, c.group_size, c.min_accuracy, c.calibration_samples) == (2, 7, 64, 0.25, 9)
    assert (c.fail_fast, c.num_threads, c.enable_streaming, c.enable_memory_aware_scheduling) == (True, 3, False, False)
    assert (c.max_memory_limit_mb, c.seed, c.learning_rate) == (100, 5, 0.5)


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("BIT_WIDTH", "3", "ARROW_QUANT_BIT_WIDTH: Invalid bit width: 3. Must be 2, 4, or 8"),
        ("BIT_WIDTH", "", 'ARROW_QUANT_BIT_WIDTH: bit_width must be a whole number, found "". Hint: valid: 2, 4, or 8'),
        ("FAIL_FAST", "yes", 'ARROW_QUANT_FAIL_FAST: fail_fast must be true or false, found "yes". Hint: valid: true or false'),
        ("MODALITY", "video", "ARROW_QUANT_MODALITY: Invalid modality: 'video'. Must be 'text', 'code', 'image', or 'audio'"),
        ("MAX_MEMORY_MB", "1e3", "ARROW_QUANT_MAX_MEMORY_MB: max_memory_limit_mb must be a whole number, found 1000.0. Hint: valid: at least 1, or null"),
    ],
)
def test_a_bad_variable_is_named_and_changes_nothing(monkeypatch, name, value, text):
    monkeypatch.setenv("ARROW_QUANT_NUM_THREADS", "3")
    monkeypatch.setenv(f"ARROW_QUANT_{name}", value)
    config = DiffusionQuantConfig()
    raises_exactly(ConfigurationError, text, config.apply_env_overrides)
    assert config == DiffusionQuantConfig()


# ---- files and dicts ----


def test_yaml_errors_give_file_line_and_column(tmp_path):
    path = tmp_path / "c.yaml"
    for content, text in {
        "bit_width: 4\nbit_widht: 8\n": f'Failed to parse YAML: {path}:2:1: unknown key "bit_widht"; did you mean "bit_width"?',
        "bit_width: 3\n": f"Failed to parse YAML: {path}:1:12: Invalid bit width: 3. Must be 2, 4, or 8",
        "modality: video\n": f"Failed to parse YAML: {path}:1:11: Invalid modality: 'video'. Must be 'text', 'code', 'image', or 'audio'",
        "fail_fast: no\n": f'Failed to parse YAML: {path}:1:12: fail_fast must be true or false, found "no". Hint: valid: true or false',
        "a: &x 1\n": f'Failed to parse YAML: {path}:1:1: unknown key "a"',
        "exclude: &x [a]\n": f"Failed to parse YAML: {path}:1:10: anchors (&name) are not allowed",
        "{": f"Failed to parse YAML: {path}:2:1: did not find expected node content",
    }.items():
        path.write_text(content)
        raises_exactly(ConfigurationError, text, DiffusionQuantConfig.from_yaml, path)
    with pytest.raises(ConfigurationError) as caught:
        DiffusionQuantConfig.from_yaml(str(path))
    assert caught.value.file == str(path)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigurationError) as caught:
        DiffusionQuantConfig.from_yaml(path)
    assert str(caught.value).startswith(f"Failed to read config file: {path}: ")
    assert "No such file or directory" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        DiffusionQuantConfig().to_yaml(tmp_path / "none" / "c.yaml")


def test_a_profile_in_a_file_or_dict_is_applied_first(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("group_size: 64\ndeployment_profile: edge\nmodality: null\n")
    config = DiffusionQuantConfig.from_yaml(path=path)
    assert (config.bit_width, config.group_size, config.modality) == (2, 64, None)
    assert config == DiffusionQuantConfig.from_dict({"group_size": 64, "deployment_profile": "edge"})


def test_json_files_are_read(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"bit_width": 8, "layer_bit_widths": {"a": 16}}))
    config = DiffusionQuantConfig.from_yaml(path)
    assert (config.bit_width, config.layer_bit_widths) == (8, {"a": 16})


def test_from_dict_errors():
    raises_exactly(ConfigurationError, 'unknown key "bitwidth"; did you mean "bit_width"?', DiffusionQuantConfig.from_dict, {"bitwidth": 4})
    raises_exactly(TypeError, "names of settings must be str, found 1", DiffusionQuantConfig.from_dict, {1: 4})
    raises_exactly(ValueError, "Invalid deployment profile. Must be 'edge', 'local', or 'cloud'", DiffusionQuantConfig.from_dict, {"deployment_profile": "x"})
    raises_exactly(TypeError, "from_dict needs a dict, not <class 'int'>", DiffusionQuantConfig.from_dict, 4)


names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
valid_settings = st.fixed_dictionaries(
    {},
    optional={
        "bit_width": st.sampled_from([2, 4, 8]),
        "modality": st.sampled_from([None, "text", "code", "image", "audio"]),
        "group_size": st.sampled_from([32, 64, 128, 256, "row"]),
        "min_accuracy": st.floats(0, 1),
        "markov_weight": st.floats(0, allow_infinity=False, allow_nan=False),
        "convergence_threshold": st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False),
        "learning_rate": st.floats(0, 1, exclude_min=True),
        "calibration_samples": st.integers(1, 2**63 - 1),
        "max_memory_limit_mb": st.none() | st.integers(1, 2**63 - 1),
        "deployment_profile": st.sampled_from(["edge", "local", "cloud"]),
        "fail_fast": st.booleans(),
        "sensitive_layer_names": st.lists(names, max_size=4),
        "layer_bit_widths": st.dictionaries(names, st.sampled_from([2, 4, 8, 16]), max_size=4),
        "target_model_size_mb": st.none() | st.floats(1e-3, 1e12),
        "target_size_is_wish": st.booleans(),
        "calibration_path": st.none() | names,
        "exclude": st.lists(st.text(string.ascii_letters + "*?.", min_size=1), max_size=3),
        "fallback": st.sampled_from([[], [2], [4, 8], [2, 4, 8]]),
    },
)


@settings(deadline=None)  # files are synced; a busy disk takes its time
@given(valid_settings)
def test_every_way_out_and_back_gives_an_equal_configuration(tmp_path_factory, values):
    config = DiffusionQuantConfig.from_dict(values)
    assert config.validate() is None
    for name, value in values.items():
        assert getattr(config, name) == value
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    config.to_yaml(path)
    shuffled = dict(reversed(config.to_dict().items()))
    ways = {
        "yaml": DiffusionQuantConfig.from_yaml(path),
        "dict": DiffusionQuantConfig.from_dict(config.to_dict()),
        "shuffled": DiffusionQuantConfig.from_dict(shuffled),
        "json": DiffusionQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        "pickle": pickle.loads(pickle.dumps(config)),
        "copy": copy.copy(config),
        "deepcopy": copy.deepcopy(config),
    }
    for way, back in ways.items():
        assert back == config, way
        assert back is not config


@settings(deadline=None)
@given(st.one_of(finite, st.floats()))
def test_floats_keep_every_bit(x):
    config = DiffusionQuantConfig(markov_weight=x)
    assert repr(config.markov_weight) == repr(x)


# ---- the object ----


def test_repr_shows_what_differs_and_builds_the_same():
    assert repr(DiffusionQuantConfig()) == "DiffusionQuantConfig()"
    config = DiffusionQuantConfig(bit_width=2, modality="image", min_accuracy=0.1, enable_simd=False)
    assert repr(config) == "DiffusionQuantConfig(bit_width=2, modality='image', min_accuracy=0.1, enable_simd=False)"
    assert eval(repr(config)) == config


def test_equality_and_hash():
    a, b = DiffusionQuantConfig(), DiffusionQuantConfig()
    assert a == b and not a != b
    b.seed = 1
    assert a != b and not a == b
    assert a != 4 and not a == None  # noqa: E711
    with pytest.raises(TypeError):
        hash(a)
    with pytest.raises(TypeError):
        a < b  # noqa: B015


def test_copies_are_independent():
    a = DiffusionQuantConfig()
    b = copy.copy(a)
    b.bit_width = 8
    assert a.bit_width == 4


def test_configurations_come_and_go_without_a_leak():
    def objects():
        gc.collect()
        return len(gc.get_objects())

    def use():
        c = DiffusionQuantConfig(bit_width=8)
        c.layer_bit_widths = {"a": 8}
        c.to_dict(), repr(c), pickle.loads(pickle.dumps(c)), c == c
        for wrong in (lambda: setattr(c, "bit_width", "x"), lambda: c.nonsuch, lambda: DiffusionQuantConfig(nonsuch=1)):
            with pytest.raises((TypeError, AttributeError)):
                wrong()

    use()
    before = objects()
    for _ in range(50):
        use()
    assert objects() - before < 20


def test_the_class_is_part_of_the_module():
    assert DiffusionQuantConfig.__module__ == "arrow_quant_v2"
    assert aq.DiffusionQuantConfig is DiffusionQuantConfig
