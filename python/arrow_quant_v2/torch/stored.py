"""A weight in its stored form: packed codes and packed parameters in plain uint8 tensors, and the values they stand for.

The layout is that of the container (docs/format.md, docs/format-params.md). On the CPU the C library does the work; `unpack` does the same in torch
operations, bit for bit, for tensors on other devices.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import torch

from .. import _core

__all__ = ["StoredForm", "as_tensor", "quantize_weight", "unpack"]

_SUB_WIDTH = {2: 16, 4: 32}  # inputs of a sub-group of two-level parameters
_FIELD_BITS = {2: 4, 4: 6}  # bits of its multipliers


@dataclass(frozen=True)
class StoredForm:
    """How a weight of a layer is stored.

    bits 2, 4 or 8; group_size: inputs that share parameters (two-level: a group of sub-groups); params 'f16', 'f32', 'two-level' or 'r2q';
    hadamard: inputs per block of the Hadamard rotation, 0 for none; equalized: inputs are multiplied by stored scales first.

    >>> from arrow_quant_v2.torch import StoredForm
    >>> StoredForm(bits=2, group_size=256, params='two-level')
    StoredForm(bits=2, group_size=256, params='two-level', hadamard=0, equalized=False)
    """

    bits: int = 4
    group_size: int = 128
    params: str = "f16"
    hadamard: int = 0
    equalized: bool = False

    def to_dict(self):
        """The fields as a dict, as quantization_config keeps them.

        >>> from arrow_quant_v2.torch import StoredForm
        >>> StoredForm(**StoredForm(bits=8).to_dict()) == StoredForm(bits=8)
        True
        """
        return asdict(self)

    def row_bytes(self, cols):
        """Bytes of codes, and of parameters, of a row of `cols` weights.

        >>> from arrow_quant_v2.torch import StoredForm
        >>> StoredForm(bits=4, group_size=128).row_bytes(1000)
        (500, 32)
        """
        groups = -(-cols // self.group_size)
        if self.params == "two-level":
            sub, field = _SUB_WIDTH[self.bits], _FIELD_BITS[self.bits]
            whole, rest = divmod(cols, self.group_size)
            fields = [-(-width // sub) * 2 * field for width in (self.group_size, rest)]
            params = whole * (4 + -(-fields[0] // 8)) + (4 + -(-fields[1] // 8) if rest else 0)
        else:
            params = groups * {"f16": 4, "f32": 8, "r2q": 6}[self.params]
        return -(-cols * self.bits // 8), params


def as_tensor(array):
    """An array of the library as a tensor over the same memory, which may be a read-only file map: such a tensor must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(array, dtype=torch.uint8) if len(array) else torch.empty(0, dtype=torch.uint8)


def quantize_weight(weight, form, method="search"):
    """(qweight [rows, bytes], qparams [rows, bytes], form): a weight [out, ...] in stored form; the form's params become 'f32' where half precision
    does not hold them. Only weight methods without data: 'search' or 'rtn'."""
    value = weight.detach().to("cpu", torch.float32).contiguous()
    codes, params, word = _core._quantize_stored(value.numpy(), form.bits, form.group_size, form.params, method)
    rows = value.shape[0]
    form = StoredForm(form.bits, form.group_size, word, form.hadamard, form.equalized)
    return as_tensor(codes).view(rows, -1), as_tensor(params).view(rows, -1), form


def _codes(qweight, bits, cols):
    if bits == 8:
        return qweight[:, :cols]
    shifts = torch.arange(0, 8, bits, device=qweight.device, dtype=torch.uint8)
    return ((qweight.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)[:, :cols]


def _two_level(qparams, form, cols):
    """Scales and offsets of all sub-groups [rows, sub-groups] from their records."""
    sub, field = _SUB_WIDTH[form.bits], _FIELD_BITS[form.bits]
    scales, offsets, at = [], [], 0
    for begin in range(0, cols, form.group_size):
        n = -(-min(form.group_size, cols - begin) // sub)
        size = 4 + -(-n * 2 * field // 8)
        record = qparams[:, at : at + size].contiguous()
        at += size
        outer = record[:, :4].contiguous().view(torch.float16).float()
        bits = ((record[:, 4:].unsqueeze(-1) >> torch.arange(8, device=record.device, dtype=torch.uint8)) & 1).flatten(1)
        weights = 2 ** torch.arange(field, device=record.device, dtype=torch.int32)
        fields = (bits[:, : n * 2 * field].view(len(record), 2 * n, field).int() * weights).sum(-1).float()
        scales.append(outer[:, :1] * (fields[:, 0::2] + 1))
        offsets.append(outer[:, 1:] * fields[:, 1::2])
    return torch.cat(scales, 1), torch.cat(offsets, 1)


def _spread(values, width, cols):
    return values.repeat_interleave(width, 1)[:, :cols]


def unpack(qweight, qparams, form, cols):
    """The values [rows, cols] in float32, in torch operations on the tensors' device; the same bits as the C library gives."""
    q = _codes(qweight, form.bits, cols)
    if form.params == "r2q":
        m, a1, a2 = qparams.contiguous().view(torch.float16).float().view(len(qparams), -1, 3).unbind(-1)
        m, a1, a2 = (_spread(x, form.group_size, cols) for x in (m, a1, a2))
        b1, b2 = (q >> 1).float() * 2 - 1, (q & 1).float() * 2 - 1
        return m + a1 * b1 + a2 * b2
    width = form.group_size
    if form.params == "two-level":
        width = _SUB_WIDTH[form.bits]
        s, o = _two_level(qparams, form, cols)
        z = (0.0 - o) / s
    elif form.params == "f16":
        s, o = qparams.contiguous().view(torch.float16).float().view(len(qparams), -1, 2).unbind(-1)
        z = (0.0 - o) / s
    else:
        s, z = qparams.contiguous().view(torch.float32).view(len(qparams), -1, 2).unbind(-1)
    return (q.float() - _spread(z, width, cols)) * _spread(s, width, cols)
