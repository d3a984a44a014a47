"""Group sizes per layer: GranularityAllocator and EvolutionarySearch, over the library's measurements."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from . import _core, _jobs
from ._core import ConfigurationError, DiffusionQuantConfig
from ._progress import Watch, warn

__all__ = ["EvolutionarySearch", "GranularityAllocation", "GranularityAllocator", "GranularityConfig", "LayerSensitivity"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._types import Path

METHODS = ("gradient", "hessian", "variance")
SIZES = (32, 64, 128, 256)
METRICS = ("cosine_similarity", "accuracy", "compression_ratio", "balanced")


def check(holds, text):
    if not holds:
        raise ConfigurationError(text)


def is_whole(value, least):
    """NumPy's ints are ints too."""
    try:
        return _jobs.whole(value, "") >= least
    except TypeError:
        return False


def is_number(value):
    return hasattr(value, "__float__") and not isinstance(value, bool) and value == value


@dataclass
class GranularityConfig:
    """How group sizes are allocated.

    sensitivity_method: 'gradient' (needs gradients in the calibration of base_config), 'hessian' (needs calibration) or 'variance'; num_samples: changes
    nothing, and another value than 32 is a warning: statistics hold the rows that were recorded (calibrate(samples=...)); target_compression_ratio: against
    float32, where the compression of the objective counts 1; min_accuracy: no layer's estimated accuracy is below; available_group_sizes; accuracy_weight: of
    accuracy against compression, 0..1. Checked when it is used.

    >>> import arrow_quant_v2 as aq
    >>> aq.GranularityConfig().available_group_sizes
    [32, 64, 128, 256]
    """

    sensitivity_method: str = "gradient"
    num_samples: int = 32
    target_compression_ratio: float = 10.0
    min_accuracy: float = 0.70
    available_group_sizes: list[int] = field(default_factory=lambda: list(SIZES))
    accuracy_weight: float = 0.7

    def validate(self) -> None:
        """ConfigurationError names what is wrong.

        >>> import arrow_quant_v2 as aq
        >>> aq.GranularityConfig(sensitivity_method='variance').validate()
        """
        check(self.sensitivity_method in METHODS, f"Invalid sensitivity method: {self.sensitivity_method}. Must be 'gradient', 'hessian', or 'variance'")
        check(is_whole(self.num_samples, 1), f"Invalid num_samples: {self.num_samples}. Must be at least 1")
        ratio, floor, weight = self.target_compression_ratio, self.min_accuracy, self.accuracy_weight
        check(is_number(ratio) and 0 < ratio < float("inf"), f"Invalid target_compression_ratio: {ratio}. Must be above 0")
        check(is_number(floor) and 0 <= floor <= 1, f"Invalid min_accuracy: {floor}. Must be between 0.0 and 1.0")
        check(is_number(weight) and 0 <= weight <= 1, f"Invalid accuracy_weight: {weight}. Must be between 0.0 and 1.0")
        sizes = self.available_group_sizes
        check(bool(sizes), "available_group_sizes is empty")
        check(all(size in SIZES for size in sizes), f"Invalid available_group_sizes: {sizes}. Must be of 32, 64, 128, or 256")


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer: sensitivity_score 0 (robust) to 1, recommended_group_size, accuracy_impact and compression_ratio (estimates for that size).

    >>> import arrow_quant_v2 as aq
    >>> aq.LayerSensitivity('w', 0.9, 32, 0.135, 8.0).recommended_group_size
    32
    """

    layer_name: str
    sensitivity_score: float
    recommended_group_size: int
    accuracy_impact: float
    compression_ratio: float


@dataclass(frozen=True)
class GranularityAllocation:
    """Sizes per layer with estimates for them; report: everything (docs/json.md), the measured accuracy among it.

    >>> import arrow_quant_v2 as aq
    >>> aq.GranularityAllocation({'w': 64}, [], 0.9, 10.0, 0.1).layer_group_sizes['w']
    64
    """

    layer_group_sizes: dict[str, int]
    layer_sensitivities: list[LayerSensitivity]
    estimated_accuracy: float
    estimated_compression_ratio: float
    analysis_time_s: float
    report: dict[str, Any] = field(repr=False, default_factory=dict)

    def save(self, path: "Path") -> None:
        """Writes the allocation as JSON: `layers` and `summary` (docs/json.md), which `quantize --plan` reads too.

        >>> import arrow_quant_v2 as aq
        >>> aq.GranularityAllocation({}, [], 1.0, 1.0, 0.0, {'layers': {}, 'summary': {}}).save('allocation.json')
        """
        with open(_jobs.path_of(path), "w", encoding="utf-8") as f:
            json.dump(self.report, f, indent=2, ensure_ascii=False)
            f.write("\n")


class GranularityAllocator:
    """Chooses a group size for each layer by its sensitivity.

    Sensitivities come from the model's weights and, for 'gradient' and 'hessian', from the calibration that base_config.calibration_path names; what a method
    needs and is not there is a ConfigurationError that says how to collect it.

    >>> import arrow_quant_v2 as aq
    >>> allocator = aq.GranularityAllocator(aq.GranularityConfig(sensitivity_method='variance'))
    >>> a = allocator.allocate('examples/dit-fashion', aq.DiffusionQuantConfig(bit_width=2))
    >>> len(a.layer_group_sizes), a.estimated_compression_ratio > 10
    (42, True)
    """

    def __init__(self, config: GranularityConfig) -> None:
        if not isinstance(config, GranularityConfig):
            raise TypeError(f"config must be a GranularityConfig, not {type(config).__name__}")
        config.validate()
        self.config = config

    def allocate(self, model_path: "Path", base_config: DiffusionQuantConfig | None, layer_names: Sequence[str] | None = None) -> GranularityAllocation:
        """Sizes for all layers, or for those of layer_names (tensor names, with or without ".weight").

        The objective per layer is accuracy * accuracy_weight + compression / target * (1 - accuracy_weight), accuracy = 1 - estimate_accuracy_impact.
        Raises ValidationError when no size keeps a layer above min_accuracy, ConfigurationError, ModelNotFoundError.

        >>> import arrow_quant_v2 as aq
        >>> allocator = aq.GranularityAllocator(aq.GranularityConfig('variance'))
        >>> sorted(set(allocator.allocate('examples/dit-fashion', None).layer_group_sizes.values()))[-1]
        256
        """
        start = time.perf_counter()
        c = self.config
        c.validate()
        if c.num_samples != GranularityConfig.num_samples:
            warn("num_samples: set, and changes nothing: statistics hold the rows that were recorded; say how many when recording them, calibrate(samples=...)")
        with Watch(None) as watch:
            report = _jobs.report_of(
                _core.run_groups(
                    _jobs.require_model(model_path),
                    base_config,
                    watch,
                    _jobs.log,
                    sensitivity=c.sensitivity_method,
                    target_compression=float(c.target_compression_ratio),
                    min_accuracy=float(c.min_accuracy),
                    accuracy_weight=float(c.accuracy_weight),
                    group_sizes=list(c.available_group_sizes),
                    layers=names_of(layer_names),
                )
            )
        bits = report["summary"]["bit_width"]
        summary = report["summary"]
        return GranularityAllocation(
            layer_group_sizes={name: layer["group_size"] for name, layer in report["layers"].items()},
            layer_sensitivities=[self._sensitivity(name, layer["sensitivity"], bits) for name, layer in report["layers"].items()],
            estimated_accuracy=summary["avg_accuracy"],
            estimated_compression_ratio=summary["avg_compression"],
            analysis_time_s=time.perf_counter() - start,
            report=report,
        )

    def _sensitivity(self, name, score, bits):
        size = self.recommend_group_size(score)
        return LayerSensitivity(name, score, size, self.estimate_accuracy_impact(score, size), self.estimate_compression_ratio(size, bits))

    def analyze_layer_sensitivity(self, model_path: "Path", layer_name: str, base_config: DiffusionQuantConfig | None) -> LayerSensitivity:
        """One layer's sensitivity. Its score is its place among all layers of the model, so all of them are looked at.

        >>> import arrow_quant_v2 as aq
        >>> allocator = aq.GranularityAllocator(aq.GranularityConfig('variance'))
        >>> s = allocator.analyze_layer_sensitivity('examples/dit-fashion', 'transformer_blocks.0.ff.net.2.weight', None)
        >>> 0 <= s.sensitivity_score <= 1 and s.recommended_group_size == allocator.recommend_group_size(s.sensitivity_score)
        True
        """
        if not isinstance(layer_name, str):
            raise TypeError(f"layer_name must be str, not {type(layer_name).__name__}")
        found = {s.layer_name: s for s in self.allocate(model_path, base_config).layer_sensitivities}
        for name in (layer_name, f"{layer_name}.weight"):
            if name in found:
                return found[name]
        raise ConfigurationError(f"layer {layer_name!r} is not among the layers that would be quantized{_jobs.nearest(layer_name, list(found))}")

    def recommend_group_size(self, score: float) -> int:
        """Size for a score: 0.75 or more 32, 0.5 or more 64, 0.25 or more 128, else 256, restricted to the available sizes.

        >>> import arrow_quant_v2 as aq
        >>> allocator = aq.GranularityAllocator(aq.GranularityConfig())
        >>> [allocator.recommend_group_size(score) for score in (0.9, 0.5, 0.1)]
        [32, 64, 256]
        """
        return _core.granularity_recommend(score_of(score), sorted(self.config.available_group_sizes))

    def estimate_accuracy_impact(self, score: float, group_size: int) -> float:
        """Estimated loss of accuracy, 0..1: 0.15 score log2(group_size / 16). A rule of thumb, not a measurement.

        >>> import arrow_quant_v2 as aq
        >>> round(aq.GranularityAllocator(aq.GranularityConfig()).estimate_accuracy_impact(0.5, 64), 3)
        0.15
        """
        return _core.granularity_impact(score_of(score), _jobs.one_of(group_size, SIZES, "group size"))

    def estimate_compression_ratio(self, group_size: int, bit_width: int) -> float:
        """32 / (bit_width + 64 / group_size): against float32 with two 32-bit parameters a group. An estimate: the container stores smaller parameters.

        >>> import arrow_quant_v2 as aq
        >>> aq.GranularityAllocator(aq.GranularityConfig()).estimate_compression_ratio(32, 2)
        8.0
        """
        return _core.granularity_compression(_jobs.one_of(group_size, SIZES, "group size"), _jobs.one_of(bit_width, (2, 4, 8), "bit_width"))


class EvolutionarySearch:
    """Evolutionary search of the group size of each layer: every genome is measured on the model's weights.

    target_metric: 'cosine_similarity' ('accuracy'; mean over layers by size), 'compression_ratio' (source bytes over stored bytes of the layers) or
    'balanced'. Elitist: never worse than its start. The same seed gives the same answer. ConfigurationError for a setting out of range.

    >>> import arrow_quant_v2 as aq
    >>> search = aq.EvolutionarySearch(population_size=6, num_generations=2, target_metric='balanced')
    >>> result = search.search('examples/dit-fashion', None, aq.DiffusionQuantConfig(bit_width=2))
    >>> sorted(result), len(result['generation_history'])
    (['best', 'generation_history', 'total_evaluations'], 3)
    """

    def __init__(
        self,
        population_size: int = 20,
        num_generations: int = 10,
        mutation_rate: float = 0.2,
        crossover_rate: float = 0.7,
        elite_ratio: float = 0.1,
        target_metric: str = "cosine_similarity",
        max_evaluations: int = 200,
        seed: int = 0,
    ) -> None:
        check(is_whole(population_size, 2), f"Invalid population_size: {population_size}. Must be at least 2")
        check(is_whole(num_generations, 0), f"Invalid num_generations: {num_generations}. Must be at least 0")
        for name, value in (("mutation_rate", mutation_rate), ("crossover_rate", crossover_rate), ("elite_ratio", elite_ratio)):
            check(is_number(value) and 0 <= value <= 1, f"Invalid {name}: {value}. Must be between 0.0 and 1.0")
        check(is_whole(max_evaluations, 1), f"Invalid max_evaluations: {max_evaluations}. Must be at least 1")
        check(is_whole(seed, 0), f"Invalid seed: {seed}. Must be at least 0")
        check(target_metric in METRICS, f"Invalid target_metric: {target_metric}. Must be 'cosine_similarity', 'accuracy', 'compression_ratio', or 'balanced'")
        self.population_size, self.num_generations = population_size, num_generations
        self.mutation_rate, self.crossover_rate, self.elite_ratio = mutation_rate, crossover_rate, elite_ratio
        self.target_metric, self.max_evaluations, self.seed = target_metric, max_evaluations, seed

    def search(
        self,
        model_path: "Path",
        output_path: "Path | None",
        base_config: DiffusionQuantConfig | None,
        layer_names: Sequence[str] | None = None,
        start: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Searches sizes for all layers, or for those of layer_names; start: sizes to begin with, {layer: size}, where a layer that it does not name begins
        with 256; a target_model_size_mb of base_config is the budget. With output_path the best is quantized into that folder.

        Returns best {layer_group_sizes, fitness, metrics}, generation_history [{generation, best_fitness, avg_fitness, worst_fitness}], total_evaluations;
        fitness is the target metric, higher is better. Raises ConfigurationError, ModelNotFoundError, BudgetError.

        >>> import arrow_quant_v2 as aq
        >>> found = aq.EvolutionarySearch(population_size=4, num_generations=1).search('examples/dit-fashion', None, None)
        >>> set(found['best']['layer_group_sizes'].values())
        {32}
        """
        names, first = names_of(layer_names), None
        if start is not None:
            names, first = begin_with(start, names, model_path, base_config)
        settings = {
            "population": self.population_size,
            "generations": self.num_generations,
            "mutation_rate": float(self.mutation_rate),
            "crossover_rate": float(self.crossover_rate),
            "elite_ratio": float(self.elite_ratio),
            "max_evaluations": self.max_evaluations,
            "seed": self.seed,
        }
        with Watch(None) as watch:
            report = _jobs.report_of(
                _core.run_groups(
                    _jobs.require_model(model_path), base_config, watch, _jobs.log, layers=names, start=first, evolution=settings, metric=self.target_metric
                )
            )
        result = {key: report[key] for key in ("best", "generation_history", "total_evaluations")}
        if output_path is not None:
            quantize_with(model_path, output_path, base_config, result["best"]["layer_group_sizes"])
        return result


