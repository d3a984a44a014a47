"""Parquet model folders as the source of a run: V1, base V2 and our own, quantized like any other model, codes by the values that they stand for."""

import json

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import SAMPLE, tree_bytes, write_model

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
load_file = pytest.importorskip("safetensors.numpy").load_file
from legacy_models import write_row  # noqa: E402

RNG = np.random.default_rng(3)
WEIGHTS = {"blocks.0.linear.weight": RNG.standard_normal((64, 256)).astype(np.float32), "blocks.1/odd:name.weight": RNG.standard_normal((70, 130)).astype("f4")}
BIAS = {"blocks.0.linear.bias": np.linspace(-1, 1, 64, dtype=np.float32)}


def unquantized_row(name, a, quant_type="none"):
    return {"layer_name": name, "shape": list(a.shape), "dtype": "float32", "data": a.tobytes(), "num_params": a.size, "quant_type": quant_type}


def write_base_folder(folder, modality="image"):
    """One file per tensor, as writers of the base version name them."""
    folder.mkdir()
    if modality:
        (folder / "metadata.json").write_text(json.dumps({"modality": modality}))
    for i, (name, a) in enumerate({**WEIGHTS, **BIAS}.items()):
        file = "".join("_" if c in '/\\:*?"<>|.' else c for c in name) + ".parquet"
        write_row(folder / file, unquantized_row(name, a, ("none", "float32")[i % 2]))
    return folder


@pytest.mark.parametrize("entry", ["quantize_diffusion_model", "quantize_from_safetensors"])
def test_a_base_folder_gives_the_codes_of_the_same_safetensors(tmp_path, entry):
    result = getattr(aq.ArrowQuantV2(), entry)(write_base_folder(tmp_path / "p"), tmp_path / "out")
    assert result["modality"] == "image" and set(result["per_layer"]) == set(WEIGHTS) and result["bit_width"] == 4
    plain = aq.ArrowQuantV2().quantize_diffusion_model(write_model(tmp_path / "m", {**WEIGHTS, **BIAS}), tmp_path / "same")
    assert {k: v["cosine"] for k, v in result["per_layer"].items()} == {k: v["cosine"] for k, v in plain["per_layer"].items()}
    with aq.open(tmp_path / "out") as a, aq.open(tmp_path / "same") as b:
        assert set(a) == set(b) == {*WEIGHTS, *BIAS}
        for name in WEIGHTS:
            assert np.array_equal(a[name].codes, b[name].codes) and np.array_equal(a[name].scales, b[name].scales)
        assert np.array_equal(a["blocks.0.linear.bias"].dequantize(), BIAS["blocks.0.linear.bias"])
    assert aq.verify(tmp_path / "out", tmp_path / "p")["ok"]
    assert json.loads((tmp_path / "out" / "source_metadata.json").read_text()) == {"modality": "image"}


def test_the_modality_must_be_known_there_too(tmp_path):
    model = write_base_folder(tmp_path / "p", None)
    with pytest.raises(aq.MetadataError, match="the modality cannot be told"):
        aq.ArrowQuantV2().quantize_diffusion_model(model, tmp_path / "out")
    assert aq.ArrowQuantV2("base").quantize_diffusion_model(model, tmp_path / "out")["modality"] == "unknown"


def test_codes_are_read_as_the_values_they_stand_for(tmp_path):
    model = write_model(tmp_path / "m", {**WEIGHTS, **BIAS})
    aq.quantize(model, tmp_path / "eight", bits=8)
    r = aq.quantize(tmp_path / "eight", tmp_path / "four", bits=4, method="rtn", params="f32")
    assert any("2 tensors are quantized already" in w for w in r.warnings)
    with aq.open(tmp_path / "eight") as eight, aq.open(tmp_path / "four") as four:
        for name in WEIGHTS:
            again = aq.quantize_array(eight[name].dequantize(), 4, 128)
            assert four[name].codes.tobytes() == again["quantized_data"] and four[name].scales.ravel().tolist() == again["scales"]
    assert aq.verify(tmp_path / "four", tmp_path / "eight")["ok"]
    assert (tmp_path / "four" / "source_metadata.json").read_bytes() == (tmp_path / "eight" / "source_metadata.json").read_bytes()


