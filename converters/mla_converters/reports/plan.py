"""The report of ``vllm-mla plan``."""

from typing import Any

from mla_converters.reports.base import Part, Report


class CacheSize(Part):
    """A cache.

    Attributes:
        cached_per_token_and_layer: numbers.
        kv_bytes_per_token: over all layers.
        tokens_in_memory: that fit into the memory which was asked about.
    """

    cached_per_token_and_layer: int
    kv_bytes_per_token: int
    tokens_in_memory: int


class PlannedModel(CacheSize):
    """The source; see :class:`mla_converters.checkpoints.shape.Shape` for the sizes."""

    name: str
    revision: str | None = None
    architecture: str
    dtype: str
    cache_dtype: str
    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    context: int
    sliding_window: int | None = None
    parameters: int
    weights_bytes: int


class Layout(CacheSize):
    """A cache layout that a conversion can have.

    Attributes:
        kv_lora_rank, qk_rope_head_dim: its sizes.
        cache_ratio: share of the source's numbers.
        options: that ask ``vllm-mla convert`` for it.
        backends: attention backends by hardware, vLLM's first choice first.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    cache_ratio: float
    options: list[str]
    backends: dict[str, list[str]]


class PlannedConversion(Part):
    """What the recommended conversion takes.

    Attributes:
        method: that the plan was made for.
        settings: its options.
        calibration_tokens: how many tokens calibrate.
        weights_bytes: of the written checkpoint.
        peak_disk_bytes, peak_memory_bytes: the memory by kind of calibration text: ``file`` or ``self``.
        core_seconds: on one core, by method.
        sampling_core_seconds: to write the calibration text, where the model does that.
    """

    method: str
    settings: dict[str, Any]
    calibration_tokens: int
    weights_bytes: int
    peak_disk_bytes: int
    peak_memory_bytes: dict[str, int]
    core_seconds: dict[str, float]
    sampling_core_seconds: float


class Recommendation(Part):
    """The layout to take, and why."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    reason: str


class Plan(Report):
    """What converting a model would give and cost; bytes, and seconds on one core."""

    source: PlannedModel
    memory_bytes: int
    layouts: list[Layout]
    conversion: PlannedConversion
    recommended: Recommendation
    warnings: list[str]
    command: str
