"""ValidationSystem: the library's metrics under a floor of the caller's own."""

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import SAMPLE, write_model


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("validation") / "int4"
    aq.quantize(SAMPLE, path, bits=4)
    return path


def test_cosines_of_arrays_are_the_librarys():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 5, 40)).astype(np.float32)
    expected = np.sum(a.astype(float) * b, axis=1) / np.sqrt(np.sum(a.astype(float) ** 2, axis=1) * np.sum(b.astype(float) ** 2, axis=1))
    v = aq.ValidationSystem()
    assert v.cosine_similarity_batch(a, b) == [v.cosine_similarity(x, y) for x, y in zip(a, b, strict=True)] == pytest.approx(list(expected), abs=1e-12)
    assert v.cosine_similarity(a, a) == pytest.approx(1) and v.cosine_similarity_batch([], []) == []


def test_a_zero_vector_has_cosine_zero():
    v = aq.ValidationSystem()
    assert v.cosine_similarity([0.0, 0.0], [1.0, 2.0]) == v.cosine_similarity([0.0], [0.0]) == 0.0


def test_lengths_that_differ_are_value_errors():
    v = aq.ValidationSystem()
    with pytest.raises(ValueError, match="Shape mismatch"):
        v.cosine_similarity([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="Lengths differ: 1 arrays and 2 arrays"):
        v.cosine_similarity_batch([[1.0]], [[1.0], [2.0]])


def test_a_model_is_held_to_this_objects_floor_and_width(quantized):
    plain = aq.ArrowQuantV2().validate_quality(SAMPLE, quantized)
    assert aq.ValidationSystem(min_accuracy=0.5, bit_width=4).validate_quality(SAMPLE, quantized) == plain and plain["passed"]
    strict = aq.ValidationSystem(min_accuracy=1.0).validate_quality(SAMPLE, quantized)
    assert not strict["passed"] and strict["problems"] and strict["per_layer_accuracy"] == plain["per_layer_accuracy"]
    other = aq.ValidationSystem(min_accuracy=0.5, bit_width=8).validate_quality(SAMPLE, quantized)
    assert not other["passed"] and f"{next(iter(plain['per_layer_accuracy']))} has 4 bits, expected 8" in other["problems"]
    with pytest.raises(aq.ModelNotFoundError):
        aq.ValidationSystem().validate_quality(SAMPLE, quantized / "nowhere")


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"min_accuracy": 1.5}, aq.ConfigurationError, "Invalid accuracy threshold: 1.5. Must be between 0.0 and 1.0"),
        ({"min_accuracy": float("nan")}, aq.ConfigurationError, "Invalid accuracy threshold: NaN. Must be between 0.0 and 1.0"),
        ({"bit_width": 3}, ValueError, "Invalid bit_width: 3. Must be 2, 4, or 8"),
        ({"bit_width": "4"}, TypeError, "bit_width must be an int, not str"),
    ],
)
def test_settings_out_of_range_are_refused(settings, kind, text):
    with pytest.raises(kind) as e:
        aq.ValidationSystem(**settings)
    assert str(e.value) == text


def test_what_was_not_measured_against_the_original_has_no_figure(tmp_path):
    aq.quantize(write_model(tmp_path / "m"), tmp_path / "q")
    check = aq.ArrowQuantV2().validate_quality(write_model(tmp_path / "other", rows=32), tmp_path / "q")
    assert check["per_layer_accuracy"] == {} and check["cosine_similarity"] is None and check["compression_ratio"] is None and not check["passed"]
    fewer = write_model(tmp_path / "fewer", n_layers=2)
    check = aq.ArrowQuantV2().validate_quality(fewer, tmp_path / "q")
    assert check["cosine_similarity"] == pytest.approx(sum(check["per_layer_accuracy"].values()) / 2, abs=1e-12) and len(check["problems"]) == 1
