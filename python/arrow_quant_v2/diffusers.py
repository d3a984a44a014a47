"""ArrowQuant as a quantization backend of diffusers: importing this module registers it.

    import arrow_quant_v2.diffusers
    from arrow_quant_v2.diffusers import ArrowQuantConfig
    model = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", quantization_config=ArrowQuantConfig(bits=4, group=64))
    model.save_pretrained("dit-int4")                      # our buffers, and quantization_config in config.json
    model = DiTTransformer2DModel.from_pretrained("dit-int4")   # after the import above: found through config.json

diffusers has no function to register a backend: two entries are put into the tables of `diffusers.quantizers.auto`.
"""

from __future__ import annotations

try:
    import diffusers
    from diffusers.quantizers import auto as _auto
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin

    _TABLES = (_auto.AUTO_QUANTIZER_MAPPING, _auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
except (ImportError, AttributeError) as _error:
    raise ImportError(f"arrow_quant_v2.diffusers needs diffusers 0.32 or newer with its quantizers ({_error}): pip install -U diffusers accelerate") from _error

from . import _huggingface

__all__ = ["ArrowQuantConfig", "ArrowQuantizer"]


class ArrowQuantConfig(_huggingface.Settings, QuantizationConfigMixin):
    __doc__ = _huggingface.Settings.__doc__


class ArrowQuantizer(DiffusersQuantizer):
    """Quantizes linear layers on load, or puts the layers of a saved model in place.

    >>> from arrow_quant_v2.diffusers import ArrowQuantConfig, ArrowQuantizer
    >>> from diffusers import DiTTransformer2DModel
    >>> settings = {'subfolder': 'transformer', 'quantization_config': ArrowQuantConfig(bits=4)}
    >>> model = DiTTransformer2DModel.from_pretrained('examples/dit-fashion', **settings)
    >>> isinstance(model.hf_quantizer, ArrowQuantizer), type(model.transformer_blocks[0].attn1.to_q).__name__
    (True, 'QuantLinear')
    """

    requires_calibration = False
    required_packages = ["accelerate"]  # type: ignore[assignment]
    use_keep_in_fp32_modules = True

    def validate_environment(self, *args, **kwargs):
        """accelerate is there."""
        _huggingface.require_accelerate("diffusers")

    def _process_model_before_weight_loading(self, model, device_map=None, keep_in_fp32_modules=(), **kwargs):
        config = self.quantization_config
        self.modules_to_not_convert = [*(config.modules_to_not_convert or ()), *(keep_in_fp32_modules or ())]
        if self.pre_quantized:
            _huggingface.place_empty(model, config)
        else:
            config.layers = None
        model.config.quantization_config = config

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs):
        """Weights that arrive to be quantized; the buffers of a saved model are loaded as any buffer is."""
        return not self.pre_quantized and _huggingface.is_chosen(model, param_name, self.modules_to_not_convert)

    def create_quantized_param(self, model, param_value, param_name, target_device, *args, **kwargs):
        """Quantizes an arriving weight."""
        _huggingface.replace_with_quantized(model, param_name, param_value, self.quantization_config, target_device)

    def _process_model_after_weight_loading(self, model, **kwargs):
        # What from_pretrained registered before the layers were known.
        model.register_to_config(quantization_config=self.quantization_config)
        return model

    def _dequantize(self, model):
        return _huggingface.dequantize(model, model.dtype)

    @property
    def supports_parallel_loading(self):
        """Layers are replaced while they are loaded: one after the other."""
        return False

    @property
    def is_serializable(self):
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
    for table, ours in zip(_TABLES, (ArrowQuantizer, ArrowQuantConfig), strict=True):
        theirs = table.setdefault("arrowquant", ours)
        if theirs is not ours and (theirs.__module__, theirs.__qualname__) != (ours.__module__, ours.__qualname__):
            raise ImportError(
                f"diffusers {diffusers.__version__} already has a quantization backend 'arrowquant' ({theirs.__module__}); ours is not registered"
            )
        table["arrowquant"] = ours


_register()