def test_what_was_copied_with_a_container_goes_with_the_next(tmp_path):
    """The sample pipeline at 8 bits, from it at 4: exported, it is a diffusers folder like the source's."""
    aq.quantize(SAMPLE, tmp_path / "eight", bits=8, spatial=False)
    r = aq.quantize(tmp_path / "eight", tmp_path / "four", bits=4, spatial=False)
    assert {layer.bits for layer in r.layers.values()} == {4} and len(r.layers) == 42
    aq.export(tmp_path / "four", tmp_path / "plain")
    names = {str(p.relative_to(SAMPLE)) for p in SAMPLE.rglob("*") if p.is_file() and p.suffix == ".json"}
    assert names <= {str(p.relative_to(tmp_path / "plain")) for p in (tmp_path / "plain").rglob("*")}
    assert (tmp_path / "plain" / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    aq.quantize(tmp_path / "plain", tmp_path / "last", bits=4, spatial=False, min_accuracy=0.5)


def test_a_plan_is_made_of_it_too(tmp_path):
    model = write_base_folder(tmp_path / "p")
    plan = aq.plan(model, target_bpw=5)
    assert plan.feasible and set(plan.layers) == set(WEIGHTS)
    aq.quantize(model, tmp_path / "out", target_bpw=5)
    same = aq.plan(write_model(tmp_path / "m", {**WEIGHTS, **BIAS}), target_bpw=5)
    assert {k: v.bits for k, v in plan.layers.items()} == {k: v.bits for k, v in same.layers.items()}


def test_integers_and_other_types_are_kept_as_they_are(tmp_path):
    kept = {
        "ids": np.arange(7, dtype=np.int64),
        "half": np.linspace(-1, 1, 9).astype(np.float16),
        "double": np.linspace(0, 1, 5),
        "flag": np.array([True, False]),
    }
    aq.quantize(write_model(tmp_path / "m", {**WEIGHTS, **kept}), tmp_path / "one")
    aq.quantize(tmp_path / "one", tmp_path / "two")
    with aq.open(tmp_path / "one") as one, aq.open(tmp_path / "two") as two:
        assert all(one[name].dtype == two[name].dtype and not two[name].quantized for name in kept)
    aq.export(tmp_path / "two", tmp_path / "plain")
    back = load_file(next((tmp_path / "plain").glob("*.safetensors")))
    assert all(back[name].dtype == a.dtype and np.array_equal(back[name], a) for name, a in kept.items())


def test_rows_of_calibration_beside_safetensors_make_no_parquet_model(tmp_path):
    model = write_model(tmp_path / "m")
    pq.write_table(pa.Table.from_pylist([{"data": [1.0], "timestep": 1, "shape": [1]}]), model / "calibration.parquet")
    assert len(aq.quantize(model, tmp_path / "out").layers) == 3


def test_PQ01_a_damaged_source_is_refused_and_leaves_nothing(tmp_path):
    model = write_base_folder(tmp_path / "p")
    (path, *_) = sorted(model.glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(aq.FormatError):
        aq.ArrowQuantV2().quantize_diffusion_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ST18_a_source_that_changes_while_it_is_read_is_found(tmp_path):
    model = write_base_folder(tmp_path / "p")
    path = sorted(model.glob("*.parquet"))[0]

    def touch(progress):
        if progress.stage == "quantize":
            path.write_bytes(path.read_bytes() + b" ")

    with pytest.raises(aq.FormatError, match="changed during read"):
        aq.quantize(model, tmp_path / "out", progress=touch, restart=True)
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_touched_and_threads_change_nothing(tmp_path):
    model = write_base_folder(tmp_path / "p")
    before = tree_bytes(model)
    for threads in (1, 3):
        aq.quantize(model, tmp_path / str(threads), threads=threads)
    assert tree_bytes(model) == before and tree_bytes(tmp_path / "1") == tree_bytes(tmp_path / "3")
    with pytest.raises(aq.ConfigurationError, match="the output is the source model"):
        aq.quantize(model, model, overwrite=True)
