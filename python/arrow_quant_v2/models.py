"""Whole models: ArrowQuantV2's methods that read and write files, and the same as functions.

They check paths, run the library's job and give its report the fixed form: nothing is computed here.
"""

from __future__ import annotations

import os

from . import _core, _jobs
from ._core import ArrowQuantError, FormatError, MetadataError
from ._progress import Callback

__all__ = ["ArrowQuantV2", "quantize_diffusion_model"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ._core import DiffusionQuantConfig, PyArrowQuantizedLayer
    from ._types import Path, ProgressCallback


MODALITIES = "'text', 'code', 'image', or 'audio'"


def run_quantize(mode, model_path, output_path, config, progress_callback, first_message="Starting quantization...", keep_going=None):
    """Runs the job; returns (output path, its report as a dict)."""
    told = Callback(progress_callback, keep_going)
    told.tell(first_message, 0.0)
    config = _jobs.config_of(config, None, {}, "quantize_diffusion_model")
    config.validate()
    needs_modality = mode != "base"
    if not needs_modality:
        config.enable_time_aware = config.enable_spatial = False
    model, output = _jobs.require_model(model_path), _jobs.path_of(output_path)
    options = {"require_modality": needs_modality, "overwrite": True, "make_parents": True}
    try:
        try:
            report = _core.run_quantize(model, output, config, told, _jobs.log, **options)
        except ArrowQuantError as error:
            if "restart=True" not in (error.hint or ""):
                raise
            # Found before any work: what an interrupted run left has other settings or another source, so that it cannot be continued.
            _jobs.log(30, f"{error}; the state is discarded and the run starts anew")
            report = _core.run_quantize(model, output, config, told, _jobs.log, restart=True, **options)
    except FormatError as error:
        if needs_modality and of_metadata(error, model, config):
            raise metadata_error(error) from None
        raise
    told.tell("Quantization complete", 1.0)
    return output, _jobs.report_of(report)


def of_metadata(error, model, config):
    """True when the model was refused for what its metadata says, or fails to say, about the modality."""
    if error.file and os.path.basename(error.file) == "metadata.json":
        return True
    if config.modality is not None:
        return False
    try:
        return _core.Model(model).modality() is None
    except Exception:  # noqa: BLE001 - it is refused for another reason, which the first error tells
        return False


def metadata_error(error):
    text = str(error)
    if "metadata" not in text:
        text += " (metadata)"
    if not all(word in text for word in ("'text'", "'code'", "'image'", "'audio'")):
        text += f". The metadata must name the modality: {MODALITIES}"
    new = MetadataError(text)
    new.file, new.tensor, new.hint = error.file, error.tensor, error.hint
    return new


def result_of(output_path, report):
    """The result dict of python-api 3.1 from the report "arrowquant.quantize/1"."""
    summary = report["summary"]
    worst = summary["worst"]
    layers = {layer["name"]: {key: layer[key] for key in LAYER_KEYS} for layer in report["layers"]}
    for kept in report["kept"]:
        if kept.get("fallback_from"):  # the last step of the ladder: kept in its own type
            bits = 32 if kept["dtype"] in ("F32", "F64") else 16
            layers[kept["name"]] = dict.fromkeys(LAYER_KEYS) | {
                "bits": bits,
                "method": "keep",
                "bytes": kept["bytes"],
                "fallback_from": kept["fallback_from"],
            }
    return {
        "quantized_path": output_path,
        "compression_ratio": summary["compression_ratio"],
        "cosine_similarity": summary["cosine"],
        "model_size_mb": summary["model_size_mb"],
        "modality": report["input"]["modality"] or "unknown",
        "bit_width": summary["bit_width"] or kept_bits(layers.values()),
        "quantization_time_s": report["time"]["elapsed_s"],
        "bits_per_weight": summary["bits_per_weight"],
        "per_layer": layers,
        "fallbacks": summary["fallbacks"],
        "calibrated": summary["calibrated"],
        "target_met": summary["target_met"],
        "worst_layer": worst["name"] if worst else None,
    }


def kept_bits(layers):
    """Where every layer fell back to its own type: that type's bits, the most frequent ones. None without layers."""
    bits = [layer["bits"] for layer in layers]
    return max(sorted(set(bits)), key=bits.count, default=None)


LAYER_KEYS = ("bits", "group_size", "method", "cosine", "sqnr_db", "output_sqnr_db", "bytes", "fallback_from", "compared_with")


def run_validate(original_path, quantized_path, keep_going=None, min_accuracy=-1.0, bit_width=None):
    original, quantized = _jobs.require_model(original_path), _jobs.require_model(quantized_path)
    tick = None if keep_going is None else lambda *_: keep_going()
    report = _jobs.report_of(_core.run_verify(quantized, original, tick, _jobs.log, min_accuracy=min_accuracy))
    summary = report["summary"]
    measured = {t["name"]: t["cosine"] for t in report["tensors"] if t["bits"] is not None and t["measured"] == "against"}
    others = [t for t in report["tensors"] if bit_width is not None and t["bits"] not in (None, bit_width)]
    return {
        "cosine_similarity": summary["cosine"],
        "compression_ratio": summary["compression_ratio"],
        "model_size_mb": summary["model_size_mb"],
        "per_layer_accuracy": measured,
        "passed": report["ok"] and not others,
        "problems": report["problems"] + [f"{t['name']} has {t['bits']} bits, expected {bit_width}" for t in others],
    }


class ArrowQuantV2(_core.ArrowQuantV2):
    __doc__ = _core.ArrowQuantV2.__doc__

    _markov: str | None = None  # figures of the last time-aware run, as JSON

    def __reduce__(self):
        return type(self), (self.mode,), self.__dict__ or None

    def _run(self, model_path, output_path, config, progress_callback, *first_message):
        output, report = run_quantize(self.mode, model_path, output_path, config, progress_callback, *first_message)
        figures = markov_of(output, 0.3 if config is None else config.smoothness_threshold)
        if figures is not None:
            self._markov = figures
        return output, report

    def quantize_diffusion_model(
        self,
        model_path: Path,
        output_path: Path,
        config: DiffusionQuantConfig | None = None,
        progress_callback: ProgressCallback | None = None,
        use_arrow: bool | None = None,
    ) -> Any:
        """Quantizes a model into a container folder.

        model_path: a .safetensors file, a *.safetensors.index.json, or a model folder; output_path: the folder to write, parents are created. An existing
        container there is replaced when the new one is complete; an interrupted run is continued if its settings and source are the same, else discarded.
        config: DiffusionQuantConfig or None; progress_callback(message, fraction): fractions rise from 0 to 1.
        Returns a dict: quantized_path, compression_ratio (source bytes / written bytes of the same tensors), cosine_similarity (mean over quantized layers,
        weighted by size), model_size_mb (2**20 bytes), modality, bit_width (the most frequent), quantization_time_s, bits_per_weight, per_layer {name: {bits,
        group_size, method, cosine, sqnr_db, output_sqnr_db, bytes, fallback_from, compared_with}}, fallbacks {method: count}, calibrated, target_met,
        worst_layer; what was not measured is None. With use_arrow=True a PyArrowQuantizedLayer over what was written.
        Raises ModelNotFoundError, MetadataError, ConfigurationError, QuantizationError, ValidationError.

        >>> import arrow_quant_v2 as aq
        >>> result = aq.ArrowQuantV2().quantize_diffusion_model('examples/dit-fashion', 'dit-int4')
        >>> result['bit_width'], result['modality'], result['cosine_similarity'] > 0.98
        (4, 'image', True)
        """
        output, report = self._run(model_path, output_path, config, progress_callback)
        return layer_of(output) if use_arrow else result_of(output, report)

    def quantize_diffusion_model_arrow(
        self, model_path: Path, output_path: Path, config: DiffusionQuantConfig | None = None, progress_callback: ProgressCallback | None = None
    ) -> PyArrowQuantizedLayer:
        """The same as quantize_diffusion_model(..., use_arrow=True): returns a PyArrowQuantizedLayer over what was written.

        >>> import arrow_quant_v2 as aq
        >>> layer = aq.ArrowQuantV2().quantize_diffusion_model_arrow('examples/dit-fashion', 'dit-int4')
        >>> 'transformer_blocks.0.ff.net.2.weight' in layer.layers
        True
        """
        output, _ = self._run(model_path, output_path, config, progress_callback)
        return layer_of(output)

    def quantize_from_safetensors(
        self, safetensors_path: Path, output_path: Path, config: DiffusionQuantConfig | None = None, progress_callback: ProgressCallback | None = None
    ) -> dict[str, Any]:
        """Quantizes a .safetensors file, a *.safetensors.index.json, or a folder with either; arguments and result as of quantize_diffusion_model.

        >>> import arrow_quant_v2 as aq
        >>> weights = 'examples/dit-fashion/transformer/diffusion_pytorch_model.safetensors'
        >>> result = aq.ArrowQuantV2('base').quantize_from_safetensors(weights, 'dit-weights-int4')
        >>> result['compression_ratio'] > 1
        True
        """
        output, report = self._run(safetensors_path, output_path, config, progress_callback, "Starting SafeTensors quantization...")
        return result_of(output, report)

    def validate_quality(self, original_path: Path, quantized_path: Path) -> dict[str, Any]:
        """Compares a container with the model it was made from, every layer dequantized.

        Returns a dict: cosine_similarity, compression_ratio, model_size_mb, per_layer_accuracy {layer name: cosine}, passed, problems (one sentence each). A
        layer passes at the accuracy of the container's stored configuration.
        Raises ModelNotFoundError, QuantizationError.

        >>> import arrow_quant_v2 as aq
        >>> aq.ArrowQuantV2().validate_quality('examples/dit-fashion', 'dit-int4')['passed']
        True
        """
        return run_validate(original_path, quantized_path)

    def get_markov_metrics(self) -> dict[str, Any] | None:
        """How smooth the time-group parameters are that the last time-aware run of this object stored, those of the worst layer; None before such a run.

        A dict, in the terms of python-api section 6: smoothness_score 0..1, boundary_scores (one per boundary), violation_count, violations (list of dict
        boundary_idx, scale_jump, zero_point_jump, severity 'low', 'medium' or 'high'), is_valid. A violation is a relative jump of the scale above the
        configuration's smoothness_threshold.

        >>> import arrow_quant_v2 as aq
        >>> aq.ArrowQuantV2().get_markov_metrics() is None
        True
        """
        return None if self._markov is None else _jobs.loads(self._markov)


def quantize_diffusion_model(
    model_path: Path,
    output_path: Path,
    config: DiffusionQuantConfig | None = None,
    progress_callback: ProgressCallback | None = None,
    use_arrow: bool | None = None,
) -> Any:
    """One-shot form of ArrowQuantV2().quantize_diffusion_model, with the same arguments and result.

    >>> import arrow_quant_v2 as aq
    >>> sorted(aq.quantize_diffusion_model('examples/dit-fashion', 'dit-int4'))[:3]
    ['bit_width', 'bits_per_weight', 'calibrated']
    """
    return ArrowQuantV2().quantize_diffusion_model(model_path, output_path, config, progress_callback, use_arrow)


def markov_of(container_path, threshold):
    """Figures of the stored time groups of the worst layer, as JSON; None where no layer has any."""
    import json

    container = _core.Container(container_path)
    try:
        tables = {json.dumps(container.time_groups(i)) for i in range(len(container.names()))} - {"null"}
    finally:
        container.close()
    figures = [_core._time_metrics(json.loads(table), threshold) for table in sorted(tables)]
    return json.dumps(min(figures, key=lambda f: (f["smoothness_score"], -f["violation_count"]))) if figures else None


def layer_of(container_path):
    """A PyArrowQuantizedLayer over a written container."""
    container = _core.Container(container_path)
    try:
        return container.arrow()
    finally:
        container.close()


for _member in (ArrowQuantV2, quantize_diffusion_model):
    _member.__module__ = "arrow_quant_v2"
