"""What a conversion takes: time, memory and disk.

Every constant here was measured on one core of an AMD EPYC with AVX512-BF16 (torch 2.13.0 for CPU, one thread).
"""

from dataclasses import dataclass

from mla_converters.budget import CacheBudget
from mla_converters.planning.source import PlannedSource


@dataclass(frozen=True)
class MethodCost:
    """Core-seconds of a method.

    Attributes:
        calibration: per token that passes through the layers and parameter of these.
        search_tokens: tokens' worth of searching on a few windows, however many calibrate.
        decompositions: eigendecompositions of each layer's second moments.
        refit: per token that refits a layer and parameter of its attention; the keys that it reads included.
        refit_tokens: how many these are.
    """

    calibration: float
    search_tokens: int
    decompositions: int
    refit: float = 0.0
    refit_tokens: int = 0


METHOD_COSTS = {
    "transmla": MethodCost(calibration=3.8e-11, search_tokens=4096, decompositions=8),
    "attention-aware": MethodCost(
        calibration=3.8e-11, search_tokens=12288, decompositions=8, refit=6.9e-10, refit_tokens=96 * 4 * 128
    ),
}
SAMPLING = 9e-11  # core-seconds per sampled token and parameter of the model
DECOMPOSITION = 2.5e-10  # core-seconds per cubed width of the matrix, the products around it included
READ_AND_WRITE = 3e-9  # core-seconds per byte of weights
RUNTIME_BYTES = 750 * 10**6  # Python with torch, transformers and a tokenizer
MOMENT_MATRICES = 16  # float64 matrices as large as a layer's second moments that are alive at the peak
STREAMS = 2  # float32 copies of the hidden states of all calibration tokens: the source's and the converted model's


def conversion_core_seconds(source: PlannedSource, method: str, calibration_tokens: int, weights_bytes: int) -> float:
    """Core-seconds from the calibration text to the written checkpoint.

    For each layer ``calibration * (tokens + search_tokens) * parameters``, where its second moments of ``2 * g * d``
    keys and values count as ``2 * (2 * g * d) ** 2`` parameters, ``decompositions * (2 * g * d) ** 3 *
    DECOMPOSITION`` and ``refit * refit_tokens * attention parameters``; and the time to read and write the weights.

    Args:
        source: the model.
        method: a key of :data:`METHOD_COSTS`.
        calibration_tokens: how many tokens calibrate.
        weights_bytes: of the written checkpoint.
    """
    cost = METHOD_COSTS[method]
    parameters = source.layer_parameters + 2 * source.cached**2
    per_layer = (
        cost.calibration * (calibration_tokens + cost.search_tokens) * parameters
        + DECOMPOSITION * cost.decompositions * source.cached**3
        + cost.refit * cost.refit_tokens * source.attention_parameters
    )
    return source.layers * per_layer + READ_AND_WRITE * weights_bytes


def sampling_core_seconds(source: PlannedSource, calibration_tokens: int) -> float:
    """Core-seconds for the model to write its own calibration text: ``tokens * parameters * SAMPLING``."""
    return SAMPLING * calibration_tokens * source.parameters


def conversion_memory(source: PlannedSource, calibration_tokens: int, weights_bytes: int) -> int:
    """Peak bytes of memory of a conversion calibrated on a file.

    The sum of Python and its packages, the embedding as stored, one layer in float32, two streams of hidden states
    ``[calibration_tokens, D]`` in float32, the second moments of ``2 * g * d`` keys and values in float64, and the
    written weights that wait for their shard to fill.

    Args:
        source: the model.
        calibration_tokens: how many tokens calibrate.
        weights_bytes: of the written checkpoint.
    """
    return (
        RUNTIME_BYTES
        + source.weight_bytes * source.embedding_parameters
        + 4 * source.layer_parameters
        + STREAMS * 4 * calibration_tokens * source.hidden
        + MOMENT_MATRICES * 8 * source.cached**2
    )


def sampling_memory(source: PlannedSource, calibration_tokens: int) -> int:
    """Peak bytes of memory while the model writes its own calibration text: it and its KV cache, in bfloat16."""
    return RUNTIME_BYTES + 2 * source.parameters + 2 * calibration_tokens * source.layers * source.cached


def written_bytes(source: PlannedSource, layout: CacheBudget) -> int:
    """Bytes of a converted checkpoint, which is all that a conversion writes.

    ``q_proj``, ``kv_a_proj_with_mqa`` and ``kv_b_proj`` replace the projections to queries, keys and values (with
    QK-norm, these stay, ``q_rope_proj`` joins them, and ``kv_a_proj_with_mqa`` reads keys and values), and each layer
    gets its ``rope_freqs``; everything else stays.
    """
    latent, rope, heads, head_dim = layout.kv_lora_rank, layout.qk_rope_head_dim, source.query_heads, source.head_dim
    added = heads * 2 * head_dim * latent
    if source.qk_norm:
        added += heads * rope * head_dim + (latent + rope) * source.cached
    else:
        projected = heads * (head_dim + rope) + latent + rope  # queries, and what is cached
        added += projected * (source.hidden + source.qkv_bias) - source.qkv_parameters
    parameters = source.parameters + source.layers * added
    return parameters * source.weight_bytes + source.layers * 4 * (rope // 2)
