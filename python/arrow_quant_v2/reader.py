"""Reading a written container lazily: nothing but names and sizes is read until a layer's values are asked for."""

from __future__ import annotations

from . import _core, _jobs

__all__ = ["Reader", "Tensor", "open"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, KeysView
    from os import PathLike
    from typing import Any

    from ._types import Array, LayerResult, TimeGroupParams


class Tensor:
    """One tensor of a container; its values are read when they are asked for.

    name, shape (tuple), dtype (of the source: 'BF16' …), quantized (bool); bits, group_size, params, method, cosine, sqnr_db, fallback_from: as stored, None
    where they do not apply; bytes: as stored.

    >>> import arrow_quant_v2 as aq
    >>> with aq.open('dit-int4') as f:
    ...     t = f['transformer_blocks.0.ff.net.2.weight']
    ...     t.shape, t.bits, t.codes.shape, t.scales.shape
    ((192, 768), 4, (192, 384), (192, 6))
    """

    __slots__ = ("_container", "_index", "_info")

    def __init__(self, container, index):
        self._container, self._index, self._info = container, index, container.info(index)

    @property
    def name(self) -> str:
        return self._info["name"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._info["shape"])

    @property
    def dtype(self) -> str:
        return self._info["dtype"]

    @property
    def quant_type(self) -> str:
        return self._info["quant_type"]

    @property
    def quantized(self) -> bool:
        return self._info["quantized"]

    @property
    def bytes(self) -> int:
        return self._info["bytes"]

    @property
    def bits(self) -> int | None:
        return self._info.get("bits")

    @property
    def group_size(self) -> int | None:
        return self._info.get("group_size")

    @property
    def params(self) -> str | None:
        return self._info.get("params")

    @property
    def method(self) -> str | None:
        return self._info["method"]

    @property
    def cosine(self) -> float | None:
        return self._info["cosine"]

    @property
    def sqnr_db(self) -> float | None:
        return self._info["sqnr_db"]

    @property
    def fallback_from(self) -> str | None:
        return self._info["fallback_from"]

    def __repr__(self):
        return f"<Tensor {self.name!r} {list(self.shape)} {self.quant_type}>"

    def dequantize(self, dtype: str = "float32", threads: int = 0) -> Array:
        """Its values as an array of its shape; dtype 'float32' or 'float16'. A tensor that was kept is converted. threads 0: all.

        Raises TypeError for a tensor that holds no floating numbers, QuantizationError for a damaged file.

        >>> import arrow_quant_v2 as aq
        >>> aq.open('dit-int4')['transformer_blocks.0.ff.net.2.weight'].dequantize().shape
        (192, 768)
        """
        return self._container.dequantize(self._index, dtype, threads)

    @property
    def codes(self) -> Array | None:
        """Packed codes, uint8 [rows, bytes per row], read-only and without a copy; None for a tensor that was kept.

        Element i of a row lies at bit i * bits of the row's bytes, little-endian; value = (code - zero) * scale.
        """
        codes = self._container.codes(self._index)
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return codes.reshape(rows, -1) if rows and hasattr(codes, "reshape") else codes

    def _pairs(self, which):
        found = self._container.pairs(self._index)
        if found is None:
            return None
        values, per_row = found[which], found[2]
        return values.reshape(-1, per_row) if per_row and hasattr(values, "reshape") else values

    @property
    def scales(self) -> Array | None:
        """Scales, float32 [rows, groups per row], one per group or sub-group; None for a tensor that was kept."""
        return self._pairs(0)

    @property
    def zeros(self) -> Array | None:
        """Zero points, float32 in the layout of scales; None for a tensor that was kept."""
        return self._pairs(1)

    @property
    def time_groups(self) -> list[TimeGroupParams] | None:
        """Parameters of the layer's input by group of timesteps: list of dict time_range, scale, zero_point, group_size; None where there are none."""
        return self._info["time_groups"]

    @property
    def equalization_scales(self) -> Array | None:
        """Scales s of the inputs, float32 [in]: the codes are those of (W / s) R. None where inputs are not equalized."""
        return self._info["equalization_scales"]

    @property
    def equalization_folded(self) -> bool:
        """True where the operation before the layer already multiplies by the scales; dequantize() then gives W / s."""
        return self._info["equalization_folded"]

    @property
    def folded_shift(self) -> Array | None:
        """Shift m of the inputs, float32 [in], where their equalization is folded with one: the operation before the layer gives (x - m) s, and the layer's
        bias holds W m. Else None."""
        return self._info["folded_shift"]

    @property
    def hadamard_group(self) -> int:
        """Inputs per block of the Hadamard rotation R; 0 where there is none."""
        return self._info["hadamard_group"]

    @property
    def activation_stats(self) -> dict[str, Array] | None:
        """Statistics of the layer's input by time group: dict mean, std, min, max of arrays; None where there are none."""
        return self._info["activation_stats"]

    def _stored(self):
        """(codes, parameters, their form, bits, group size) as they are stored."""
        if self.bits is None:
            raise ValueError(f"tensor {self.name!r} is stored as {self.quant_type}: it has no codes")
        if self._info["axis"] != 1:
            raise ValueError(f"tensor {self.name!r} has groups of rows: integer execution needs groups along the inputs")
        return self._container.codes(self._index), self._container.params(self._index), self.params, self.bits, self.group_size

    def _input_of(self, x):
        """x s R, what the codes are multiplied by."""
        scales, hadamard = self._info["input_scales"], self.hadamard_group
        return x if scales is None and not hadamard else _core._transform_input(x, scales, hadamard)

    def result(self) -> LayerResult:
        """The layer as a layer result, the dict that ArrowQuantV2.quantize_batch gives: its group size is that of the expanded scales.

        >>> import arrow_quant_v2 as aq
        >>> t = aq.open('dit-int4')['transformer_blocks.0.ff.net.2.weight']
        >>> bool((aq.dequantize(t.result()) == t.dequantize()).all())
        True
        """
        if self.bits is None:
            raise ValueError(f"tensor {self.name!r} is stored as {self.quant_type}: it has no codes")
        scales, zeros, _, width = self._container.pairs(self._index)
        return {
            "quantized_data": self._container.codes(self._index),
            "scales": scales,
            "zero_points": zeros,
            "shape": list(self.shape),
            "bit_width": self.bits,
            "group_size": width,
        }


class Reader:
    """A written container, opened for reading; a mapping from names to Tensor, and a context manager. May be used from several threads.

    path, modality (None when unknown), schema_version, size (bytes on disk), config and metadata (dicts, as stored).

    >>> import arrow_quant_v2 as aq
    >>> with aq.open('dit-int4') as f:
    ...     len(f), f.modality, f.config['bit_width']
    (120, 'image', 4)
    """

    def __init__(self, path: str | PathLike[str]):
        self._container = _core.Container(_jobs.require_model(path))
        self._index = {name: i for i, name in enumerate(self._container.names())}
        self._about = self._container.about()

    @property
    def path(self) -> str:
        return self._about["path"]

    @property
    def modality(self) -> str | None:
        return self._about["modality"]

    @property
    def schema_version(self) -> str:
        return self._about["schema_version"]

    @property
    def size(self) -> int:
        return self._about["size_bytes"]

    @property
    def config(self) -> dict[str, Any]:
        return _jobs.loads(self._about["config"] or "{}")

    @property
    def metadata(self) -> dict[str, Any]:
        return _jobs.loads(self._about["metadata"] or "{}")

    def __getitem__(self, name: str) -> Tensor:
        return Tensor(self._container, self._index[name])

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> KeysView[str]:
        """Names of the tensors, in stored order.

        >>> import arrow_quant_v2 as aq
        >>> 'proj_out_2.weight' in aq.open('dit-int4').keys()
        True
        """
        return self._index.keys()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, Tensor) of each tensor, in stored order.

        >>> import arrow_quant_v2 as aq
        >>> sum(tensor.quantized for name, tensor in aq.open('dit-int4').items())
        42
        """
        return ((name, self[name]) for name in self._index)

    def values(self) -> Iterator[Tensor]:
        """Each Tensor, in stored order.

        >>> import arrow_quant_v2 as aq
        >>> sum(tensor.bytes for tensor in aq.open('dit-int4').values()) < aq.open('dit-int4').size
        True
        """
        return (self[name] for name in self._index)

    def close(self) -> None:
        """Ends reading; arrays that borrow from the files stay valid.

        >>> import arrow_quant_v2 as aq
        >>> f = aq.open('dit-int4')
        >>> f.close()
        >>> f['proj_out_2.weight']
        Traceback (most recent call last):
        ValueError: the file is closed
        """
        self._container.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self):
        return f"<Reader {self.path!r}: {len(self)} tensors>"


def open(path: str | PathLike[str]) -> Reader:
    """Opens a written container for reading.

    Raises ModelNotFoundError, FormatError.

    >>> import arrow_quant_v2 as aq
    >>> with aq.open('dit-int4') as f:
    ...     f['transformer_blocks.0.ff.net.2.weight'].dequantize(dtype='float16').dtype.name
    'float16'
    """
    return Reader(path)


for _member in (Reader, Tensor, open):
    _member.__module__ = "arrow_quant_v2"
