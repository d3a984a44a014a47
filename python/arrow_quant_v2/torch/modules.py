"""Layers that keep their weight as packed codes in plain buffers: QuantLinear and QuantConv.

Buffers: `qweight` uint8 [out, bytes of codes], `qparams` uint8 [out, bytes of parameters], where inputs are equalized `qinput_scales` uint8 (the bytes of
float32 [in]). Never `weight`: a loader that does not know us must report it missing. All are uint8, so `.to(dtype)` and loaders that cast floating tensors
leave them alone; the bias is a parameter like any other.
"""

from __future__ import annotations

import torch
from torch import nn

from . import ops
from .stored import StoredForm, quantize_weight

__all__ = ["QuantConv", "QuantLinear"]


def _bytes(device, *shape):
    return torch.empty(shape, dtype=torch.uint8, device=device)


def _has_autocast(kind):
    """Some devices have none and refuse the question, as meta does."""
    return kind == "cpu" or torch.amp.is_autocast_available(kind)


class _Quantized(nn.Module):
    """What both kinds share: the stored weight, seen as a matrix [rows, cols]. time_groups: of the layer's input, where the container has some."""

    time_groups = None

    def __init__(self, rows, cols, form, bias, device=None):
        super().__init__()
        self.form, self.rows, self.cols = form, rows, cols
        n_codes, n_params = form.row_bytes(cols)
        self.register_buffer("qweight", _bytes(device, rows, n_codes))
        self.register_buffer("qparams", _bytes(device, rows, n_params))
        self.register_buffer("qinput_scales", _bytes(device, 4 * cols) if form.equalized else None)
        self.register_parameter("bias", bias)

    def set_stored(self, qweight, qparams, input_scales=None):
        """Takes over stored tensors of the shapes that the form asks for.

        >>> import torch
        >>> from arrow_quant_v2.torch import QuantLinear, StoredForm
        >>> a = QuantLinear.from_linear(torch.nn.Linear(256, 64), StoredForm())
        >>> b = QuantLinear(256, 64, StoredForm())
        >>> b.set_stored(a.qweight, a.qparams)
        >>> torch.equal(a.matrix(), b.matrix())
        True
        """
        for name, value in (("qweight", qweight), ("qparams", qparams), ("qinput_scales", input_scales)):
            have = getattr(self, name)
            if (value is None) != (have is None) or (value is not None and value.shape != have.shape):
                raise ValueError(
                    f"{name} must have the shape {None if have is None else tuple(have.shape)}, not {None if value is None else tuple(value.shape)}"
                )
            setattr(self, name, value)

    def input_scales(self):
        """Scales of the inputs, float32 [cols], or None.

        >>> from arrow_quant_v2.torch import QuantLinear, StoredForm
        >>> QuantLinear(256, 64, StoredForm(equalized=True)).input_scales().shape
        torch.Size([256])
        """
        return None if self.qinput_scales is None else self.qinput_scales.clone().view(torch.float32)

    def matrix(self):
        """The weight that the layer stands for, float32 [rows, cols], equalization and rotation undone.

        >>> import torch
        >>> from arrow_quant_v2.torch import QuantLinear, StoredForm
        >>> linear = torch.nn.Linear(256, 64)
        >>> layer = QuantLinear.from_linear(linear, StoredForm(bits=8))
        >>> bool((layer.matrix() - linear.weight).abs().max() < 0.001)
        True
        """
        form = self.form
        values = ops.unpacked(self.qweight, self.qparams, self.cols, form.bits, form.group_size, form.params)
        if form.hadamard:
            values = ops.rotate(values, form.hadamard)
        return values if self.qinput_scales is None else values * self.input_scales()

    def _describe(self):
        extra = "".join([f", hadamard={self.form.hadamard}" if self.form.hadamard else "", ", equalized" if self.form.equalized else ""])
        return f"bits={self.form.bits}, group_size={self.form.group_size}, params={self.form.params}{extra}, bias={self.bias is not None}"


