"""The report of ``vllm-mla plan``."""

from typing import Any

from mla_converters.reports.base import Part, Report


class CacheSize(Part):
    """The size of a cache.

    Attributes:
        cached_per_token_and_layer: cached numbers.
        kv_bytes_per_token: bytes per token in all layers.
        tokens_in_memory: number of tokens that fit into the memory that the user gave.
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
        cache_ratio: its cached numbers, as a share of the source's.
        options: the options with which ``vllm-mla convert`` gives this layout.
        backends: attention backends for each kind of hardware, in the order in which vLLM prefers them.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    cache_ratio: float
    options: list[str]
    backends: dict[str, list[str]]


class PlannedConversion(Part):
    """The cost of the recommended conversion.

    Attributes:
        method: the method for which the plan was made.
        settings: the options of the method.
        calibration_tokens: number of calibration tokens.
        weights_bytes: size of the written checkpoint.
        peak_disk_bytes: peak disk space.
        peak_memory_bytes: peak memory for each kind of calibration text: ``file`` or ``self``.
        core_seconds: seconds on one core, for each method.
        proof_core_seconds: for the proof of the converted model.
        sampling_core_seconds: seconds on one core in which the model writes the calibration text, if it does.
    """

    method: str
    settings: dict[str, Any]
    calibration_tokens: int
    weights_bytes: int
    peak_disk_bytes: int
    peak_memory_bytes: dict[str, int]
    core_seconds: dict[str, float]
    proof_core_seconds: float
    sampling_core_seconds: float


class Recommendation(Part):
    """The layout to choose, and the reason."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    reason: str


class Plan(Report):
    """The possible layouts and the cost of converting a model, in bytes and in seconds on one core."""

    source: PlannedModel
    memory_bytes: int
    layouts: list[Layout]
    conversion: PlannedConversion
    recommended: Recommendation
    warnings: list[str]
    command: str
