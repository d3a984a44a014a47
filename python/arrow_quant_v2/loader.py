"""Sharded safetensors, read lazily (python-api section 5)."""

from __future__ import annotations

import os
from collections import OrderedDict

from . import _core, _jobs

__all__ = ["ShardedSafeTensorsLoader", "load_sharded_safetensors"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from os import PathLike

    from ._types import Array

SUFFIX = ".safetensors.index.json"
CACHE_BYTES = 256 << 20


def index_file(path):
    """The index file that a path means."""
    text = _jobs.path_of(path)
    if os.path.isfile(text) and text.endswith(SUFFIX):
        return text
    if os.path.isdir(text):
        found = sorted(name for name in os.listdir(text) if name.endswith(SUFFIX))
        if len(found) == 1:
            return os.path.join(text, found[0])
        if found:
            raise OSError(f"{text} holds several index files: {', '.join(found)}. Give the path of one of them")
    raise OSError("Path must be a .safetensors.index.json file or directory containing one")


class ShardedSafeTensorsLoader:
    """Tensors of a sharded safetensors model, each converted to float32 when it is asked for.

    index_path: a *.safetensors.index.json, or a folder that holds one. Headers of all shards are checked at once; values are read when asked for, and the
    last ones (256 MiB at most) are kept, read-only. May be used from several threads.
    Raises OSError for another path, FormatError for a damaged model.

    >>> import arrow_quant_v2 as aq
    >>> loader = aq.ShardedSafeTensorsLoader('sharded/model.safetensors.index.json')
    >>> loader.tensor_names(), loader.get_tensor('b').tolist()
    (['a', 'b'], [[3.0, 4.0]])
    """

    def __init__(self, index_path: str | PathLike[str]):
        self._index_path = index_file(index_path)
        self._model = _core.Model(self._index_path, skip_unknown_dtype=True)
        files = [os.path.basename(path) for path in self._model.files()]
        self._tensors = {name: (i, files[file]) for i, (name, _, file) in enumerate(self._model.tensors())}
        self._files = sorted(files)
        self._cache: OrderedDict[str, Array] = OrderedDict()

    def tensor_names(self) -> list[str]:
        """Names, sorted by shard, then by name.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').tensor_names()
        ['a', 'b']
        """
        return [name for _, name in sorted((shard, name) for name, (_, shard) in self._tensors.items())]

    def get_shard_for_tensor(self, name: str) -> str | None:
        """File name of the shard that holds a tensor, or None when there is no such tensor.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').get_shard_for_tensor('b')
        'model-00002-of-00002.safetensors'
        """
        return self._tensors[name][1] if name in self._tensors else None

    def get_tensor(self, name: str) -> Array:
        """One tensor as a float32 array in its shape. KeyError when unknown; TypeError when its type has no numbers that convert.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').get_tensor('a').tolist()
        [[1.0, 2.0]]
        """
        if name not in self._tensors:
            raise KeyError(name)
        array = self._cache.get(name)
        if array is None:
            array = self._model.read(self._tensors[name][0])
            if hasattr(array, "setflags"):
                array.setflags(write=False)
            self._cache[name] = array
            while self.cache_memory_usage() > CACHE_BYTES and self._cache:
                try:
                    self._cache.popitem(last=False)
                except KeyError:  # another thread emptied it
                    break
        return array

    def get_all_tensors(self) -> dict[str, Array]:
        """{name: float32 array} of all tensors, shapes kept. Those whose type has no numbers that convert are left out, and one warning names them.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').get_all_tensors()['b'].shape
        (1, 2)
        """
        found, reasons = {}, []
        for name in self.tensor_names():
            try:
                found[name] = self.get_tensor(name)
            except TypeError as error:
                reasons.append(str(error))
        if reasons:
            import warnings

            warnings.warn("\n  ".join([f"Left out {len(reasons)} of {len(self._tensors)} tensors:", *reasons]), stacklevel=2)
        return found

    def detect_modality(self) -> str | None:
        """'text', 'code', 'image', 'audio', or None when it cannot be told.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').detect_modality() is None
        True
        """
        return self._model.modality()

    def get_total_size(self) -> int | None:
        """metadata.total_size of the index in bytes, or None.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').get_total_size()
        16
        """
        with open(self._index_path, encoding="utf-8") as file:
            metadata = _jobs.loads(file.read()).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        return int(size) if isinstance(size, (int, float)) and not isinstance(size, bool) else None

    def num_shards(self) -> int:
        """Number of shards.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').num_shards()
        2
        """
        return len(self._files)

    def shard_files(self) -> list[str]:
        """File names of the shards, sorted.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').shard_files()
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
        """
        return list(self._files)

    def clear_cache(self) -> None:
        """Forgets the kept arrays.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').clear_cache()
        """
        self._cache.clear()

    def cache_memory_usage(self) -> int:
        """Bytes of the kept arrays.

        >>> import arrow_quant_v2 as aq
        >>> aq.load_sharded_safetensors('sharded').cache_memory_usage()
        0
        """
        return sum(array.nbytes for array in list(self._cache.values()))

    def __repr__(self):
        return f"<ShardedSafeTensorsLoader {self._index_path!r}: {len(self._tensors)} tensors in {len(self._files)} shards>"


def load_sharded_safetensors(index_path: str | PathLike[str]) -> ShardedSafeTensorsLoader:
    """The same as ShardedSafeTensorsLoader(index_path).

    >>> import arrow_quant_v2 as aq
    >>> aq.load_sharded_safetensors('sharded').num_shards()
    2
    """
    return ShardedSafeTensorsLoader(index_path)


for _member in (ShardedSafeTensorsLoader, load_sharded_safetensors):
    _member.__module__ = "arrow_quant_v2"