def names_of(layer_names):
    """Names of layers as a list, or None for all; one str is not a list of its letters."""
    if isinstance(layer_names, str):
        raise TypeError("layer_names must be a list of str, not str")
    return None if layer_names is None else list(layer_names)


def score_of(score):
    value = float(score)
    if not 0 <= value <= 1:
        raise ValueError(f"Invalid score: {value}. Must be between 0.0 and 1.0")
    return value


def begin_with(start, names, model_path, base_config):
    """(names of the layers to search, their sizes to begin with)"""
    if not hasattr(start, "items"):
        raise TypeError(f"start must be a dict of layers and group sizes, not {type(start).__name__}")
    for name, size in start.items():
        check(is_whole(size, 1) and size in SIZES, f"Invalid group size of layer {name!r} in start: {size}. Must be 32, 64, 128, or 256")
    if names is None:
        from .short import inspect

        tensors = inspect(model_path, config=base_config)["tensors"]
        names = [t["name"] for t in tensors if t["decision"]["action"] == "quantize"]
    plain = {name.removesuffix(".weight"): int(size) for name, size in start.items()}
    unknown = set(plain) - {name.removesuffix(".weight") for name in names}
    check(not unknown, f"start names layers that are not searched: {', '.join(sorted(unknown))}")
    return names, [plain.get(name.removesuffix(".weight"), max(SIZES)) for name in names]


def quantize_with(model_path, output_path, base_config, sizes):
    """Carries out group sizes: they become overrides of the layers."""
    from copy import copy

    from .short import run_quantize

    config = DiffusionQuantConfig() if base_config is None else copy(base_config)
    config.params = "f16"
    config.layer_overrides = [*config.layer_overrides, *(f"{glob_of(name)}=group:{size}" for name, size in sizes.items())]
    return run_quantize(model_path, output_path, {"config": config, "overwrite": True, "mkdir": True})


def glob_of(name):
    """A glob that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


for _member in (EvolutionarySearch, GranularityAllocation, GranularityAllocator, GranularityConfig, LayerSensitivity):
    _member.__module__ = "arrow_quant_v2"

# What inspect.signature() shows: the sizes, where dataclasses say "<factory>".
_shown = signature(GranularityConfig)
GranularityConfig.__signature__ = _shown.replace(  # type: ignore[attr-defined]
    parameters=[p.replace(default=list(SIZES)) if p.name == "available_group_sizes" else p for p in _shown.parameters.values()]
)
