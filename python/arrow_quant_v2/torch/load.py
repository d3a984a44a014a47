"""Loading a quantized model into a module, and quantizing a module in place: `load_into`, `quantize_module`.

The container's codes are used where they lie in its memory-mapped files. Names are strict: every tensor of the container has its place in the module and the
other way round.
"""

from __future__ import annotations

import os
import tempfile

import torch
from torch import nn

from .. import _core
from ..reader import Reader
from .modules import QuantConv, QuantLinear
from .stored import StoredForm, as_tensor

__all__ = ["load_into", "quantize_module"]

_TORCH_TYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "f8_e4m3": torch.float8_e4m3fn,
    "f8_e5m2": torch.float8_e5m2,
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _form_of(info):
    group = info["group_size"]
    return StoredForm(info["bits"], group, info["params"], info.get("hadamard_group") or 0, info.get("input_scales") is not None)


def _quantized_layer(module, container, index, info):
    """The layer that takes the place of `module`, or None when its stored form has no layer that runs on codes."""
    if info["axis"] != 1 or not isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return None
    form = _form_of(info)
    layer = (
        QuantConv(module, form, "meta")
        if isinstance(module, _CONVOLUTIONS)
        else QuantLinear(module.in_features, module.out_features, form, module.bias, "meta")
    )
    scales = info.get("input_scales")
    layer.set_stored(
        as_tensor(container.data(index)).view(layer.rows, -1),
        as_tensor(container.params(index)).view(layer.rows, -1),
        None if scales is None else torch.tensor(scales, dtype=torch.float32).view(torch.uint8),
    )
    layer.time_groups = info["time_groups"]
    return layer


def _kept_tensor(container, index, info, name):
    kind = _TORCH_TYPES.get(info["quant_type"])
    if kind is None:
        raise ValueError(f"tensor {name!r} is stored as {info['quant_type']}, which torch has no type for")
    data = as_tensor(container.data(index)).clone()  # aligned, and writable like any parameter
    return (data.view(kind) if data.numel() else torch.empty(0, dtype=kind)).view(tuple(info["shape"]))


def _place(module, name):
    owner, _, attribute = name.rpartition(".")
    try:
        return module.get_submodule(owner), attribute
    except AttributeError:
        return None, attribute


def _tied(expected, names):
    """{name that the model does not hold: the name that it holds for the same parameter}: saved models hold a tied weight once."""
    held = {id(value): name for name, value in expected.items() if name in names}
    return {name: held[id(value)] for name, value in expected.items() if name not in names and id(value) in held}


