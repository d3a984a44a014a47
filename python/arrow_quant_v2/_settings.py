"""The keywords of quantize(), inspect() and plan(), for type checkers; at run time their signatures show the same (_jobs.show_keywords).

Every field of DiffusionQuantConfig and its short names; a test holds this against the library's table of settings.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from ._core import DiffusionQuantConfig
from ._types import Path, ProgressLike


class Settings(TypedDict, total=False):
    config: DiffusionQuantConfig | None
    profile: str | None
    # fields
    bit_width: int
    modality: str | None
    num_time_groups: int
    group_size: int
    enable_time_aware: bool
    enable_spatial: bool
    min_accuracy: float
    calibration_samples: int
    deployment_profile: str
    fail_fast: bool
    enable_entropy_adaptation: bool
    enable_transition_optimization: bool
    markov_weight: float
    entropy_weight: float
    learning_rate: float
    max_iterations: int
    convergence_threshold: float
    beta_schedule: str
    num_threads: int
    enable_streaming: bool
    enable_memory_aware_scheduling: bool
    max_memory_limit_mb: int | None
    enable_mixed_precision: bool
    skip_sensitive_layers: bool
    enable_simd: bool
    simd_threshold: int
    sensitive_layer_names: Sequence[str]
    sensitive_layer_patterns: Sequence[str]
    layer_bit_widths: Mapping[str, int]
    target_model_size_mb: float | None
    calibration_path: Path | None
    seed: int
    smoothness_threshold: float
    smoothing_window: int
    smoothing_interpolation: str
    target_size_is_wish: bool
    symmetric: bool
    params: str
    method: str
    nonfinite: str
    include: Sequence[str]
    exclude: Sequence[str]
    layer_overrides: Sequence[str]
    fallback: Sequence[int]
    rotate: str
    smooth: str
    fold_equalization: bool
    bias_correction: bool
    temporal_aggregation: str
    aggregation_momentum: float
    act_bits: int
    time_weighting: str
    damping: float
    act_order: str
    refine_sweeps: int
    allow_bits: Sequence[int]
    target_bpw: float | None
    plan_path: Path | None
    sensitive_layer_score: float | None
    sensitivity_method: str
    # short names
    bits: int
    group: int
    time_groups: int
    calib: Path | None
    plan: Path | None
    samples: int
    target_size: str | float | None
    threads: int
    max_memory: str | float | None
    spatial: bool
    time_aware: bool


class QuantizeSettings(Settings, total=False):
    progress: ProgressLike
    overwrite: bool
    mkdir: bool
    restart: bool
    verify: bool
    strict: bool
    allow_unmatched: bool
    side_files: bool
    component: str | None
    variant: str | None
    follow_symlinks: bool
    skip_unknown_dtype: bool
    shard_size: str | int | None
    lora: Path | Sequence[Path | tuple[Path, float]] | None


class PlanSettings(Settings, total=False):
    progress: ProgressLike
    component: str | None
    variant: str | None
    allow_unmatched: bool
    sensitivity: str | None
    layer_weights: Path | Mapping[str, float] | None
    cache_dir: Path | None
    sample_values: int
    fitness: Callable[[dict[str, Any]], float] | None
    population: int
    generations: int | None
    mutation_rate: float
    crossover_rate: float
    elite_ratio: float
    max_evaluations: int
    state_path: Path | None
    on_generation: Callable[[dict[str, Any]], object] | None
