"""Data sets, and the CalibrationLoader with its cache."""

import json
import sys

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FASHION = ROOT / "examples" / "fashion-calib.npz"


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def shown(samples):
    return [(s.kind, s.line, s.text if s.values is None else s.values.tolist(), s.timestep, s.label) for s in samples]


# ---- kinds ----


def test_labels_stay_with_their_samples_when_one_is_left_out(tmp_path):
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    values[1, 0] = np.nan
    np.savez(tmp_path / "a.npz", data=values, labels=np.arange(10, 15))
    with pytest.warns(RuntimeWarning, match="left out 1 bad lines"):
        samples = list(aq.DataSet(tmp_path / "a.npz", on_bad="skip"))
    assert [(s.line, s.label, s.values.tolist()) for s in samples] == [(i + 1, 10 + i, values[i].tolist()) for i in (0, 2, 3, 4)]


def test_grey_images_of_16_bits_keep_their_brightness(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    image.fromarray(pixels).save(tmp_path / "a.png")
    for channels in (None, 1, 3):
        (sample,) = aq.DataSet(tmp_path, channels=channels, value_range=(0.0, 1.0))
        assert sample.values.shape == (channels or 1, 8, 8)
        np.testing.assert_allclose(sample.values[0], pixels / 65535, atol=0.5 / 255 + 1e-6)


def test_json_lines_hold_text_prompts_inputs_and_rows_with_timesteps(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"text": "In the beginning", "other": 1},
        {"prompt": "a cat"},
        {"input": [[1, 2], [3, 4]]},
        {"data": [1.5, -2, 3, 4], "timestep": 7, "shape": [2, 2]},
        {"data": [1], "timestep": None, "shape": None},
    )
    data = aq.DataSet(path)
    expected = [
        ("text", 1, "In the beginning", None, None),
        ("prompt", 2, "a cat", None, None),
        ("input", 3, [[1.0, 2.0], [3.0, 4.0]], None, None),
        ("data", 4, [[1.5, -2.0], [3.0, 4.0]], 7, None),
        ("data", 5, [1.0], None, None),
    ]
    assert shown(data) == expected and shown(data) == expected  # each iteration begins anew
    assert shown(data.take(2)) == expected[:2] and [s.integers for s in data] == [False, False, True, False, True]
    assert data.name == "a.jsonl" and len(data.sha256) == 64
    with pytest.raises(TypeError, match="only reading"):
        len(data)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30), max_size=6),
    ending=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_CA03_any_text_comes_back_with_either_line_end_and_without_a_last_one(tmp_path, texts, ending, last):
    path = tmp_path / "a.jsonl"
    path.write_bytes((ending.join(json.dumps({"text": t}) for t in texts) + (ending if last else "")).encode())
    assert [s.text for s in aq.DataSet(path)] == texts


BAD_LINES = [
    (b'{"text": "\xff\xfe"}', "UTF-8"),
    (b"{", "line 2"),
    (b"[1, 2]", "line 2"),
    (b'{"data": [1, NaN]}', "line 2"),
    (b'{"data": [1e999]}', "line 2"),
    (b'{"data": [1, 2], "shape": [3]}', "line 2"),
    (b'{"data": [1], "timestep": -5}', "line 2"),
    (b'{"words": "x"}', "line 2"),
    (b'{"input": [[1, 2], [3]]}', "line 2"),
    (b'{"text": ' + b"[" * 200 + b"]" * 200 + b"}", "line 2"),
    (b'{"text": "' + b"x" * (17 << 20) + b'"}', "line 2"),
]


@pytest.mark.parametrize("line, text", BAD_LINES, ids=range(len(BAD_LINES)))
def test_CA03_a_bad_line_is_refused_with_its_number_or_skipped_with_a_warning(tmp_path, line, text):
    path = write_lines(tmp_path / "a.jsonl", {"text": "good"}, line, {"text": "also good"})
    with pytest.raises(aq.FormatError, match="line 2") as error:
        list(aq.DataSet(path))
    assert text in str(error.value) and "a.jsonl" in str(error.value)
    with pytest.raises(aq.FormatError, match="line 2"):
        aq.DataSet(path).take(2)
    assert [s.text for s in aq.DataSet(path).take(1)] == ["good"]  # lines that are not needed are not read
    with pytest.warns(RuntimeWarning, match="left out 1 bad line"):
        assert [s.text for s in aq.DataSet(path, on_bad="skip")] == ["good", "also good"]


