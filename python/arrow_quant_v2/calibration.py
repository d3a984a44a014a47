"""CalibrationLoader: rows of calibration data from files, or made from random numbers, with their statistics per timestep (python-api.md, section 7)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _jobs
from ._core import Calibration, FormatError, _calibration_cache_key
from .data import DataSet

__all__ = ["CalibrationData", "CalibrationLoader"]

LEAST_SYNTHETIC, MOST_SYNTHETIC = 32, 1024


@dataclass(frozen=True)
class CalibrationData:
    """Samples for calibration, as CalibrationLoader returns them.

    samples: float32 arrays in their shapes; timesteps: an int or None for each; texts: the str of each where the file holds text (samples is empty then);
    statistics: a list of dict timestep, count (values), mean, std, min, max, sorted, over the samples of each timestep (-1: those without one); synthetic:
    whether they are random numbers; source: path or None; sha256: of the content; seed.

    >>> import arrow_quant_v2 as aq
    >>> data = aq.CalibrationLoader().generate_synthetic_data(32, (4, 8), 1000)
    >>> len(data), data.samples[0].shape, data.synthetic
    (32, (4, 8), True)
    """

    samples: list[Any]
    timesteps: list[int | None]
    texts: list[str]
    statistics: list[dict[str, float]] = field(repr=False)
    synthetic: bool
    source: str | None
    sha256: str
    seed: int = 0

    def __len__(self) -> int:
        return len(self.samples) or len(self.texts)


class CalibrationLoader:
    """Loads calibration rows, or makes synthetic ones.

    max_samples: rows read at most; cache_dir: a folder that keeps what was read, found again by the hash of the file's content, the settings and the version
    of ArrowQuant (None: no cache). A damaged or foreign entry raises FormatError with the reason.

    >>> import arrow_quant_v2 as aq
    >>> loader = aq.CalibrationLoader(max_samples=64, cache_dir='calibration-cache')
    >>> len(loader.load_from_file('examples/fashion-calib.npz'))
    64
    """

    __module__ = "arrow_quant_v2"

    def __init__(self, max_samples: int = 128, cache_dir: Any = None) -> None:
        self.max_samples = _jobs.whole(max_samples, "max_samples")
        if self.max_samples < 1:
            raise ValueError(f"Invalid max_samples: {max_samples}. Must be at least 1")
        self.cache_dir = None if cache_dir is None else _jobs.path_of(cache_dir)

    def load_from_file(self, path: Any) -> CalibrationData:
        """The first max_samples rows of a data set (JSONL, Parquet, Arrow, npz, npy, folder: see DataSet) and their statistics per timestep.

        Raises FileNotFoundError; FormatError that lists each bad line with its number, or why a cached entry is refused.

        >>> import arrow_quant_v2 as aq
        >>> data = aq.CalibrationLoader(max_samples=8).load_from_file('examples/fashion-calib.npz')
        >>> len(data), data.samples[0].shape, data.synthetic, data.statistics[0]['count']
        (8, (1, 28, 28), False, 6272)
        """
        data = DataSet(path)
        options = data.options | {"max_samples": self.max_samples, "kind": "samples"}
        key = _calibration_cache_key(data.sha256, json.dumps(options, sort_keys=True))
        entry = os.path.join(self.cache_dir, f"{key}.npz") if self.cache_dir is not None else None
        if entry and os.path.exists(entry):
            samples, timesteps, texts, synthetic = read_entry(entry, key)
        else:
            rows = data.take(self.max_samples)
            samples = [row.values for row in rows if row.values is not None]
            texts = [row.text for row in rows if row.text is not None]
            timesteps, synthetic = [row.timestep for row in rows], any(row.synthetic for row in rows)
            if samples and texts:
                raise ValueError(f"{data.path} mixes texts and numbers: give them in a file each")
            if entry:
                write_entry(entry, key, samples, timesteps, texts, synthetic)
        return CalibrationData(samples, timesteps, texts, statistics_of(samples, timesteps), synthetic, data.path, data.sha256)

    def generate_synthetic_data(self, num_samples: int, sample_shape: Any, num_timesteps: int, *, seed: int = 0) -> CalibrationData:
        """Standard normal samples, each with a timestep, spread evenly over the schedule; marked synthetic in everything made from them.

        num_samples: 32 to 1024; sample_shape: an int or a sequence; num_timesteps: T of the schedule. The same seed gives the same samples.

        >>> import arrow_quant_v2 as aq
        >>> data = aq.CalibrationLoader().generate_synthetic_data(64, (3, 8, 8), 10)
        >>> sorted(set(data.timesteps)), len(data.statistics)
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 10)
        """
        num_samples, num_timesteps, seed = (
            _jobs.whole(value, name) for value, name in ((num_samples, "num_samples"), (num_timesteps, "num_timesteps"), (seed, "seed"))
        )
        if not LEAST_SYNTHETIC <= num_samples <= MOST_SYNTHETIC:
            raise ValueError(f"Invalid num_samples: {num_samples}. Must be between {LEAST_SYNTHETIC} and {MOST_SYNTHETIC}")
        if num_timesteps < 1:
            raise ValueError(f"Invalid num_timesteps: {num_timesteps}. Must be at least 1")
        shape = tuple(_jobs.whole(n, "sample_shape") for n in ([sample_shape] if np.ndim(sample_shape) == 0 else sample_shape))
        if any(n < 1 for n in shape):
            raise ValueError(f"Invalid sample_shape: {shape}. Sizes must be at least 1")
        generator = np.random.default_rng(seed)
        samples = [generator.standard_normal(shape, dtype=np.float32) for _ in range(num_samples)]
        timesteps: list[int | None] = [i * num_timesteps // num_samples if num_timesteps >= num_samples else i % num_timesteps for i in range(num_samples)]
        whole = hashlib.sha256(f"synthetic {shape} {num_timesteps} {seed}".encode())
        for sample in samples:
            whole.update(sample.tobytes())
        return CalibrationData(samples, timesteps, [], statistics_of(samples, timesteps), True, None, whole.hexdigest(), seed)

    def clear_cache(self) -> None:
        """Removes the entries of the cache, those of calibrate() among them; other files of the folder stay.

        >>> import arrow_quant_v2 as aq
        >>> aq.CalibrationLoader(cache_dir='calibration-cache').clear_cache()
        """
        if self.cache_dir is None or not os.path.isdir(self.cache_dir):
            return
        for name in sorted(os.listdir(self.cache_dir)):
            stem, _, suffix = name.rpartition(".")
            if suffix in ("aqcal", "npz") and len(stem) == 64 and set(stem) <= set("0123456789abcdef"):
                os.unlink(os.path.join(self.cache_dir, name))

    def __repr__(self):
        return f"CalibrationLoader(max_samples={self.max_samples}, cache_dir={self.cache_dir!r})"


def statistics_of(samples, timesteps):
    """Per timestep, over all values of its samples: the library's own scalars, of a collection with one layer of one input."""
    if not samples:
        return []
    longest = max((t for t in timesteps if t is not None), default=-1) + 1
    collection = Calibration(num_timesteps=longest, groups=1, hessian=False)
    layer = collection.add_layer("samples", 1)
    for sample, timestep in zip(samples, timesteps, strict=True):
        collection.update(layer, np.ascontiguousarray(sample).reshape(-1, 1), timestep)
    return collection.timesteps(layer)


