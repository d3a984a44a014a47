"""Data sets for calibration: JSONL, Parquet, npz and npy files through the library's readers; image folders through Pillow; local Hugging Face data sets,
Arrow files, and Parquet columns that the library does not know, through pyarrow. Samples come one by one. A line that cannot be used is never dropped in
silence."""

from __future__ import annotations

import hashlib
import math
import os

from . import _core, _jobs
from ._core import FormatError
from ._progress import warn

__all__ = ["DataSet", "Sample"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ._types import Array, Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")
TEXT_COLUMNS = ("text", "prompt")
VALUE_COLUMNS = ("input", "data", "values")
MODEL_FILES = ("calibration.jsonl", "calibration.parquet", "calibration.arrow")  # in a model folder, the first found
MOST_TOLD = 20


class Sample:
    """One sample of a DataSet.

    kind: 'text', 'prompt', 'input' (an array as the model gets it), 'data' (a row with its timestep), or 'image'; line: number of its line, row or file, from
    1; text: str or None; values: float32 array or None, for images [channels, height, width]; integers: whether all values are integers, such as token ids;
    timestep, label: int or None; synthetic: marked as made from random numbers (`arrowquant calib synth`).

    >>> import arrow_quant_v2 as aq
    >>> aq.Sample('text', 1, text='In the beginning').text
    'In the beginning'
    """

    __slots__ = ("kind", "line", "text", "values", "integers", "timestep", "label", "synthetic")
    __module__ = "arrow_quant_v2"

    def __init__(
        self,
        kind: str,
        line: int,
        text: str | None = None,
        values: Array | None = None,
        integers: bool = False,
        timestep: int | None = None,
        label: int | None = None,
        synthetic: bool = False,
    ) -> None:
        self.kind, self.line, self.text, self.values = kind, line, text, values
        self.integers, self.timestep, self.label, self.synthetic = integers, timestep, label, synthetic

    def __repr__(self):
        what = repr(self.text) if self.values is None else f"shape {tuple(self.values.shape)}"
        return f"<Sample {self.line}: {self.kind}, {what}>"


class DataSet:
    """Samples of a file or folder, read one by one each time it is iterated.

    path: JSONL ({"text": …}, {"prompt": …}, {"input": [...]} or {"data": [...], "timestep": …, "shape": …} a line), .parquet with such columns, .npz, .npy, an
    Arrow IPC file, a folder of images, a Hugging Face data set (as save_to_disk writes it, or a folder of Parquet files as the hub keeps it), or a model folder
    that holds calibration.jsonl, .parquet or .arrow.
    array: member of an .npz with the samples (beside it, `labels` is read); split: of a Hugging Face data set; column: which one holds text, image or values,
    of such a data set, of Arrow and of Parquet files.
    size: (height, width) or one number: images are cropped in the middle and scaled to it; channels: 1 or 3 (None: as they are); value_range: of black and
    white. Arrays of uint8 in .npz and .npy count as images [height, width] or [height, width, channels].
    on_bad: 'raise' FormatError that lists every bad line met, or 'skip' them with one warning.
    Raises FileNotFoundError, FormatError for what is no data set, ImportError that says which package reads it.

    >>> import arrow_quant_v2 as aq
    >>> images = aq.DataSet('examples/fashion-calib.npz')
    >>> sample = next(iter(images))
    >>> sample.kind, sample.values.shape, sample.label, len(images)
    ('image', (1, 28, 28), 9, 512)
    """

    __module__ = "arrow_quant_v2"

    def __init__(
        self,
        path: Path,
        *,
        array: str | None = None,
        split: str | None = None,
        column: str | None = None,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
        on_bad: str = "raise",
    ) -> None:
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"Invalid on_bad: {on_bad!r}. Must be 'raise' or 'skip'")
        if channels not in (None, 1, 3):
            raise ValueError(f"Invalid channels: {channels!r}. Must be 1 or 3")
        self.path = _jobs.path_of(path)
        self.name = os.path.basename(os.path.normpath(self.path))
        self._array, self._column, self._on_bad = array, column, on_bad
        self._images = Images((size, size) if isinstance(size, int) else size, channels, value_range)
        self._sha256: str | None = None
        self._bad: list[tuple[int, str]] = []
        if not os.path.exists(self.path):
            raise FileNotFoundError(2, "no such data set", self.path)
        inside = [os.path.join(self.path, name) for name in MODEL_FILES]
        self.path = next(filter(os.path.isfile, inside), self.path)
        if os.path.isdir(self.path):
            self._files, self._open = folder_of(self.path, split)
        else:
            by_column = self.path.endswith(".parquet") and column is not None
            self._files, self._open = [self.path], arrow_rows if by_column or self.path.endswith((".arrow", ".feather")) else file_rows
        if column is not None and self._open is not arrow_rows:
            raise ValueError(f"column= is for Parquet and Arrow files and Hugging Face data sets, {self.path} is none")
        self.options: dict[str, Any] = {
            "array": array,
            "split": split,
            "column": column,
            "size": list(self._images.size) if self._images.size else None,
            "channels": channels,
            "value_range": list(value_range),
        }

    def __iter__(self) -> Iterator[Sample]:
        self._bad = []
        for row in self._open(self):
            if not self._bad or self._on_bad == "skip":
                yield row
            if self._on_bad == "raise" and len(self._bad) >= MOST_TOLD:
                break
        self._tell_bad()

    def take(self, n: int | None = None) -> list[Sample]:
        """The first n samples (None: all) as a list; bad lines before them raise, or are left out, as on_bad says.

        >>> import arrow_quant_v2 as aq
        >>> [sample.label for sample in aq.DataSet('examples/fashion-calib.npz').take(3)]
        [9, 0, 0]
        """
        rows: list[Sample] = []
        samples = iter(self) if n is None or n > 0 else iter(())
        for row in samples:
            rows.append(row)
            if n is not None and len(rows) >= n:
                self._tell_bad()
                break
        return rows

    def _tell_bad(self):
        if not self._bad:
            return
        lines = [message for _, message in self._bad[:MOST_TOLD]]
        if len(self._bad) > MOST_TOLD:
            lines.append(f"… and {len(self._bad) - MOST_TOLD} more")
        if self._on_bad == "skip":
            warn(f"left out {len(self._bad)} bad lines of {self.path}:\n  " + "\n  ".join(lines))
            return
        error = FormatError("\n".join(lines) if len(lines) == 1 else f"{self.path}: {len(self._bad)} bad lines:\n  " + "\n  ".join(lines))
        error.file = self.path
        raise error

    def bad(self, line: int, reason: str) -> None:
        """Notes a line that cannot be used; for the readers.

        >>> import arrow_quant_v2 as aq
        >>> aq.DataSet('examples/fashion-calib.npz').bad(7, 'its values are not finite')
        """
        self._bad.append((line, f"{self.path}: line {line}: {reason}"))

    def __len__(self) -> int:
        if len(self._files) == 1 and self._open is file_rows:
            n = _core.DataSet(self.path, array=self._array).n_samples
            if n:
                return n
        elif self._open is image_rows:
            return len(self._files)
        raise TypeError(f"only reading {self.name} tells how many samples it has")

    @property
    def sha256(self) -> str:
        """SHA-256 of the file; for a folder, of the names and hashes of its data files."""
        if self._sha256 is None:
            if self._files == [self.path]:
                self._sha256 = _core.file_sha256(self.path)
            else:
                whole = hashlib.sha256()
                for file in self._files:
                    whole.update(f"{os.path.relpath(file, self.path)}\0{_core.file_sha256(file)}\n".encode())
                self._sha256 = whole.hexdigest()
        return self._sha256

    def __repr__(self):
        return f"<DataSet {self.path!r}>"