def test_CA03_every_bad_line_is_listed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *[{"text": "x"} if i % 3 else b"?" for i in range(9)])
    with pytest.raises(aq.FormatError) as error:
        list(aq.DataSet(path))
    assert all(f"line {n}" in str(error.value) for n in (1, 4, 7)) and "3 bad lines" in str(error.value)
    many = write_lines(tmp_path / "b.jsonl", *[b"?"] * 50)
    with pytest.raises(aq.FormatError) as error:
        list(aq.DataSet(many))
    assert str(error.value).count("\n") <= 21


def test_arrays_come_one_by_one_and_bytes_count_as_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 6), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(5))
    np.savez_compressed(tmp_path / "b.npz", x=pixels.astype(np.float32), other=np.zeros(3))
    np.save(tmp_path / "c.npy", np.stack([pixels] * 3, -1))
    a, b, c = aq.DataSet(tmp_path / "a.npz"), aq.DataSet(tmp_path / "b.npz"), aq.DataSet(tmp_path / "c.npy", channels=1)
    assert len(a) == len(b) == len(c) == 5
    np.testing.assert_allclose([s.values[0] for s in a], pixels / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose([s.values[0] for s in c], pixels / 127.5 - 1, atol=1e-6)
    assert [(s.kind, s.label) for s in a] == [("image", i) for i in range(5)]
    assert np.array_equal([s.values for s in b], pixels) and {s.kind for s in b} == {"input"}
    unit = aq.DataSet(tmp_path / "a.npz", value_range=(0, 1)).take(1)[0].values
    assert unit.min() >= 0 and unit.max() <= 1
    with pytest.raises(aq.FormatError):
        list(aq.DataSet(tmp_path / "a.npz", array="nothing"))


def test_images_are_cropped_scaled_and_labelled_by_their_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for folder, name, shape in (("cat", "1.png", (8, 12, 3)), ("cat", "2.jpg", (16, 8, 3)), ("ant", "3.png", (8, 8))):
        (tmp_path / folder).mkdir(exist_ok=True)
        image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / folder / name)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    samples = aq.DataSet(tmp_path, size=8, channels=3).take()
    assert [(s.values.shape, s.label) for s in samples] == [((3, 8, 8), 0), ((3, 8, 8), 1), ((3, 8, 8), 1)]
    exact = np.moveaxis(np.asarray(image.open(tmp_path / "cat" / "1.png"), np.float32)[:, 2:10], -1, 0) / 127.5 - 1  # the middle
    np.testing.assert_allclose(samples[1].values, exact, atol=1e-5)
    assert aq.DataSet(tmp_path).take()[0].values.shape == (1, 8, 8)
    assert aq.DataSet(tmp_path).sha256 == aq.DataSet(tmp_path).sha256
    before = aq.DataSet(tmp_path).sha256
    (tmp_path / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert aq.DataSet(tmp_path).sha256 != before
    with pytest.raises(aq.FormatError, match="line 2: 'cat/0.png' is no image"):
        aq.DataSet(tmp_path).take()
    with pytest.warns(RuntimeWarning, match="left out 1 bad line"):
        assert len(aq.DataSet(tmp_path, on_bad="skip").take()) == 3


def test_a_hugging_face_folder_is_read_by_pyarrow(tmp_path):
    pa = pytest.importorskip("pyarrow")
    image = pytest.importorskip("PIL.Image")
    import io

    def save(folder, table, files=2):
        folder.mkdir(parents=True)
        names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
        n = -(-len(table) // files)
        for i, name in enumerate(names):
            with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table.slice(i * n, n), max_chunksize=2)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
        (folder / "dataset_info.json").write_text("{}")

    texts = [f"text {i}" for i in range(7)]
    save(tmp_path / "plain", pa.table({"text": texts, "label": list(range(7))}))
    assert shown(aq.DataSet(tmp_path / "plain")) == [("text", i + 1, t, None, i) for i, t in enumerate(texts)]
    assert [s.text for s in aq.DataSet(tmp_path / "plain").take(3)] == texts[:3]

    save(tmp_path / "splits" / "train", pa.table({"caption": texts}))
    save(tmp_path / "splits" / "test", pa.table({"caption": ["only"]}), 1)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert [s.text for s in aq.DataSet(tmp_path / "splits", column="caption")] == texts
    assert [s.text for s in aq.DataSet(tmp_path / "splits", column="caption", split="test")] == ["only"]
    with pytest.raises(ValueError, match="has the splits test, train"):
        aq.DataSet(tmp_path / "splits", split="dev")
    with pytest.raises(aq.FormatError, match="say which with column="):
        list(aq.DataSet(tmp_path / "splits"))

    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, "PNG")
    save(tmp_path / "images", pa.table({"image": [{"bytes": buffer.getvalue(), "path": "/etc/passwd"}, {"bytes": None, "path": "/etc/passwd"}]}), 1)
    with pytest.warns(RuntimeWarning, match="line 2: its image is null"):
        samples = aq.DataSet(tmp_path / "images", on_bad="skip").take()
    np.testing.assert_allclose(samples[0].values, np.moveaxis(pixels, -1, 0) / 127.5 - 1, atol=1e-5)

    save(tmp_path / "rows", pa.table({"data": [[1.0, 2.0], None, [3.0], [float("nan")]], "timestep": [5, 5, None, 1], "shape": [[2], None, None, None]}), 1)
    with pytest.raises(aq.FormatError, match="(?s)line 2: its data is null.*line 4: value 0 is not finite"):
        aq.DataSet(tmp_path / "rows").take()

    for name in ("../plain/data-00000-of-00002.arrow", "..", "/etc/passwd", "missing.arrow", 5):
        (tmp_path / "rows" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(aq.FormatError, match="no plain file name|is missing"):
            aq.DataSet(tmp_path / "rows")
    (tmp_path / "rows" / "state.json").write_text("[]")
    with pytest.raises(aq.FormatError, match="_data_files"):
        aq.DataSet(tmp_path / "rows")
    (tmp_path / "plain" / "data-00000-of-00002.arrow").write_bytes(b"ARROW1 but no more")
    with pytest.raises(aq.FormatError, match="not a readable Arrow file"):
        list(aq.DataSet(tmp_path / "plain"))


def test_rows_of_arrow_and_parquet_files_are_those_of_json_lines(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "data": pa.array([[1.0, 2.0, 3.0, 4.0], [5.0]], pa.list_(pa.float32())),
            "timestep": pa.array([3, None], pa.int64()),
            "shape": pa.array([[2, 2], None], pa.list_(pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "calibration.parquet")
    with pa.OSFile(str(tmp_path / "calibration.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    write_lines(tmp_path / "calibration.jsonl", {"data": [1, 2, 3, 4], "timestep": 3, "shape": [2, 2]}, {"data": [5], "timestep": None, "shape": None})
    expected = [("data", 1, [[1.0, 2.0], [3.0, 4.0]], 3, None), ("data", 2, [5.0], None, None)]
    for suffix in ("jsonl", "parquet", "arrow"):  # of a model folder the first found
        assert aq.DataSet(tmp_path).path == str(tmp_path / f"calibration.{suffix}") and shown(aq.DataSet(tmp_path)) == expected
        assert shown(aq.DataSet(tmp_path / f"calibration.{suffix}")) == expected, suffix
        (tmp_path / f"calibration.{suffix}").unlink()


def test_parquet_columns_of_any_name_are_read_by_pyarrow(tmp_path):
    pa = pytest.importorskip("pyarrow")
    image = pytest.importorskip("PIL.Image")
    import io

    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    image.fromarray(np.full((4, 6), 255, np.uint8)).save(buffer, "PNG")
    pixels = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": buffer.getvalue()[:30], "path": None}, {"bytes": b"BM", "path": None}]
    pq.write_table(pa.table({"caption": ["a", "b", None], "image": pixels, "label": [7, 8, 9], "data": [[[1.0], [2.0]]] * 3}), tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    with pytest.raises(aq.FormatError, match="line 3: its caption is null"):
        list(aq.DataSet(path, column="caption"))
    assert [(s.text, s.label) for s in aq.DataSet(path, column="caption").take(2)] == [("a", 7), ("b", 8)]
    with pytest.raises(aq.FormatError, match="(?s)2 bad lines.*line 2: its image is no image.*line 3: its image is no image"):
        list(aq.DataSet(path, column="image"))
    assert aq.DataSet(path, column="image").take(1)[0].values.shape == (1, 4, 6)
    assert [s.values.shape for s in aq.DataSet(path, column="data")] == [(2, 1)] * 3
    with pytest.raises(aq.FormatError, match="has another type .*column= of arrow_quant_v2.DataSet"):
        list(aq.DataSet(path))
    with pytest.raises(aq.FormatError, match="there is no column 'text'; it has caption, data, image, label"):
        list(aq.DataSet(path, column="text"))
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(aq.FormatError, match="not a readable Parquet file"):
        list(aq.DataSet(tmp_path / "cut.parquet", column="caption"))
    with pytest.raises(ValueError, match="column= is for Parquet"):  # never ignored in silence
        aq.DataSet(write_lines(tmp_path / "a.jsonl", {"caption": "a"}), column="caption")


def test_a_hugging_face_folder_of_parquet_files_is_read_by_split(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def save(name, *texts):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": list(texts)}), tmp_path / name)

    save("hub/data/train-00001-of-00002.parquet", "c", None)
    save("hub/data/train-00000-of-00002.parquet", "a", "b")
    save("hub/data/test-00000-of-00001.parquet", "t")
    assert [s.text for s in aq.DataSet(tmp_path / "hub").take(3)] == ["a", "b", "c"]
    with pytest.raises(aq.FormatError, match="line 4: its text is null"):
        list(aq.DataSet(tmp_path / "hub"))
    assert [s.text for s in aq.DataSet(tmp_path / "hub", split="test")] == ["t"]
    with pytest.raises(ValueError, match="has the splits test, train"):
        aq.DataSet(tmp_path / "hub", split="dev")
    save("converted/train/0000.parquet", "a")
    save("converted/validation/0000.parquet", "v")
    assert [s.text for s in aq.DataSet(tmp_path / "converted")] == ["a"]
    assert [s.text for s in aq.DataSet(tmp_path / "converted", split="validation")] == ["v"]
    save("plain/part-0.parquet", "a")
    save("plain/part-1.parquet", "b")
    assert [s.text for s in aq.DataSet(tmp_path / "plain")] == ["a", "b"]


def test_what_is_no_data_set_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        aq.DataSet(tmp_path / "none.jsonl")
    with pytest.raises(aq.FormatError, match="neither a Hugging Face data set"):
        aq.DataSet(tmp_path)
    (tmp_path / "a.xyz").write_text("?")
    with pytest.raises(aq.FormatError):
        list(aq.DataSet(tmp_path / "a.xyz"))
    for wrong in ({"on_bad": "ignore"}, {"channels": 2}):
        with pytest.raises(ValueError, match="Must be"):
            aq.DataSet(FASHION, **wrong)
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.arrow").write_bytes(b"")
    for module, path, text in (("PIL", tmp_path, "pip install pillow"), ("pyarrow", tmp_path / "a.arrow", "pip install pyarrow")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=text):
            list(aq.DataSet(path))


# ---- CalibrationLoader ----


def test_rows_of_a_file_come_with_their_statistics_per_timestep(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"data": rng.standard_normal(6).round(3).tolist(), "timestep": [5, None, 900][i % 3], "shape": [2, 3]} for i in range(9)]
    data = aq.CalibrationLoader(max_samples=7).load_from_file(write_lines(tmp_path / "a.jsonl", *rows))
    assert len(data) == 7 and data.timesteps == [5, None, 900, 5, None, 900, 5] and not data.synthetic and data.samples[0].shape == (2, 3)
    for row in data.statistics:
        values = np.array([r["data"] for r in rows[:7] if (r["timestep"] if r["timestep"] is not None else -1) == row["timestep"]], np.float32).astype(float)
        assert row["count"] == values.size and row["min"] == values.min() and row["max"] == values.max()
        assert row["mean"] == pytest.approx(values.mean(), abs=1e-6) and row["std"] == pytest.approx(values.std(), rel=1e-5)
    assert [row["timestep"] for row in data.statistics] == [-1, 5, 900]


def test_texts_are_loaded_too_and_a_mixture_is_refused(tmp_path):
    loader = aq.CalibrationLoader()
    data = loader.load_from_file(write_lines(tmp_path / "a.jsonl", {"text": "a"}, {"prompt": "b\u00e4"}))
    assert data.texts == ["a", "bä"] and data.samples == [] and len(data) == 2 and data.statistics == []
    with pytest.raises(ValueError, match="mixes texts and numbers"):
        loader.load_from_file(write_lines(tmp_path / "b.jsonl", {"text": "a"}, {"data": [1]}))


@pytest.mark.parametrize("n, shape, total", [(32, (4,), 1000), (1024, 7, 10), (100, (3, 8, 8), 100)])
def test_synthetic_data_is_standard_normal_seeded_and_marked(n, shape, total):
    loader = aq.CalibrationLoader()
    data = loader.generate_synthetic_data(n, shape, total, seed=3)
    again, other = loader.generate_synthetic_data(n, shape, total, seed=3), loader.generate_synthetic_data(n, shape, total, seed=4)
    values = np.concatenate([s.ravel() for s in data.samples])
    assert data.synthetic and len(data) == n and data.samples[0].dtype == np.float32
    assert abs(values.mean()) < 6 / np.sqrt(values.size) and abs(values.std() - 1) < 6 / np.sqrt(values.size)
    assert all(np.array_equal(a, b) for a, b in zip(data.samples, again.samples, strict=True)) and data.sha256 == again.sha256 != other.sha256
    assert all(0 <= t < total for t in data.timesteps) and len(set(data.timesteps)) == min(n, total)


@pytest.mark.parametrize("arguments", [(31, 4, 10), (1025, 4, 10), (64, 4, 0), (64, (4, 0), 10), (64, -1, 10)])
def test_synthetic_data_outside_the_bounds_is_refused(arguments):
    with pytest.raises(ValueError, match="Invalid"):
        aq.CalibrationLoader().generate_synthetic_data(*arguments)


def test_wrong_loader_arguments_are_refused():
    for wrong, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(kind, match="max_samples"):
            aq.CalibrationLoader(max_samples=wrong)


# ---- its cache ----


def test_the_cache_is_keyed_by_content_and_settings(tmp_path, monkeypatch):
    from arrow_quant_v2 import calibration

    cache, path = tmp_path / "cache", write_lines(tmp_path / "a.jsonl", {"data": [1, 2], "timestep": 3}, {"data": [4]})
    first = aq.CalibrationLoader(cache_dir=cache).load_from_file(path)
    assert len(list(cache.iterdir())) == 1
    moved = path.rename(tmp_path / "b.jsonl")  # the name does not count
    monkeypatch.setattr(calibration, "write_entry", None)
    again = aq.CalibrationLoader(cache_dir=cache).load_from_file(moved)
    assert again.timesteps == first.timesteps and again.statistics == first.statistics
    assert [s.tolist() for s in again.samples] == [s.tolist() for s in first.samples]
    monkeypatch.undo()
    assert len(aq.CalibrationLoader(max_samples=1, cache_dir=cache).load_from_file(moved)) == 1
    write_lines(moved, {"data": [9]})
    assert aq.CalibrationLoader(cache_dir=cache).load_from_file(moved).samples[0].tolist() == [9.0]
    assert len(list(cache.iterdir())) == 3
    write_lines(moved, {"text": "a\u0001b"}, {"text": ""})
    for _ in range(2):
        assert aq.CalibrationLoader(cache_dir=cache).load_from_file(moved).texts == ["a\x01b", ""]


def test_FA14_a_damaged_or_foreign_entry_is_refused_with_the_reason(tmp_path):
    cache, path = tmp_path / "cache", write_lines(tmp_path / "a.jsonl", {"data": [1, 2], "timestep": 3})
    loader = aq.CalibrationLoader(cache_dir=cache)
    loader.load_from_file(path)
    payload = next(cache.glob("*.npz"))
    good = payload.read_bytes()
    aq.CalibrationLoader(max_samples=5, cache_dir=tmp_path / "other").load_from_file(path)
    other = next((tmp_path / "other").glob("*.npz")).read_bytes()
    at = good.index(np.float32([1, 2]).tobytes())
    cases = [
        (good[:-1], "damaged"),
        (b"", "damaged"),
        (good[:at] + b"?" + good[at + 1 :], "damaged.*CRC"),
        (b"[" * 1000, "damaged"),
        (other, "foreign.*other data"),
    ]
    for content, reason in cases:
        payload.write_bytes(content)
        with pytest.raises(aq.FormatError, match="the cache entry is refused: .*" + reason) as error:
            loader.load_from_file(path)
        assert error.value.file.startswith(str(cache))
        payload.write_bytes(good)
    assert loader.load_from_file(path).samples[0].tolist() == [1.0, 2.0]
    (cache / "mine.npz").write_bytes(b"kept")
    loader.clear_cache()
    assert [p.name for p in cache.iterdir()] == ["mine.npz"]
    assert loader.load_from_file(path).samples[0].tolist() == [1.0, 2.0]
    aq.CalibrationLoader().clear_cache()  # without one there is nothing to do


def test_a_failing_write_leaves_no_entry(tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", write_lines(tmp_path / "a.jsonl", {"data": [1, 2]})

    def fail(fresh, **_):
        with open(fresh, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        aq.CalibrationLoader(cache_dir=cache).load_from_file(path)
    assert list(cache.iterdir()) == []


def test_statistics_lead_to_time_groups():
    data = aq.CalibrationLoader().generate_synthetic_data(100, (3, 4), 1000)
    params = aq.TimeAwareQuantizer(num_time_groups=4).compute_params_per_group(data.statistics, num_timesteps=1000)
    assert [p["group_size"] for p in params][0] == 64 and len(params) == 4 and all(p["scale"] > 0 for p in params)
