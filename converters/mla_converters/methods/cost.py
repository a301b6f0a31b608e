"""What a conversion takes: the parts that all methods share.

Every constant was measured on one core of an AMD EPYC with AVX512-BF16 (torch 2.13.0 for CPU, one thread).
"""

from dataclasses import dataclass

from mla_converters.checkpoints.shape import Shape
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.base import Cost
from mla_converters.resume.layer_pass import record_bytes

CALIBRATION = 1.6e-11  # core-seconds per token that passes through a layer and parameter of the layer
DECOMPOSITION = 2.5e-10  # core-seconds per cubed width of the matrix, the products around it included
READ_AND_WRITE = 3e-9  # core-seconds per byte of weights
RUNTIME_BYTES = 700 * 10**6  # Python with torch, transformers and a tokenizer, and free memory that the allocator keeps
MOMENT_MATRICES = 8  # float64 matrices as large as a layer's second moments that are alive at the peak
CONVERTED_BYTES = 16  # of each number in a converted attention: float64, or float32 with gradient, momentum and more


@dataclass(frozen=True)
class Passes:
    """What a method does in each layer.

    Attributes:
        tokens: tokens whose hidden states pass through the layers, over all streams.
        search: core-seconds for statistics and searches on a few windows, however many calibrate.
        decompositions: eigendecompositions of matrices as wide as the keys and values.
        seconds: core-seconds for everything else.
        bytes: memory for everything else.
    """

    tokens: int = 0
    search: float = 0.0
    decompositions: int = 0
    seconds: float = 0.0
    bytes: int = 0


def conversion_cost(
    shape: Shape, budget: CacheBudget, nope_dim: int, passes: Passes, warnings: tuple[str, ...] = ()
) -> Cost:
    """The cost of a conversion.

    Time: in each layer ``CALIBRATION * tokens * parameters``, where its second moments of ``2 * g * d`` keys and values
    count as ``2 * (2 * g * d) ** 2`` parameters; the search; ``DECOMPOSITION * decompositions * (2 * g * d) ** 3``; and
    the time to read and write the weights.

    Memory: Python and its packages, and the larger of the embedding and one layer. A layer has its weights as stored,
    its attention's in float32 besides, the hidden states ``[tokens, D]`` in float32, second moments in float64, and the
    converted attention.

    Args:
        shape: of the source.
        budget: of the cache.
        nope_dim: ``qk_nope_head_dim`` of the converted model.
        passes: what the method does in each layer.
        warnings: for the user.
    """
    weights = written_bytes(shape, budget, nope_dim)
    moments = 2 * shape.cached**2 if passes.tokens else 0
    per_layer = (
        CALIBRATION * passes.tokens * (shape.layer_parameters + moments)
        + passes.search
        + DECOMPOSITION * passes.decompositions * shape.cached**3
        + passes.seconds
    )
    layer = (
        shape.weight_bytes * shape.layer_parameters
        + 4 * shape.attention_parameters
        + 4 * passes.tokens * shape.hidden
        + (8 * MOMENT_MATRICES * shape.cached**2 if passes.decompositions else 0)
        + CONVERTED_BYTES * converted_numbers(shape, budget)
        + passes.bytes
    )
    return Cost(
        core_seconds=shape.layers * per_layer + READ_AND_WRITE * weights,
        memory_bytes=RUNTIME_BYTES + max(layer, shape.weight_bytes * shape.embedding_parameters),
        disk_bytes=weights + record_bytes(passes.tokens, shape.hidden),
        weights_bytes=weights,
        warnings=warnings,
    )


def converted_numbers(shape: Shape, budget: CacheBudget) -> int:
    """Numbers in a converted layer's projections: queries, outputs, what is cached, and ``kv_b_proj``."""
    rope, latent, heads, head_dim = budget.qk_rope_head_dim, budget.kv_lora_rank, shape.query_heads, shape.head_dim
    return (heads * (2 * head_dim + rope) + latent + rope) * shape.hidden + heads * 2 * head_dim * latent


def written_bytes(shape: Shape, budget: CacheBudget, nope_dim: int) -> int:
    """Bytes of the converted checkpoint's tensors.

    ``q_proj``, ``kv_a_proj_with_mqa`` and ``kv_b_proj`` replace the projections to queries, keys and values; each layer
    gets its ``rope_freqs``; everything else stays. With QK-norm the projection to keys stays too,
    ``kv_a_proj_with_mqa`` reads keys and the layer's input, and the norm of queries goes.
    """
    latent, rope, heads, head_dim = budget.kv_lora_rank, budget.qk_rope_head_dim, shape.query_heads, shape.head_dim
    added = heads * (nope_dim + head_dim) * latent
    inputs = shape.hidden + shape.qkv_bias
    if shape.qk_norm:
        keys = shape.kv_heads * head_dim
        added += heads * rope * inputs + (latent + rope) * (keys + inputs) - keys * inputs - head_dim
    else:
        projected = heads * (nope_dim + rope) + latent + rope  # queries, and the cached numbers
        added += projected * inputs - shape.qkv_parameters
    parameters = shape.parameters + shape.layers * added
    return parameters * shape.weight_bytes + shape.layers * 4 * (rope // 2)
