"""ValidationSystem: how close a quantized model, or an array, is to the original. The library measures; here is only the form."""

from __future__ import annotations

from . import _core, _jobs, models

__all__ = ["ValidationSystem"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from ._types import Array, Path


class ValidationSystem:
    """Measures quality against a floor of one's own.

    min_accuracy: the least cosine similarity that each layer must reach (0 to 1); bit_width: 2, 4 or 8, the bits that each quantized layer must have, or None
    for any. Raises ConfigurationError for another floor, ValueError for another width.

    >>> import arrow_quant_v2 as aq
    >>> aq.ValidationSystem(min_accuracy=0.9, bit_width=4)
    ValidationSystem(min_accuracy=0.9, bit_width=4)
    """

    __module__ = "arrow_quant_v2"

    def __init__(self, min_accuracy: float = 0.85, bit_width: int | None = None) -> None:
        self.bit_width = None if bit_width is None else _jobs.one_of(bit_width, (2, 4, 8), "bit_width")
        config = _core.DiffusionQuantConfig(min_accuracy=min_accuracy)
        config.validate()
        self.min_accuracy = config.min_accuracy

    def __repr__(self) -> str:
        return f"ValidationSystem(min_accuracy={self.min_accuracy}, bit_width={self.bit_width})"

    def cosine_similarity(self, a: Array, b: Array) -> float:
        """Cosine of the angle between two arrays, -1 to 1; 0.0 when either is all zeros. Raises ShapeMismatchError (a ValueError) where lengths differ.

        >>> import arrow_quant_v2 as aq
        >>> aq.ValidationSystem().cosine_similarity([3.0, 4.0], [4.0, 3.0])
        0.96
        """
        return _core.cosine_similarity(a, b)

    def cosine_similarity_batch(self, originals: Iterable[Array], quantized: Iterable[Array], /) -> list[float]:
        """cosine_similarity of each pair of two lists of arrays. Raises ValueError where the lists, or the arrays of a pair, differ in length.

        >>> import arrow_quant_v2 as aq
        >>> aq.ValidationSystem().cosine_similarity_batch([[3.0, 4.0], [0.0]], [[4.0, 3.0], [1.0]])
        [0.96, 0.0]
        """
        a, b = list(originals), list(quantized)
        if len(a) != len(b):
            raise ValueError(f"Lengths differ: {len(a)} arrays and {len(b)} arrays")
        return [_core.cosine_similarity(x, y) for x, y in zip(a, b, strict=True)]

    def validate_quality(self, original_path: Path, quantized_path: Path) -> dict[str, Any]:
        """ArrowQuantV2.validate_quality with this object's floor in place of the container's: the same arguments, result and errors.

        With a bit_width, each quantized layer of another width is one of the "problems".

        >>> import arrow_quant_v2 as aq
        >>> aq.ValidationSystem(min_accuracy=0.9).validate_quality('examples/dit-fashion', 'dit-int4')['passed']
        True
        """
        return models.run_validate(original_path, quantized_path, None, self.min_accuracy, self.bit_width)
