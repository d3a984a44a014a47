"""ArrowQuant as a quantization backend of transformers (text encoders, diffusion language models): importing this module registers it.

    import arrow_quant_v2.transformers
    from arrow_quant_v2.transformers import ArrowQuantConfig
    model = AutoModel.from_pretrained(folder, quantization_config=ArrowQuantConfig(bits=4))
    model.save_pretrained("t5-int4")

Without this import transformers only warns about a saved folder and leaves its layers RANDOM; the folder's README says so too.
"""

from __future__ import annotations

import os

try:
    import transformers
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as _error:
    raise ImportError(f"arrow_quant_v2.transformers needs transformers 5.0 or newer ({_error}): pip install -U transformers accelerate") from _error

from . import _huggingface

__all__ = ["ArrowQuantConfig", "ArrowQuantizer"]

_WARNING = """
This folder is quantized by ArrowQuant. Before loading it, run `import arrow_quant_v2.transformers`:
without that import transformers leaves the quantized layers at random values, with no more than a warning.
"""


class ArrowQuantConfig(_huggingface.Settings, QuantizationConfigMixin):
    __doc__ = (_huggingface.Settings.__doc__ or "").replace(".diffusers", ".transformers")


class _Quantize(ConversionOps):
    """The step that transformers runs on a weight that param_needs_quantization named."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    def convert(self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs):
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        _huggingface.replace_with_quantized(model, full_layer_name, value, self.quantizer.quantization_config, value.device)
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        layer._is_hf_initialized = True
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class ArrowQuantizer(HfQuantizer):
    """Quantizes linear layers on load, or puts the layers of a saved model in place.

    >>> from arrow_quant_v2.transformers import ArrowQuantConfig, ArrowQuantizer
    >>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
    >>> AUTO_QUANTIZER_MAPPING['arrowquant'] is ArrowQuantizer
    True
    >>> type(AutoHfQuantizer.from_config(ArrowQuantConfig(bits=8))).__name__
    'ArrowQuantizer'
    """

    requires_calibration = False

    def validate_environment(self, *args, **kwargs):
        """accelerate is there."""
        _huggingface.require_accelerate("transformers")

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        self.modules_to_not_convert = self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules, True)
        if self.pre_quantized:
            _huggingface.place_empty(model, config)
        else:
            config.layers = None

    def param_needs_quantization(self, model, param_name, **kwargs):
        """Weights that arrive to be quantized."""
        return not self.pre_quantized and _huggingface.is_chosen(model, param_name, self.modules_to_not_convert)

    def get_quantize_ops(self):
        """What is run on them."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model, **kwargs):
        save = model.save_pretrained

        def save_pretrained(save_directory, *args, **kwargs):
            result = save(save_directory, *args, **kwargs)
            with open(os.path.join(save_directory, "README.md"), "a", encoding="utf-8") as readme:
                readme.write(_WARNING)
            return result

        model.save_pretrained = save_pretrained
        return model

    def _dequantize(self, model, dtype=None):
        return _huggingface.dequantize(model, dtype)

    def is_serializable(self, *args, **kwargs):
        """Our buffers are plain tensors."""
        return True

    @property
    def is_trainable(self):
        """Gradients pass through the layers (adapters can be trained); the codes are constant."""
        return True

    @property
    def is_compileable(self):
        """The layers call registered operators."""
        return True


def _register():
    for table, register, ours in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, ArrowQuantConfig),
        (AUTO_QUANTIZER_MAPPING, register_quantizer, ArrowQuantizer),
    ):
        theirs = table.get("arrowquant")
        if theirs is None:
            register("arrowquant")(ours)
        elif (theirs.__module__, theirs.__qualname__) == (ours.__module__, ours.__qualname__):
            table["arrowquant"] = ours  # this module, imported again
        else:
            raise ImportError(f"transformers {transformers.__version__} already has a quantization backend 'arrowquant' ({theirs.__module__})")


_register()
