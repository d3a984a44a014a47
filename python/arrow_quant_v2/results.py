"""What the short functions return: plain frozen dataclasses, picklable, over the library's report."""

import json
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Layer", "Result"]


@dataclass(frozen=True)
class Layer:
    """One quantized layer of a Result.

    shape; dtype of the source ('BF16' …); bits; group_size; params ('f16', 'f32', 'two-level'); method; cosine; sqnr_db (None when exact); source_bytes;
    bytes as stored; fallback_from: what was tried first, or None; output_sqnr_db: of the layer's output, where the calibration knows its inputs; compared_with:
    what gave the output more error ('search 25.3 dB').

    >>> import arrow_quant_v2 as aq
    >>> aq.Layer('w', (2, 2), 'F32', 4, 128, 'f16', 'rtn', 0.99, 20.0, 16, 6, None).bits
    4
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: int
    group_size: int
    params: str
    method: str
    cosine: float | None
    sqnr_db: float | None
    source_bytes: int
    bytes: int
    fallback_from: str | None
    output_sqnr_db: float | None = None
    compared_with: str | None = None


@dataclass(frozen=True)
class Result:
    """What quantize() wrote, as measured.

    path: of the container; size: bytes on disk; bpw: bits per weight of the quantized layers, codes and parameters; cosine: mean over them, weighted by size;
    sqnr_db; layers: {name: Layer}; kept: {name: reason}; warnings: list of str; report: the library's whole report as a dict (docs/json.md).

    >>> import arrow_quant_v2 as aq, pickle
    >>> r = aq.quantize('examples/dit-fashion', 'dit-int8', bits=8, overwrite=True)
    >>> r.bpw < 8.5, pickle.loads(pickle.dumps(r)) == r
    (True, True)
    """

    path: str
    size: int
    bpw: float | None
    cosine: float | None
    sqnr_db: float | None
    layers: dict[str, Layer]
    kept: dict[str, str]
    warnings: list[str]
    report: dict[str, Any] = field(repr=False)

    def to_json(self) -> str:
        """The report as JSON text: the object that `arrowquant quantize --json` prints; its warnings name settings as Python does.

        >>> import arrow_quant_v2 as aq
        >>> aq.Result('out', 1, 4.0, 0.9, 20.0, {}, {}, [], {'schema': 'arrowquant.quantize/1'}).to_json()
        '{"schema": "arrowquant.quantize/1"}'
        """
        return json.dumps(self.report, ensure_ascii=False)


def result_of(path, report):
    """A Result from the report "arrowquant.quantize/1"."""
    summary = report["summary"]
    names = Layer.__dataclass_fields__
    layers = {layer["name"]: Layer(**{k: tuple(v) if k == "shape" else v for k, v in layer.items() if k in names}) for layer in report["layers"]}
    return Result(
        path=path,
        size=report["output"]["size_bytes"],
        bpw=summary["bits_per_weight"],
        cosine=summary["cosine"],
        sqnr_db=summary["sqnr_db"],
        layers=layers,
        kept={kept["name"]: kept["reason"] for kept in report["kept"]},
        warnings=report["warnings"],
        report=report,
    )


Layer.__module__ = Result.__module__ = "arrow_quant_v2"