# ---- entries of the cache: FOLDER/KEY.npz, as the library's recordings are FOLDER/KEY.aqcal: one file that holds its key, each array with its checksum ----


def write_entry(path, key, samples, timesteps, texts, synthetic):
    """Appears complete or not at all."""
    arrays = {
        "key": np.frombuffer(key.encode(), np.uint8),
        "values": np.concatenate([np.ravel(s) for s in samples]).astype(np.float32) if samples else np.zeros(0, np.float32),
        "sizes": np.array([len(np.shape(s)) for s in samples], np.int64),
        "shapes": np.array([n for s in samples for n in np.shape(s)], np.int64),
        "timesteps": np.array([-1 if t is None else t for t in timesteps], np.int64),
        "synthetic": np.bool_(synthetic),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
    }
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".store-", dir=folder) as aside:
        fresh = os.path.join(aside, "fresh.npz")
        np.savez(fresh, **arrays)
        os.replace(fresh, path)


def read_entry(path, key):
    try:
        with np.load(path, allow_pickle=False) as entry:
            stored = {name: entry[name] for name in ("key", "values", "sizes", "shapes", "timesteps", "synthetic", "texts")}
        texts, values, samples, at = json.loads(stored["texts"].tobytes()), stored["values"], [], 0
        shapes = iter(stored["shapes"].tolist())
        for rank in stored["sizes"].tolist():
            shape = [next(shapes) for _ in range(rank)]
            n = int(np.prod(shape, dtype=np.int64))
            samples.append(values[at : at + n].reshape(shape))
            at += n
    except Exception as error:  # whatever zip, NumPy and JSON raise for bytes that are not what was stored
        raise refused(path, f"it is damaged ({error})") from None
    if stored["key"].tobytes() != key.encode():
        raise refused(path, "it is foreign: it was made from other data or other options")
    return samples, [None if t < 0 else t for t in stored["timesteps"].tolist()], texts, bool(stored["synthetic"])


def refused(path, reason):
    error = FormatError(f"{path}: the cache entry is refused: {reason}. Hint: remove it, or clear the cache")
    error.file = path
    return error