class QuantLinear(_Quantized):
    """A linear layer over packed codes: y = x W^T + b, [..., in_features] to [..., out_features].

    On the CPU the C library multiplies by the codes a panel at a time; no float copy of the weight is made. On other devices the weight is unpacked for the
    call. The input's dtype (under autocast: autocast's) is the output's; the CPU works in float32 inside.

    >>> import torch
    >>> from arrow_quant_v2.torch import QuantLinear, StoredForm
    >>> layer = QuantLinear.from_linear(torch.nn.Linear(256, 64), StoredForm(bits=4))
    >>> layer(torch.ones(2, 256)).shape, layer.qweight.shape
    (torch.Size([2, 64]), torch.Size([64, 128]))
    """

    def __init__(self, in_features, out_features, form: StoredForm, bias=None, device=None):
        super().__init__(out_features, in_features, form, bias, device)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_linear(cls, linear, form, method="search"):
        """Quantizes the weight of a torch.nn.Linear; its bias is shared.

        >>> import torch
        >>> from arrow_quant_v2.torch import QuantLinear, StoredForm
        >>> QuantLinear.from_linear(torch.nn.Linear(256, 64), StoredForm(bits=8, group_size=64), method='rtn')
        QuantLinear(256 -> 64, bits=8, group_size=64, params=f16, bias=True)
        """
        qweight, qparams, form = quantize_weight(linear.weight, form, method)
        layer = cls(linear.in_features, linear.out_features, form, linear.bias, "meta")
        device = linear.weight.device
        layer.set_stored(qweight.to(device), qparams.to(device))
        return layer

    @property
    def weight(self):
        """The values that the layer stands for, float32, made anew at each access: for code that looks at `layer.weight.dtype` or `.device`."""
        return self.matrix()

    def forward(self, x):
        # At one row of x microseconds count: no attribute is asked of nn.Module (1 µs each), and the operator goes past torch's dispatcher where it may.
        form, kind = self.form, "cpu" if x.is_cpu else x.device.type
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} features, the layer {self.in_features}")
        if _has_autocast(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if form.equalized:
            x = (x.float() * self.input_scales()).to(x.dtype)
        if form.hadamard:
            x = ops.rotate(x, form.hadamard)
        if not torch.compiler.is_compiling():
            buffers = self._buffers
            y = ops.linear_now(x, buffers["qweight"], buffers["qparams"], self._parameters.get("bias"), form) if "bias" in self._parameters else None
            if y is not None:
                return y
        return ops.linear(x, self.qweight, self.qparams, self.bias, form.bits, form.group_size, form.params)

    def extra_repr(self):
        return f"{self.in_features} -> {self.out_features}, {self._describe()}"


class QuantConv(_Quantized):
    """A convolution (1 to 3 dimensions) over packed codes; the weight is unpacked for each call: it saves memory, not time.

    conv: the layer whose shape and settings it takes over; load_into and quantize_module put such layers in place.

    >>> import torch
    >>> from arrow_quant_v2.torch import QuantConv, quantize_module
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, padding=1))
    >>> isinstance(quantize_module(model, modality='image')[0], QuantConv), model(torch.ones(1, 16, 8, 8)).shape
    (True, torch.Size([1, 32, 8, 8]))
    """

    def __init__(self, conv, form: StoredForm, device=None):
        super().__init__(conv.weight.shape[0], conv.weight[0].numel(), form, conv.bias, device)
        self.weight_shape, self.padding_mode = tuple(conv.weight.shape), conv.padding_mode
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self._reversed_padding = list(conv._reversed_padding_repeated_twice)

    @property
    def weight(self):
        """As QuantLinear.weight, in the shape of the convolution."""
        return self.matrix().view(self.weight_shape)

    def forward(self, x):
        kind = x.device.type
        if _has_autocast(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = nn.functional.pad(x, self._reversed_padding, mode=self.padding_mode), 0
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(self.weight_shape) - 3]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return convolve(x, self.weight.to(x.dtype), bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self):
        return f"{list(self.weight_shape)}, stride={self.stride}, {self._describe()}"
