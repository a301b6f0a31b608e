"""The report of ``vllm-mla plan``."""

from enum import StrEnum
from typing import Any

from mla_converters.reports.base import Part, Report


class CacheSize(Part):
    """The size of a cache.

    Attributes:
        kv_bytes_per_token: bytes per token in all layers.
        tokens_in_memory: number of tokens that fit into the memory that the user gave.
    """

    kv_bytes_per_token: int
    tokens_in_memory: int


class PlannedModel(CacheSize):
    """The source; see :class:`mla_converters.checkpoints.shape.Shape` for the sizes.

    Attributes:
        cached_per_token_and_layer: cached numbers.
    """

    cached_per_token_and_layer: int
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


class VllmCacheSize(CacheSize):
    """A format in which vLLM itself can keep the source's cache.

    Attributes:
        kv_cache_dtype: what ``vllm serve --kv-cache-dtype`` takes.
        cache_ratio: its bytes as a share of the source's in 16 bits.
        served_on: the hardware that serves it.
    """

    kv_cache_dtype: str
    cache_ratio: float
    served_on: list[str]


class Layout(CacheSize):
    """A cache that a conversion can have.

    Attributes:
        typical: whether ``convert`` searches widths and bits for these bytes, so that those given here are only
            typical. The bytes are then the most that the search may use.
        kv_lora_rank, qk_rope_head_dim: its widths.
        bits_per_number: of each number, without scales.
        bytes_per_token_and_layer: with scales and padding.
        cache_ratio: its bytes as a share of the source's in 16 bits.
        options: the options with which ``vllm-mla convert`` gives this cache.
        backends: attention backends for each kind of hardware, in the order in which vLLM prefers them.
    """

    typical: bool
    kv_lora_rank: int
    qk_rope_head_dim: int
    bits_per_number: int
    bytes_per_token_and_layer: int
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
        proof_core_seconds: for the proof of the converted model, and for measuring what it lost.
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


class PlannedTraining(Part):
    """The cost of training the recommended conversion on its source's predictions.

    Attributes:
        train: the weights that change: ``attention``, ``all`` or ``lora``.
        devices, tokens: for which the plan was made.
        trained_parameters: how many weights that is; with ``lora``, those of the low-rank changes.
        memory_bytes: of each device, if each has all weights.
        sharded_memory_bytes: of each device, if they share the weights (``--fsdp``).
        disk_bytes: of the model, checkpoints and text.
        tokens_per_second_and_device: the speed.
        measured: whether it was measured on this machine.
        hours: time for all tokens.
    """

    train: str
    devices: int
    tokens: int
    trained_parameters: int
    memory_bytes: int
    sharded_memory_bytes: int
    disk_bytes: int
    tokens_per_second_and_device: float
    measured: bool
    hours: float


class Way(StrEnum):
    """How GPUs share the work."""

    TENSOR = "tensor parallel"
    CONTEXT = "decode context parallel"
    DATA = "data-parallel attention"


class GpuCache(Part):
    """What GPUs cache in one of these ways.

    Attributes:
        model: ``source`` or ``conversion``.
        options: the options with which ``vllm-mla convert`` gives this cache, or ``vllm serve`` keeps the source's.
        way: how the GPUs share the work.
        serve_options: the options with which ``vllm serve`` does so.
        kv_bytes_per_token: bytes per token in all layers, on each GPU that keeps the token.
        tokens: number of tokens that fit, on all GPUs together.
    """

    model: str
    options: list[str]
    way: Way
    serve_options: list[str]
    kv_bytes_per_token: int
    tokens: int


class PlannedGpus(Part):
    """What several GPUs cache.

    Attributes:
        gpus: how many.
        memory_bytes: for the cache on each GPU, with tensor parallel. Where all weights lie on each GPU, less is left.
        ways: each way that vLLM takes, for each cache.
        recommended: what to do, in a sentence.
    """

    gpus: int
    memory_bytes: int
    ways: list[GpuCache]
    recommended: str


class Advice(Part):
    """What to do to get a cache of about some size.

    Attributes:
        cache_ratio: the bytes that are left, as a share of the source's in 16 bits.
        what: the advice.
        command: does it.
    """

    cache_ratio: float
    what: str
    command: str


class Recommendation(Part):
    """The conversion to make: its options as in :class:`Layout`, its share of the bytes, and the reason."""

    options: list[str]
    cache_ratio: float
    reason: str


class Plan(Report):
    """The possible caches and the cost of converting a model, in bytes and in seconds on one core."""

    source: PlannedModel
    memory_bytes: int
    vllm_caches: list[VllmCacheSize]
    layouts: list[Layout]
    conversion: PlannedConversion
    training: PlannedTraining | None = None
    gpus: PlannedGpus | None = None
    advice: list[Advice]
    recommended: Recommendation
    warnings: list[str]
    command: str
