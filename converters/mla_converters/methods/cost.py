"""The cost of a conversion: the parts that all methods share.

Every constant was measured on one core of an AMD EPYC with AVX512-BF16 (torch 2.13.0 for CPU, one thread).
"""

from dataclasses import dataclass

from mla_converters.checkpoints.shape import Shape
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import has_query_map
from mla_converters.methods.base import Cost
from mla_converters.resume.layer_pass import record_bytes
from mla_converters.streaming.loss import CHUNK

CALIBRATION = 1.6e-11  # core-seconds per token and parameter, for each layer that the token passes through
DECOMPOSITION = 2.5e-10  # core-seconds per cubed width of the matrix; includes the products around it
READ_AND_WRITE = 3e-9  # core-seconds per byte of weights
RUNTIME_BYTES = 700 * 10**6  # Python with torch, transformers and a tokenizer, and free memory that the allocator keeps
LOGITS = 4  # float32 tensors of the size of a chunk's logits that exist at the peak
MOMENT_MATRICES = 8  # float64 matrices of the size of a layer's second moments that exist at the peak
CONVERTED_BYTES = 16  # bytes per number of a converted attention: float64, or float32 with gradient, momentum and more


@dataclass(frozen=True)
class Passes:
    """The work of a method in each layer.

    Attributes:
        tokens: tokens whose hidden states pass through the layers, over all streams.
        search: core-seconds for statistics and searches, which use a few windows whatever the amount of text.
        decompositions: eigendecompositions of matrices as wide as the keys and values.
        seconds: core-seconds for all other work.
        bytes: bytes of memory for all other work.
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

    Time is the seconds to read and write the weights, and in each layer these seconds:

    - ``CALIBRATION * tokens * parameters``, where the second moments of ``2 * g * d`` keys and values count as
      ``2 * (2 * g * d) ** 2`` parameters;
    - the seconds of the search, and those of other work;
    - ``DECOMPOSITION * decompositions * (2 * g * d) ** 3``.

    Memory is the sum of Python with its packages, and the larger of one layer and what the output needs: the embedding
    or, where a loss is measured, the heads of both models and the logits of a few tokens. A layer takes:

    - its weights as stored, and a float32 copy of its attention's weights;
    - the hidden states ``[tokens, D]`` in float32;
    - second moments in float64;
    - the converted attention, and the bytes of other work.

    Args:
        shape: the source's shape.
        budget: the cache's sizes.
        nope_dim: ``qk_nope_head_dim`` of the converted model.
        passes: the work of the method in each layer.
        warnings: sentences for the user.
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
    heads = shape.weight_bytes * shape.embedding_parameters
    if passes.tokens:  # what was lost is measured on text, with the output heads of both models
        heads = 2 * heads + LOGITS * 4 * CHUNK * shape.embedding_parameters // shape.hidden
    return Cost(
        core_seconds=shape.layers * per_layer + READ_AND_WRITE * weights,
        memory_bytes=RUNTIME_BYTES + max(layer, heads),
        disk_bytes=weights + record_bytes(passes.tokens, shape.hidden),
        weights_bytes=weights,
        warnings=warnings,
    )


def converted_numbers(shape: Shape, budget: CacheBudget) -> int:
    """Numbers in a converted layer's projections: to queries, outputs and cached numbers, and ``kv_b_proj``."""
    rope, latent, heads, head_dim = budget.qk_rope_head_dim, budget.kv_lora_rank, shape.query_heads, shape.head_dim
    rotary = heads * rope * min(shape.hidden, head_dim)
    return (heads * 2 * head_dim + latent + rope) * shape.hidden + rotary + heads * 2 * head_dim * latent


def written_bytes(shape: Shape, budget: CacheBudget, nope_dim: int) -> int:
    """Bytes of the converted checkpoint's tensors.

    ``q_proj``, ``kv_a_proj_with_mqa`` and ``kv_b_proj`` replace the projections to queries, keys and values. Each layer
    gets ``rope_freqs``, and where that is smaller, the map to rotary queries. All other tensors stay. With QK-norm the
    projection to keys stays too, ``kv_a_proj_with_mqa`` reads the keys and the layer's input, and the norm of queries
    disappears.
    """
    latent, rope, heads, head_dim = budget.kv_lora_rank, budget.qk_rope_head_dim, shape.query_heads, shape.head_dim
    added = heads * (nope_dim + head_dim) * latent
    inputs = shape.hidden + shape.qkv_bias
    own = head_dim if shape.qk_norm else nope_dim
    if has_query_map(head_dim, shape.hidden, rope, nope_dim, shape.qk_norm):
        queries = heads * head_dim * (inputs + rope)
    else:
        queries = heads * (own + rope) * inputs
    if shape.qk_norm:
        keys = shape.kv_heads * head_dim
        added += queries - heads * head_dim * inputs + (latent + rope) * (keys + inputs) - keys * inputs - head_dim
    else:
        added += queries + (latent + rope) * inputs - shape.qkv_parameters
    parameters = shape.parameters + shape.layers * added
    return parameters * shape.weight_bytes + shape.layers * 4 * (rope // 2)
