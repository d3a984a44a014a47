"""plan(): the bits, groups and parameter forms with the least error within a size, as an object."""

import json
from dataclasses import dataclass, field
from typing import Any

from . import _core, _jobs
from ._progress import Watch

__all__ = ["Plan", "PlanLayer", "plan"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from ._settings import PlanSettings
    from ._types import Path

PLAN_KEYWORDS = {
    "config": None,
    "profile": None,
    "progress": None,
    "component": None,
    "variant": None,
    "allow_unmatched": False,
    "sensitivity": None,
    "layer_weights": None,
    "cache_dir": None,
    "sample_values": 65536,
}
EVOLUTION_KEYWORDS = {
    "fitness": None,
    "population": 20,
    "generations": None,
    "mutation_rate": 0.2,
    "crossover_rate": 0.7,
    "elite_ratio": 0.1,
    "max_evaluations": 0,
    "state_path": None,
    "on_generation": None,
}


@dataclass(frozen=True)
class PlanLayer:
    """What a plan makes of one tensor.

    bits (16: kept as it is); group_size (0: the whole row), params and method, None when kept; error: estimated relative error; size_bytes: everything the
    container will hold of it; sensitivity: 0..1 when it was asked for, else None.

    >>> import arrow_quant_v2 as aq
    >>> aq.PlanLayer('w', 4, 128, 'f16', 'search', 0.01, 4096, None).bits
    4
    """

    name: str
    bits: int
    group_size: int | None
    params: str | None
    method: str | None
    error: float | None
    size_bytes: int | None
    sensitivity: float | None


@dataclass(frozen=True)
class Plan:
    """A plan, as plan() found it.

    layers: {name: PlanLayer}; size: predicted bytes of the container's Parquet files; bpw: bits per weight of the layers; sqnr_db: estimated; minimum and
    maximum: sizes that can be reached, in bytes; feasible: always True, for a budget that cannot be met is a BudgetError; history: of the evolutionary search,
    a list of dict; summary: all figures (docs/json.md).

    >>> import arrow_quant_v2 as aq
    >>> p = aq.plan('examples/dit-fashion', target_size='4MB')
    >>> p.feasible, p.size <= 4e6, p.layers['proj_out_1.weight'].bits
    (True, True, 8)
    """

    layers: dict[str, PlanLayer] = field(repr=False)
    size: int
    bpw: float | None
    sqnr_db: float | None
    minimum: int
    maximum: int
    feasible: bool
    summary: dict[str, Any] = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)

    def to_json(self) -> str:
        """The plan as JSON text, "arrowquant.plan/1" (docs/json.md).

        >>> import arrow_quant_v2 as aq, json
        >>> json.loads(aq.plan('examples/dit-fashion', target_size='4MB').to_json())['schema']
        'arrowquant.plan/1'
        """
        layers = {
            name: {k: getattr(layer, k) for k in ("bits", "group_size", "params", "method", "sensitivity", "error", "size_bytes")}
            for name, layer in self.layers.items()
        }
        return json.dumps({"schema": "arrowquant.plan/1", "summary": self.summary, "layers": layers}, indent=2, ensure_ascii=False)

    def save(self, path: "Path", *, overwrite: bool = False) -> None:
        """Writes the plan for `quantize --plan` and quantize(plan_path=...). FileExistsError without overwrite.

        >>> import arrow_quant_v2 as aq
        >>> aq.plan('examples/dit-fashion', target_size='4MB').save('plan.json', overwrite=True)
        """
        with open(_jobs.path_of(path), "w" if overwrite else "x", encoding="utf-8") as f:
            f.write(self.to_json() + "\n")

    def table(self) -> str:
        """The plan as text, a line per layer.

        >>> import arrow_quant_v2 as aq
        >>> print(aq.plan('examples/dit-fashion', target_size='4MB').table().splitlines()[0].split())
        ['tensor', 'bits', 'group', 'params', 'method', 'bytes', 'estimated', 'dB']
        """
        from math import log10

        rows = [("tensor", "bits", "group", "params", "method", "bytes", "estimated dB")]
        for name, layer in self.layers.items():
            group = "-" if layer.group_size is None else "row" if layer.group_size == 0 else str(layer.group_size)
            db = f"{-10 * log10(layer.error):.1f}" if layer.error else "exact"
            bits = "kept" if layer.bits == 16 else str(layer.bits)
            rows.append((name, bits, group, layer.params or "-", layer.method or "-", str(layer.size_bytes), db))
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        return "\n".join("  ".join(c.ljust(w) if i in (0, 3, 4) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows)


def plan_of(text: str, history: list[dict[str, Any]]) -> Plan:
    """A Plan from the text "arrowquant.plan/1"."""
    parsed = json.loads(text)
    s = parsed["summary"]
    return Plan(
        layers={name: PlanLayer(name=name, **layer) for name, layer in parsed["layers"].items()},
        size=s["bytes"],
        bpw=s["bits_per_weight"],
        sqnr_db=s["estimated_sqnr_db"],
        minimum=s["minimum_bytes"],
        maximum=s["maximum_bytes"],
        feasible=s["feasible"] == 1,
        summary=s,
        history=history,
    )


def evolution_of(options: "Mapping[str, Any]") -> dict[str, Any] | None:
    """Settings of the evolutionary search; None when it was not asked for."""
    if options.get("generations") is None and options.get("fitness") is None:
        return None
    numbers = ("population", "generations", "mutation_rate", "crossover_rate", "elite_ratio", "max_evaluations")
    return {"max_evaluations": 0} | {name: options[name] for name in numbers if options.get(name) is not None}


def plan(path: "Path", **settings: "Unpack[PlanSettings]") -> Plan:
    """Bits, group sizes and parameter forms of every layer with the least error within a size; writes no model.

    path: a .safetensors file, a *.safetensors.index.json, or a model folder. Keywords, all optional. Settings: those of quantize(); target_size ("6.5GB")
    or target_bpw is the budget, allow_bits the widths (without a budget: the least error they give); calib: statistics of the layers' inputs.
    Measuring: sensitivity ('variance', 'hessian', 'gradient': scores in the result); layer_weights: {layer name: weight}, what a relative error of 1 in the
    layer costs the model (computed otherwise); cache_dir: keeps what was measured; sample_values: weights of a layer that are measured (65536).
    Evolutionary search from the best sum of errors: generations, population (20), mutation_rate (0.2), crossover_rate (0.7), elite_ratio (0.1),
    max_evaluations, seed, state_path (to go on after an interruption), on_generation(dict) and fitness: a callable that takes the layers as
    {name: {"bits", "group_size", "params", "method", ...}} and returns the model's error, lower is better; docs/planning.md shows one that runs a model.
    Others: config, profile, progress, component, variant, allow_unmatched.
    Raises BudgetError (nothing fits; `minimum` is the smallest size), ConfigurationError, ModelNotFoundError, FormatError, Interrupted.

    >>> import arrow_quant_v2 as aq
    >>> p = aq.plan('examples/dit-fashion', target_size='3.5MB', min_accuracy=0.9)
    >>> p.size <= 3.5e6 and p.size >= 0.97 * 3.5e6
    True
    """
    fields: dict[str, Any] = dict(settings)
    options = {name: fields.pop(name) for name in PLAN_KEYWORDS | EVOLUTION_KEYWORDS if name in fields}
    config = _jobs.config_of(options.pop("config", None), options.pop("profile", None), fields, "plan", PLAN_KEYWORDS | EVOLUTION_KEYWORDS)
    config.validate()
    run = {name: options[name] for name in ("component", "variant", "allow_unmatched", "sensitivity", "sample_values") if options.get(name) is not None}
    for name in ("cache_dir", "state_path"):
        if options.get(name) is not None:
            run[name] = _jobs.path_of(options[name])
    for name in ("fitness", "on_generation"):
        if options.get(name) is not None and not callable(options[name]):
            raise TypeError(f"{name} must be callable or None, not {type(options[name]).__name__}")
    history: list[dict[str, Any]] = []
    evolution = evolution_of(options)
    if evolution is not None:
        run |= {"evolution": evolution | {"seed": config.seed}, "generation": teller(history, options.get("on_generation"))}
        fitness = options.get("fitness")
        if fitness is not None:
            run["fitness"] = lambda text: float(fitness(json.loads(text)["layers"]))
    with WeightsFile(options.get("layer_weights")) as weights, Watch(options.get("progress")) as watch:
        text = _core.run_plan(_jobs.require_model(path), config, watch, _jobs.log, layer_weights=weights, **run)
    return plan_of(text, history)


def teller(history: list[dict[str, Any]], callback: "Callable[[dict[str, Any]], object] | None") -> "Callable[..., bool]":
    """Keeps the history, and tells the caller."""

    def tell(generation, best, mean, worst, evaluations):
        history.append({"generation": generation, "best_fitness": best, "avg_fitness": mean, "worst_fitness": worst, "evaluations": evaluations})
        return callback is None or callback(history[-1]) is not False

    return tell


class WeightsFile:
    """The weights as the file that the library reads: a path as it is, a dict in a temporary file."""

    def __init__(self, weights):
        self.weights, self.folder = weights, None

    def __enter__(self):
        if self.weights is None or not hasattr(self.weights, "items"):
            return None if self.weights is None else _jobs.path_of(self.weights)
        from tempfile import TemporaryDirectory

        self.folder = TemporaryDirectory(prefix="arrowquant-")
        path = self.folder.name + "/weights.json"
        with open(path, "w", encoding="utf-8") as f:
            json.dump({str(name): float(weight) for name, weight in self.weights.items()}, f)
        return path

    def __exit__(self, *exc):
        if self.folder:
            self.folder.cleanup()


_jobs.show_keywords(plan, PLAN_KEYWORDS | EVOLUTION_KEYWORDS)
for _member in (Plan, PlanLayer, plan):
    _member.__module__ = "arrow_quant_v2"