# ---- files that the library reads ----


def file_rows(data):
    reader = _core.DataSet(data.path, array=data._array)
    labels = None
    if data.path.endswith(".npz"):
        try:
            labels = _core.DataSet(data.path, array="labels")
        except FormatError:
            labels = None
    told, at = 0, 0
    while (row := reader.next()) is not None:
        while told < len(reader.bad):  # told by the reader with file and line
            data._bad.append(reader.bad[told])
            told += 1
        kind, line, text, values, integers, dtype, timestep, synthetic = row
        label = None
        while labels and at < line:  # entry by entry: that of a sample that was left out goes with it
            label, at = labels.next(), at + 1
        sample = Sample(kind, line, text, values, integers, timestep, int(label[3].reshape(-1)[0]) if label else None, synthetic)
        if dtype == "U8" and values.ndim in (2, 3):
            sample.kind, sample.values = "image", data._images.of_pixels(values)
        yield sample
    data._bad.extend(reader.bad[told:])


# ---- folders ----


def folder_of(path, split):
    """(data files, reader) of a folder."""
    splits = os.path.join(path, "dataset_dict.json")
    if os.path.isfile(splits):
        names = listed(splits, "splits")
        chosen = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if chosen not in names:
            raise ValueError(f"{path} has the splits {', '.join(names)}; give split= one of them")
        path = os.path.join(path, plain(chosen, splits))
    state = os.path.join(path, "state.json")
    if os.path.isfile(state):
        files = [os.path.join(path, plain(item.get("filename") if isinstance(item, dict) else item, state)) for item in listed(state, "_data_files")]
        missing = [file for file in files if not os.path.isfile(file)]
        if missing:
            raise FormatError(f"{state}: the file {os.path.basename(missing[0])!r} that it names is missing")
        return files, arrow_rows
    images = sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )
    if images:
        return images, image_rows
    if parquet := parquet_files(path, split):
        return parquet, arrow_rows
    raise FormatError(f"{path}: neither a Hugging Face data set (state.json, or Parquet files) nor a folder of images ({', '.join(IMAGE_SUFFIXES)})")


