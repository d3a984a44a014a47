"""The torch operators `arrowquant::linear`, `arrowquant::unpack` and `arrowquant::rotate`: on the CPU the C library, elsewhere torch operations.

Registered as custom operators with shape functions and a gradient for the input, so torch.compile, export, autocast and training of what stands
around the layer work. The weight itself is constant.
"""

from __future__ import annotations

import torch

from .. import _core
from . import threads
from .stored import StoredForm, unpack

__all__ = ["linear", "linear_now", "rotate", "unpacked"]

threads.lend()
_library = torch.library.Library("arrowquant", "DEF")
_library.define("linear(Tensor x, Tensor qweight, Tensor qparams, Tensor? bias, int bits, int group_size, str params) -> Tensor")
_library.define("unpack(Tensor qweight, Tensor qparams, int cols, int bits, int group_size, str params) -> Tensor")
_library.define("rotate(Tensor x, int size) -> Tensor")

linear = torch.ops.arrowquant.linear
unpacked = torch.ops.arrowquant.unpack
rotate = torch.ops.arrowquant.rotate


@torch.library.register_fake("arrowquant::linear", lib=_library)
def _(x, qweight, qparams, bias, bits, group_size, params):
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


@torch.library.register_fake("arrowquant::unpack", lib=_library)
def _(qweight, qparams, cols, bits, group_size, params):
    return qweight.new_empty((qweight.shape[0], cols), dtype=torch.float32)


@torch.library.register_fake("arrowquant::rotate", lib=_library)
def _(x, size):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- any device: torch operations ----


def _linear_anywhere(x, qweight, qparams, bias, bits, group_size, params):
    weight = unpack(qweight, qparams, StoredForm(bits, group_size, params), x.shape[-1])
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _unpack_anywhere(qweight, qparams, cols, bits, group_size, params):
    return unpack(qweight, qparams, StoredForm(bits, group_size, params), cols)


_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def _rotate_anywhere(x, size):
    y = x.float().reshape(-1, size)
    h4 = torch.tensor(_H4, dtype=torch.float32, device=x.device) / 2
    step = 1
    while step < size:  # one Kronecker factor after the other
        y = torch.einsum("nakb,kl->nalb", y.view(len(y), size // (4 * step), 4, step), h4).reshape(len(y), size)
        step *= 4
    return y.view(x.shape).to(x.dtype)


_library.impl("linear", _linear_anywhere, "CompositeExplicitAutograd")
_library.impl("unpack", _unpack_anywhere, "CompositeExplicitAutograd")
_library.impl("rotate", _rotate_anywhere, "CompositeExplicitAutograd")

# ---- CPU: the C library, which works in float32 ----


def _bytes(tensor):
    # At one row of x every torch call shows: those that would do nothing are left out.
    tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
    return tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()


def _float(tensor):
    if tensor is None:
        return None
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
        tensor = tensor.to(torch.float32).contiguous()
    return _bytes(tensor)


def _linear_cpu(x, qweight, qparams, bias, bits, group_size, params):
    inputs, outputs = x.shape[-1], qweight.shape[0]
    rows = x.numel() // inputs if inputs else x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-1], outputs), dtype=torch.float32)
    form = (rows, outputs, inputs, bits, group_size, params, torch.get_num_threads())
    _core._linear_stored(_float(x), _bytes(qweight), _bytes(qparams), _float(bias), y.numpy(), *form)
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _unpack_cpu(qweight, qparams, cols, bits, group_size, params):
    values = _core._dequantize_stored(_bytes(qweight), _bytes(qparams), qweight.shape[0], cols, bits, group_size, params)
    return torch.frombuffer(values, dtype=torch.float32).view(-1, cols) if len(values) else torch.empty((qweight.shape[0], cols))


def _rotate_cpu(x, size):
    rotated = torch.from_numpy(_core._transform_input(_float(x).reshape(-1, x.shape[-1]), None, size))
    return rotated.view(x.shape).to(x.dtype)


_library.impl("rotate", _rotate_cpu, "CPU")
_library.impl("linear", _linear_cpu, "CPU")
_library.impl("unpack", _unpack_cpu, "CPU")

# ---- without the dispatcher ----

_linear_at, _threads, _grad, _default_dtype, _empty = _core._linear_at, torch.get_num_threads, torch.is_grad_enabled, torch.get_default_dtype, torch.empty
_forward_ad = torch.autograd.forward_ad
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing, _transformed, _profiled = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack, torch._C._autograd._profiler_enabled


def linear_now(x, qweight, qparams, bias, form, pairs=()):
    """linear, or None where torch has to see the operator: gradients, other devices and types, and whatever traces, transforms or records operators.

    A custom operator written in Python costs 20 µs a call, as much as half of the product of a row by a million weights. pairs: addresses of scales and zero
    points, and how many there are, where inputs are coded with 8 bits (_core._linear_at); such products have no gradient.
    """
    if type(x) is not torch.Tensor or x.dtype is not torch.float32 or not x.is_cpu or not x.is_contiguous() or x.is_neg():
        return None
    if type(qweight) is not torch.Tensor or not (qweight.is_cpu and qparams.is_cpu and qweight.is_contiguous() and qparams.is_contiguous()):
        return None
    if bias is not None and (bias.dtype is not torch.float32 or bias.numel() != qweight.shape[0] or not bias.is_cpu or not bias.is_contiguous()):
        return None
    if not pairs and _grad() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    if _forward_ad._current_level >= 0 or _dispatch_modes() or _function_modes() or _tracing() or _transformed() or _profiled():
        return None
    n, shape, outputs = x.numel(), x.shape, qweight.shape[0]
    if n == 0 or _default_dtype() is not torch.float32:
        return None
    inputs = shape[-1]
    y = _empty(outputs) if len(shape) == 1 else _empty(*shape[:-1], outputs)
    _linear_at(
        x.data_ptr(),
        qweight.data_ptr(),
        qparams.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        n // inputs,
        outputs,
        inputs,
        qweight.numel(),
        qparams.numel(),
        form.bits,
        form.group_size,
        form.params,
        _threads(),
        *pairs,
    )
    return y


# ---- gradient of the input ----


def _keep(ctx, inputs, output):
    x, qweight, qparams, bias, *ctx.form = inputs
    ctx.cols, ctx.has_bias = x.shape[-1], bias is not None and bias.requires_grad
    ctx.save_for_backward(qweight, qparams)


def _linear_backward(ctx, grad):
    qweight, qparams = ctx.saved_tensors
    weight = unpacked(qweight, qparams, ctx.cols, *ctx.form).to(grad.dtype)
    bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    return grad @ weight, None, None, bias, None, None, None


torch.library.register_autograd("arrowquant::linear", _linear_backward, setup_context=_keep, lib=_library)
torch.library.register_autograd(
    "arrowquant::rotate",
    lambda ctx, grad: (rotate(grad, ctx.size), None),  # symmetric and orthogonal: its own transpose
    setup_context=lambda ctx, inputs, output: setattr(ctx, "size", inputs[1]),
    lib=_library,
)
