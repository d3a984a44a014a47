"""ShardedSafeTensorsLoader: names, shards, values of every type, laziness, errors."""

import json
import os
import threading

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import write_safetensors, write_sharded


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    shards = {
        "model-00002-of-00002.safetensors": {"a.weight": rng.standard_normal((3, 4)).astype(np.float32), "z": np.arange(6, dtype=np.int64).reshape(1, 2, 3)},
        "model-00001-of-00002.safetensors": {"c": np.float32(5.5).reshape(()), "b.weight": rng.standard_normal((2, 2)).astype(np.float16)},
    }
    write_sharded(tmp_path, shards)
    return tmp_path, {name: value for tensors in shards.values() for name, value in tensors.items()}


@pytest.mark.parametrize("as_folder", [True, False])
def test_names_shards_and_values(model, as_folder):
    folder, values = model
    loader = aq.load_sharded_safetensors(folder if as_folder else str(folder / "model.safetensors.index.json"))
    assert loader.tensor_names() == ["b.weight", "c", "a.weight", "z"]
    assert loader.shard_files() == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] and loader.num_shards() == 2
    assert loader.get_shard_for_tensor("z") == "model-00002-of-00002.safetensors" and loader.get_shard_for_tensor("nothing") is None
    for name, value in values.items():
        got = loader.get_tensor(name)
        assert got.dtype == np.float32 and got.shape == value.shape and np.array_equal(got, value.astype(np.float32))
    everything = loader.get_all_tensors()
    assert list(everything) == loader.tensor_names() and all(np.array_equal(everything[n], v.astype(np.float32)) for n, v in values.items())
    assert loader.get_total_size() == 3 * 4 * 4 + 6 * 8 + 4 + 2 * 2 * 2


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"])
def test_every_type_is_converted(tmp_path, dtype):
    value = (np.arange(-20, 20) if dtype not in ("uint8", "bool") else np.arange(40)).astype(dtype).reshape(5, 8)
    write_sharded(tmp_path, {"model-00001-of-00001.safetensors": {"t": value}})
    assert np.array_equal(aq.ShardedSafeTensorsLoader(tmp_path).get_tensor("t"), value.astype(np.float32))


def test_bfloat16_and_float8_are_converted(tmp_path):
    bf16 = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    bits = (bf16.view(np.uint32) >> 16).astype(np.uint16)
    write_sharded(
        tmp_path, {"m.safetensors": {"b": ("BF16", [2, 2], bits.tobytes()), "e": ("F8_E4M3", [2], bytes([0x38, 0xB8])), "f": ("F8_E5M2", [1], b"\x3c")}}
    )
    loader = aq.ShardedSafeTensorsLoader(tmp_path)
    assert np.array_equal(loader.get_tensor("b"), bf16.reshape(2, 2))
    assert loader.get_tensor("e").tolist() == [1.0, -1.0] and loader.get_tensor("f").tolist() == [1.0]


def test_ST09_a_tensor_of_another_type_is_an_error_for_that_tensor_only(tmp_path):
    write_sharded(tmp_path, {"m.safetensors": {"odd": ("C64", [1], bytes(8)), "good": [1.0, 2.0]}})
    loader = aq.ShardedSafeTensorsLoader(tmp_path)
    with pytest.raises(TypeError, match="tensor 'odd' is of type C64"):
        loader.get_tensor("odd")
    assert loader.get_tensor("good").tolist() == [1.0, 2.0]
    with pytest.warns(UserWarning, match=r"^Left out 1 of 2 tensors:\n.*tensor 'odd' is of type C64"):
        everything = loader.get_all_tensors()
    assert {name: a.tolist() for name, a in everything.items()} == {"good": [1.0, 2.0]}


def test_an_unknown_name_is_a_key_error(model):
    with pytest.raises(KeyError, match="nothing"):
        aq.ShardedSafeTensorsLoader(model[0]).get_tensor("nothing")


@pytest.mark.parametrize("kind", ["missing", "empty folder", "a weights file", "another json"])
def test_another_path_is_an_os_error_with_the_fixed_text(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "a weights file":
        write_safetensors(path, {"a": [1.0]})
    elif kind == "another json":
        path = tmp_path / "config.json"
        path.write_text("{}")
    with pytest.raises(OSError) as e:
        aq.ShardedSafeTensorsLoader(path)
    assert str(e.value) == "Path must be a .safetensors.index.json file or directory containing one"


def test_IX04_a_missing_shard_and_IX01_a_path_as_shard_are_refused(model):
    folder, _ = model
    os.remove(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(aq.FormatError, match="model-00001-of-00002.safetensors"):
        aq.ShardedSafeTensorsLoader(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(aq.FormatError, match="weight_map"):
        aq.ShardedSafeTensorsLoader(index)


def test_the_total_size_is_none_where_the_index_does_not_tell(tmp_path):
    write_sharded(tmp_path, {"m.safetensors": {"a": [1.0]}}, metadata=False)
    assert aq.ShardedSafeTensorsLoader(tmp_path).get_total_size() is None


def test_the_modality_is_told_or_none(model):
    folder, _ = model
    assert aq.ShardedSafeTensorsLoader(folder).detect_modality() is None
    write_sharded(folder, {"m.safetensors": {"a": [1.0]}})
    write_safetensors(folder / "m.safetensors", {"a": [1.0]}, {"modality": "audio"})
    assert aq.ShardedSafeTensorsLoader(folder).detect_modality() == "audio"


def test_the_cache_holds_what_it_says(model):
    loader = aq.ShardedSafeTensorsLoader(model[0])
    assert loader.cache_memory_usage() == 0
    first = loader.get_tensor("a.weight")
    assert loader.cache_memory_usage() == first.nbytes == 48 and loader.get_tensor("a.weight") is first
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    loader.clear_cache()
    assert loader.cache_memory_usage() == 0 and np.array_equal(loader.get_tensor("a.weight"), first)


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    from arrow_quant_v2 import loader as module

    monkeypatch.setattr(module, "CACHE_BYTES", 1000)
    write_sharded(tmp_path, {"m.safetensors": {f"t{i}": np.full((10, 10), i, np.float32) for i in range(10)}})
    loader = aq.ShardedSafeTensorsLoader(tmp_path)
    for i in range(10):
        assert loader.get_tensor(f"t{i}")[0, 0] == i and loader.cache_memory_usage() <= 1000


def test_arrays_outlive_the_loader(model):
    array = aq.ShardedSafeTensorsLoader(model[0]).get_tensor("a.weight")
    assert np.array_equal(array, model[1]["a.weight"])


def test_threads_may_share_a_loader(model):
    loader, wrong = aq.ShardedSafeTensorsLoader(model[0]), []

    def read():
        for _ in range(200):
            for name, value in model[1].items():
                if not np.array_equal(loader.get_tensor(name), value.astype(np.float32)):
                    wrong.append(name)
            loader.clear_cache()

    threads = [threading.Thread(target=read) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