def _list(names, most=10):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load_into(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    prefix: str = "",
    strict: bool = True,
    dtype: torch.dtype | None = None,
    activations: str | None = None,
    timestep="timestep",
) -> nn.Module:
    """Loads a quantized model (a container folder) into `module`, in place, and returns it: linear and convolution layers that are stored as codes become
    QuantLinear and QuantConv, all other tensors are copied into the parameters and buffers that bear their names.

    prefix: what stands before the module's own names in the container. dtype: of the kept floating tensors; None: that of the module's parameter, or where
    the module is on the meta device that of the file. strict=False leaves out what only one side has. A module on the meta device is filled.
    activations: 'time', 'static' or 'dynamic' makes the layers run on integers as integer_activations does, which also tells what `timestep` is; None: they run
    in floating point. Raises ModelNotFoundError, FormatError; ValueError that lists the names that only one side has, or where the
    module is itself a layer, which cannot be replaced in place; ShapeMismatchError.

    >>> import arrow_quant_v2 as aq
    >>> from arrow_quant_v2.torch import load_into
    >>> from diffusers import DiTTransformer2DModel
    >>> r = aq.quantize('examples/dit-fashion', 'dit-int8', bits=8, overwrite=True)
    >>> config = DiTTransformer2DModel.load_config('examples/dit-fashion/transformer')
    >>> model = load_into(DiTTransformer2DModel.from_config(config), 'dit-int8')
    >>> type(model.transformer_blocks[0].attn1.to_q).__name__
    'QuantLinear'
    """
    with Reader(path) as reader:
        container, names = reader._container, {n.removeprefix(prefix): i for n, i in reader._index.items() if n.startswith(prefix)}
        expected = module.state_dict(keep_vars=True)
        tied = _tied(expected, names)
        missing, unexpected = set(expected) - set(names) - set(tied), set(names) - set(expected)
        if strict and (missing or unexpected):
            parts = [f"the module has no {_list(unexpected)}"] if unexpected else []
            parts += [f"the model has no {_list(missing)}"] if missing else []
            raise ValueError(f"{os.fspath(path)}: names differ: {'; '.join(parts)}. Give prefix=, or strict=False to leave these out")
        for name, index in names.items():
            if name not in expected:
                continue
            info, have = container.info(index), expected[name]
            if list(have.shape) != info["shape"]:
                raise _core.ShapeMismatchError(f"{os.fspath(path)}: tensor {name!r} has the shape {info['shape']}, the module expects {list(have.shape)}")
            if name == "weight" and info["quantized"] and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                raise ValueError(f"{os.fspath(path)}: the module is itself the layer that would be replaced; give its parent, such as nn.Sequential(layer)")
        for name, index in names.items():  # everything agrees: from here on the module changes
            if name in expected:
                _load_tensor(module, name, container, index, expected[name], dtype)
        for name, first in tied.items():
            (owner, attribute), (source, its) = _place(module, name), _place(module, first)
            setattr(owner, attribute, getattr(source, its))
    if activations is not None:
        from .activations import integer_activations

        integer_activations(module, activations, timestep=timestep)
    return module


def _load_tensor(module, name, container, index, have, dtype):
    info = container.info(index)
    owner, attribute = _place(module, name)
    if info["quantized"]:
        layer = _quantized_layer(owner, container, index, info) if attribute == "weight" else None
        if layer is not None:
            if have.device.type != "meta":
                layer = layer.to(have.device)
            layer.train(owner.training)
            module.set_submodule(name.rpartition(".")[0], layer)
            return
        value = torch.frombuffer(container.dequantize(index), dtype=torch.float32).view(tuple(info["shape"])).clone()
    else:
        value = _kept_tensor(container, index, info, name)
    meta = have.device.type == "meta"
    if value.is_floating_point():
        value = value.to(dtype or (value.dtype if meta else have.dtype))
    value = value if meta else value.to(have.device)
    if isinstance(have, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(value, requires_grad=have.requires_grad and value.is_floating_point()))
    else:
        owner._buffers[attribute] = value


def quantize_module(module: nn.Module, config=None, *, folder: str | os.PathLike | None = None, **settings) -> nn.Module:
    """Quantizes a module in place by the same job as arrow_quant_v2.quantize, and returns it: its state is written to a temporary model folder, quantized,
    and loaded back with load_into.

    config: a DiffusionQuantConfig; settings: as for arrow_quant_v2.quantize (bits=4, group=64, calib='file', modality='image', …). folder: where the quantized
    model is kept; None: a temporary folder, whose files live as long as the module maps them (on systems that cannot remove open files: until the end of
    the process). Raises what arrow_quant_v2.quantize raises.

    >>> import torch
    >>> from arrow_quant_v2.torch import quantize_module
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    >>> quantize_module(model, bits=8, modality='image')[0]
    QuantLinear(256 -> 128, bits=8, group_size=128, params=f16, bias=True)
    """
    from safetensors.torch import save_file

    from ..short import quantize

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        source = os.path.join(scratch, "model.safetensors")
        seen, tensors = {}, {}
        for name, tensor in module.state_dict().items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
            tensors[name] = tensor.detach().cpu().contiguous().clone() if key in seen else tensor.detach().cpu().contiguous()
            seen[key] = name
        save_file(tensors, source)
        out = os.path.join(scratch, "quantized") if folder is None else os.fspath(folder)
        quantize(source, out, config=config, **settings)
        return load_into(module, out)