def parquet_files(path, split):
    """Parquet files of a split, below `path`: data/train-00000-of-00002.parquet, train/0000.parquet or train.parquet. All, where none is named so."""
    found = sorted(os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path) for name in names if name.endswith(".parquet"))
    splits: dict[str, list[str]] = {}
    for file in found:
        words = file[: -len(".parquet")].split(os.sep)
        splits.setdefault(words[-1].partition("-")[0] if not words[-1][0].isdigit() else words[-2] if len(words) > 1 else "", []).append(
            os.path.join(path, file)
        )
    chosen = split or ("train" if "train" in splits else None)
    if chosen is None:
        return [file for files in splits.values() for file in files]
    if chosen not in splits:
        raise ValueError(f"{path} has the splits {', '.join(sorted(splits))}; give split= one of them")
    return splits[chosen]


def listed(file, key):
    """A non-empty list in a JSON file."""
    try:
        with open(file, encoding="utf-8") as opened:
            found = _jobs.loads(opened.read(1 << 20))[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{file}: expected an object with {key!r} ({error!r})") from None
    if not isinstance(found, list) or not found:
        raise FormatError(f"{file}: {key!r} must be a list with at least one entry")
    return found


def plain(name, file):
    """A file name from a file: data, so nothing that leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or os.path.basename(name) != name or "\\" in name or "\0" in name:
        raise FormatError(f"{file}: {name!r} is no plain file name")
    return name


# ---- images ----


class Images:
    """How pixels become values: [channels, height, width] between the ends of value_range."""

    def __init__(self, size, channels, value_range):
        self.size, self.channels = size, channels
        self.low, self.high = map(float, value_range)

    def of_pixels(self, pixels):
        """pixels: float32 0..255, [height, width] or [height, width, channels]."""
        import numpy as np

        pixels = np.asarray(pixels, np.float32)
        if self.size is not None and pixels.shape[:2] != tuple(self.size):
            image = pillow().fromarray(pixels.astype(np.uint8))
            return self.of_image(image)
        planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        if self.channels is not None and len(planes) != self.channels:
            planes = planes[:3].mean(0, keepdims=True) if self.channels == 1 else np.repeat(planes[:1], 3, 0)
        return np.ascontiguousarray(planes * np.float32((self.high - self.low) / 255) + np.float32(self.low))

    def read(self, file):
        """Of a path or an open file; ValueError when it is no image. Pillow's decoders raise errors of all kinds on damaged ones."""
        image = pillow()
        try:
            with image.open(file, formats=IMAGE_FORMATS) as opened:
                return self.of_image(opened)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(str(error)) from None

    def of_image(self, image):
        import numpy as np

        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
            image = pillow().fromarray(np.clip(np.rint(np.asarray(image, np.float32) / 257), 0, 255).astype(np.uint8))
        grey = image.mode in ("1", "L", "LA")
        image = image.convert("L" if self.channels == 1 or (self.channels is None and grey) else "RGB")
        if self.size is not None:
            height, width = self.size
            scale = max(width / image.width, height / image.height)
            w, h = width / scale, height / scale
            left, top = (image.width - w) / 2, (image.height - h) / 2
            image = image.resize((width, height), pillow().Resampling.BICUBIC, box=(left, top, left + w, top + h))
        pixels = np.asarray(image, np.float32)
        planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        return np.ascontiguousarray(planes * np.float32((self.high - self.low) / 255) + np.float32(self.low))


def pillow():
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images are read with Pillow: pip install pillow") from None
    return Image


def image_rows(data):
    """Files in the order of their names; folders directly below the data set's are the labels, when every image lies in one."""
    pillow()
    groups = [os.path.relpath(file, data.path).split(os.sep)[:-1] for file in data._files]
    names = sorted({group[0] for group in groups if group})
    labelled = all(groups)
    for i, file in enumerate(data._files):
        try:
            values = data._images.read(file)
        except ValueError as error:
            data.bad(i + 1, f"{os.path.relpath(file, data.path)!r} is no image that can be read ({error})")
            continue
        yield Sample("image", i + 1, values=values, label=names.index(groups[i][0]) if labelled else None)


# ---- Arrow ----


def arrow_rows(data):
    """Rows of Arrow IPC files or streams and of Parquet files, batch by batch."""
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("Hugging Face data sets, Arrow files and Parquet columns by name are read with pyarrow: pip install pyarrow") from None
    line = 0
    for file in data._files:
        kind = "Parquet" if file.endswith(".parquet") else "Arrow"
        try:
            with pa.memory_map(file) as mapped:
                for batch in parquet_batches(mapped) if kind == "Parquet" else batches_of(pa, mapped):
                    yield from batch_rows(data, batch, line)
                    line += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's, not the decoder's
            raise FormatError(f"{file}: not a readable {kind} file: {error}") from None


def parquet_batches(mapped):
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with pq.ParquetFile(mapped) as opened:
        yield from opened.iter_batches(batch_size=256)


def batches_of(pa, mapped):
    try:
        reader = pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        file = pa.ipc.open_file(mapped)
        for i in range(file.num_record_batches):
            yield file.get_batch(i)
        return
    yield from reader


def batch_rows(data, batch, line):
    names = set(batch.schema.names)
    if data._column is not None and data._column not in names:
        raise FormatError(f"{data.path}: there is no column {data._column!r}; it has {', '.join(sorted(names))}")
    main = data._column or next((name for name in (*TEXT_COLUMNS, *VALUE_COLUMNS, "image") if name in names), None)
    if main is None:
        raise FormatError(f"{data.path}: none of the columns {', '.join(sorted(names))} is text, prompt, input, data or image; say which with column=")
    wanted = [name for name in dict.fromkeys((main, "timestep", "shape", "label")) if name in names]
    for i in range(batch.num_rows):
        row = {name: batch.column(name)[i].as_py() for name in wanted}
        try:
            yield sample_of(data, main, row, line + i + 1)
        except (TypeError, ValueError, OverflowError) as error:
            data.bad(line + i + 1, str(error))


def sample_of(data, main, row, line):
    """A Sample of a row's columns; ValueError says what is wrong with it."""
    value, label, timestep = row[main], row.get("label"), row.get("timestep")
    label = label if isinstance(label, int) and not isinstance(label, bool) else None
    if timestep is not None and not (isinstance(timestep, int) and 0 <= timestep < 2**31):
        raise ValueError(f"timestep {timestep} is no integer, or out of range")
    if isinstance(value, str):
        return Sample("prompt" if main == "prompt" else "text", line, text=value, label=label, timestep=timestep)
    if isinstance(value, dict):  # an Image feature: its bytes; its path is another machine's
        value = value.get("bytes")
    if isinstance(value, bytes):
        import io

        try:
            values = data._images.read(io.BytesIO(value))
        except ValueError as error:
            raise ValueError(f"its {main} is no image that can be read ({error})") from None
        return Sample("image", line, values=values, label=label, timestep=timestep)
    if value is None:
        raise ValueError(f"its {main} is null")
    return Sample("data" if main == "data" else "input", line, *values_of(value, row.get("shape")), timestep=timestep, label=label)


def values_of(value, shape):
    """(None, float32 array, whether all are integers) of nested lists."""
    import numpy as np

    wide = np.asarray(value, np.float64)
    integers = wide.size > 0 and bool(np.all(wide == np.floor(wide)))
    with np.errstate(over="ignore"):
        values = wide.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite in float32")
    if shape is not None:
        if any(n < 0 for n in shape) or math.prod(shape) != values.size:
            raise ValueError(f"its shape {list(shape)} is of {math.prod(shape)} values, there are {values.size}")
        values = values.reshape(shape)
    return None, values, integers
