"""What the quantization backends of diffusers and transformers share: settings, which layers are chosen, and putting layers in place.

Both libraries build the model on the meta device, hand us the skeleton, and load tensors by name. On a first load each chosen weight is quantized as it arrives
(methods without data: 'search' or 'rtn') and its layer replaced. A saved folder holds our buffers and, in config.json, the stored form of each layer, so on the
second load the layers are put in place first and their buffers loaded by name.
"""

from __future__ import annotations

import copy
import warnings
from enum import StrEnum

from . import _core

_FIELDS = {"bits": 4, "group": 128, "params": "auto", "method": "search", "modules_to_not_convert": None, "layers": None}


class Method(StrEnum):
    ARROWQUANT = "arrowquant"


class Settings:
    """The fields of ArrowQuantConfig, the same for both libraries; mixed into their configuration classes.

    bits: 2, 4 or 8; group: 32, 64, 128 or 256; params: 'auto', 'f16', 'f32' or 'two-level'; method: 'search' or 'rtn'; modules_to_not_convert: parts of module
    names that stay as they are; layers: the stored form of each layer of a saved model (written by save_pretrained).

    >>> from arrow_quant_v2.diffusers import ArrowQuantConfig
    >>> ArrowQuantConfig(bits=8, group=64).to_diff_dict()
    {'quant_method': 'arrowquant', 'bits': 8, 'group': 64}
    """

    def __init__(self, bits=4, group=128, params="auto", method="search", modules_to_not_convert=None, layers=None, quant_method=None, **unknown):
        self.quant_method = Method.ARROWQUANT
        values = dict(bits=bits, group=group, params=params, method=method, modules_to_not_convert=modules_to_not_convert, layers=layers)
        self._set(values, unknown)

    def _set(self, values, unknown):
        if values["method"] not in ("search", "rtn"):
            raise _core.ConfigurationError(
                f"Invalid method: '{values['method']}'. Quantizing on load sees one weight at a time: 'search' or 'rtn'. "
                "Methods with calibration: arrow_quant_v2.quantize, then arrow_quant_v2.torch.load_into"
            )
        config = _core.DiffusionQuantConfig(bit_width=values["bits"], group_size=values["group"])
        config.params = values["params"]
        config.method = values["method"]
        config.validate()
        unknown.pop("quant_method", None)
        if unknown:
            warnings.warn(f"quantization_config: unknown keys of a newer version are ignored: {', '.join(sorted(unknown))}", stacklevel=4)
        for name in _FIELDS:
            setattr(self, name, values[name])

    def to_dict(self):
        """All fields, as config.json holds them.

        >>> from arrow_quant_v2.diffusers import ArrowQuantConfig
        >>> ArrowQuantConfig(bits=8).to_dict()['bits']
        8
        """
        return {"quant_method": self.quant_method.value, **{name: copy.deepcopy(getattr(self, name)) for name in _FIELDS}}

    def to_diff_dict(self):
        """The fields that differ from the defaults, and the method's name.

        >>> from arrow_quant_v2.diffusers import ArrowQuantConfig
        >>> ArrowQuantConfig().to_diff_dict()
        {'quant_method': 'arrowquant'}
        """
        return {name: value for name, value in self.to_dict().items() if name == "quant_method" or value != _FIELDS[name]}

    def form(self):
        """The stored form asked for.

        >>> from arrow_quant_v2.diffusers import ArrowQuantConfig
        >>> ArrowQuantConfig(bits=2).form().params
        'two-level'
        """
        from .torch.stored import StoredForm

        two_level = self.params == "two-level" or (self.params == "auto" and self.bits == 2)
        if two_level and self.bits != 8:
            return StoredForm(self.bits, 256, "two-level")
        return StoredForm(self.bits, self.group, "f32" if self.params == "f32" else "f16")


def require_accelerate(library):
    """accelerate is what both libraries build models on the meta device with."""
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise ImportError(f"loading a quantized model with {library} needs the package accelerate: pip install accelerate")


def is_chosen(model, weight_name, skip):
    """Whether the weight of this name is a linear layer's that is to be quantized."""
    from torch import nn

    owner, _, attribute = weight_name.rpartition(".")
    if attribute != "weight" or any(part and part in owner for part in skip or ()):
        return False
    try:
        layer = model.get_submodule(owner)
    except AttributeError:
        return False
    return type(layer) is nn.Linear and _core._is_layer(weight_name, list(layer.weight.shape))


def replace_with_quantized(model, weight_name, value, config, device=None):
    """Quantizes an arriving weight and puts its layer into the model; the layer's bias is taken over, loaded or not. Notes the form in config.layers."""
    from .torch.modules import QuantLinear
    from .torch.stored import quantize_weight

    owner = weight_name.rpartition(".")[0]
    linear = model.get_submodule(owner)
    qweight, qparams, form = quantize_weight(value, config.form(), config.method)
    layer = QuantLinear(linear.in_features, linear.out_features, form, linear.bias, "meta")
    layer.set_stored(qweight.to(device or "cpu"), qparams.to(device or "cpu"))
    layer.requires_grad_(False)
    model.set_submodule(owner, layer)
    config.layers = {**(config.layers or {}), owner: form.to_dict()}


def place_empty(model, config):
    """Puts empty layers of the stored forms into the skeleton of a saved model; their buffers are loaded by name."""
    from torch import nn

    from .torch.modules import QuantLinear
    from .torch.stored import StoredForm

    for owner, stored in (config.layers or {}).items():
        try:
            linear = model.get_submodule(owner)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise _core.FormatError(f"quantization_config: layer '{owner}' is no linear layer of this model; config.json belongs to another model")
        known = {name: value for name, value in stored.items() if name in StoredForm.__dataclass_fields__}
        layer = QuantLinear(linear.in_features, linear.out_features, StoredForm(**known), linear.bias, "meta")
        model.set_submodule(owner, layer.requires_grad_(False))


def dequantize(model, dtype):
    """Puts plain linear layers back in the place of ours."""
    import torch
    from torch import nn

    from .torch.modules import QuantLinear

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.matrix().to(dtype or torch.float32), requires_grad=False)
        linear.bias = layer.bias
        model.set_submodule(name, linear)
    return model
