"""What a conversion takes: time, memory and disk.

Unless it says otherwise, every constant here was measured on one core of an AMD EPYC with AVX512-BF16 (torch 2.13.0 for
CPU, one thread).
"""

from dataclasses import dataclass

from mla_converters.checkpoints.shape import PlannedSource
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.attention_aware.refit import BATCH, QUERIES
from mla_converters.methods.attention_aware.run import WINDOW, enough_text, random_count
from mla_converters.options import Options
from mla_converters.resume.layer_pass import record_bytes
from mla_converters.text.sampling import TOKENS, sampling_dtype


@dataclass(frozen=True)
class MethodCost:
    """Core-seconds of a method.

    Attributes:
        calibration: per token of each stream that passes through the layers and parameter of these.
        search: per layer and number of a token's queries, for statistics and searching on a few windows, however many
            calibrate.
        streams: of all text's hidden states that pass through the layers, but for the one that a fit of layers adds.
        random: whether random tokens pass beside those that calibrate.
        decompositions: eigendecompositions of each layer's second moments.
        refit: per token that refits a layer and parameter of its attention; the keys that it reads included.
        output_fit: whether without a refit the output projection is fitted by least squares.
    """

    calibration: float
    search: float
    streams: int
    decompositions: int
    random: bool = False
    refit: float = 0.0
    output_fit: bool = False


METHOD_COSTS = {
    "transmla": MethodCost(calibration=1.6e-11, search=1e-3, streams=1, decompositions=8),
    "attention-aware": MethodCost(
        calibration=1.6e-11,
        search=1e-3,
        streams=1,
        decompositions=10,
        random=True,
        refit=4.5e-10,
        output_fit=True,
    ),
}
REFIT_STEP_TOKENS = BATCH * QUERIES  # that a step compares
REFIT_BATCH_TOKENS = BATCH * WINDOW  # that a step may read
SAMPLING = 5e-11  # core-seconds per sampled token and parameter of the model; of an EPYC without AVX-512, in float32
DECOMPOSITION = 2.5e-10  # core-seconds per cubed width of the matrix, the products around it included
OUTPUT_FIT = 3.5e-11  # core-seconds per token and product of what heads read with itself and with what is missing
OUTPUT_FIT_SOLVED = 1.5e-10  # core-seconds per cubed width of what heads read
READ_AND_WRITE = 3e-9  # core-seconds per byte of weights
RUNTIME_BYTES = 700 * 10**6  # Python with torch, transformers and a tokenizer, and free memory that the allocator keeps
MOMENT_MATRICES = 8  # float64 matrices as large as a layer's second moments that are alive at the peak
CONVERTED_BYTES = 16  # of each number in a converted attention
OUTPUT_FIT_BYTES = 52  # of each product of what heads read: five matrices in float32, four in float64, at the most


def conversion_core_seconds(
    source: PlannedSource, method: str, calibration_tokens: int, weights_bytes: int, refit_steps: int
) -> float:
    """Core-seconds from the calibration text to the written checkpoint.

    For each layer ``calibration * streams * tokens * parameters``, random tokens included, where its second moments of
    ``2 * g * d`` keys and values count as ``2 * (2 * g * d) ** 2`` parameters, ``search * H * d``, ``decompositions *
    (2 * g * d) ** 3 * DECOMPOSITION`` and ``refit * refit_steps * REFIT_STEP_TOKENS * attention parameters``; of a
    refit, also the MLP and the gradient of its input, ``2 * calibration * refit_steps * REFIT_STEP_TOKENS * 3 * D *
    width``; without one, of the output's least squares, ``OUTPUT_FIT * tokens * H * d * (H * d + D) + OUTPUT_FIT_SOLVED
    * (H * d) ** 3``; and the time to read and write the weights.

    Args:
        source: the model.
        method: a key of :data:`METHOD_COSTS`.
        calibration_tokens: how many tokens calibrate.
        weights_bytes: of the written checkpoint.
        refit_steps: of each layer, where the method has them.
    """
    cost = METHOD_COSTS[method]
    parameters = source.layer_parameters + 2 * source.cached**2
    steps = refit_steps if cost.refit else 0
    random = random_count(calibration_tokens) if cost.random else 0
    refit = cost.refit * source.attention_parameters + 2 * cost.calibration * 3 * source.hidden * source.mlp_width
    read = source.query_heads * source.head_dim
    tokens, output_fit = calibration_tokens + random, 0.0
    fits = cost.output_fit and _fits_output(source, calibration_tokens, refit_steps)
    streams = cost.streams + (1 if steps or fits else 0)
    if fits:
        output_fit = OUTPUT_FIT * tokens * read * (read + source.hidden) + OUTPUT_FIT_SOLVED * read**3
    per_layer = (
        cost.calibration * (streams * calibration_tokens + random) * parameters
        + cost.search * read
        + DECOMPOSITION * cost.decompositions * source.cached**3
        + refit * steps * REFIT_STEP_TOKENS
        + output_fit
    )
    return source.layers * per_layer + READ_AND_WRITE * weights_bytes


def sampling_core_seconds(source: PlannedSource, calibration_tokens: int) -> float:
    """Core-seconds for the model to write its own calibration text: ``tokens * parameters * SAMPLING``."""
    return SAMPLING * calibration_tokens * source.parameters


def conversion_memory(
    source: PlannedSource, layout: CacheBudget, calibration_tokens: int, refit_steps: int = Options.refit_steps
) -> int:
    """Peak bytes of memory of a conversion by the default method, calibrated on a file, where bfloat16 is native.

    Python and its packages, and the larger of the embedding and what one layer takes: its weights as stored, those of
    its attention again in float32; the hidden states ``[tokens, D]`` in float32, of the source for the text and random
    tokens, and where layers are fitted of the converted model for the text; the second moments of ``2 * g * d`` keys
    and values in float64; its converted attention, in float64 while it is computed or in float32 with gradients,
    momentum and what Muon makes of them while it is refitted; a refit's activations, and without one the matrices of
    the output's least squares.

    Args:
        source: the model.
        layout: of the cache.
        calibration_tokens: how many tokens calibrate.
        refit_steps: of each layer; 0 for the closed form alone.
    """
    rope, latent, heads, head_dim = layout.qk_rope_head_dim, layout.kv_lora_rank, source.query_heads, source.head_dim
    converted = (
        heads * (2 * head_dim + rope) + latent + rope
    ) * source.hidden + heads * 2 * head_dim * latent  # queries, outputs and what is cached; kv_b_proj
    layer = (
        source.weight_bytes * source.layer_parameters
        + 4 * source.attention_parameters
        + 4 * _state_tokens(source, calibration_tokens, refit_steps) * source.hidden
        + 8 * MOMENT_MATRICES * source.cached**2
        + CONVERTED_BYTES * converted
    )
    if refit_steps:
        per_token = 8 * source.hidden + 16 * heads * (head_dim + rope)
        layer += per_token * min(calibration_tokens, REFIT_BATCH_TOKENS)
        layer += 16 * source.mlp_width * REFIT_STEP_TOKENS
    elif _fits_output(source, calibration_tokens, refit_steps):
        least_squares = 4 * converted + OUTPUT_FIT_BYTES * (heads * head_dim) ** 2
        layer += max(0, least_squares - CONVERTED_BYTES * converted)
    return RUNTIME_BYTES + max(layer, source.weight_bytes * source.embedding_parameters)


def _fits_output(source: PlannedSource, calibration_tokens: int, refit_steps: int) -> bool:
    """Whether the default method fits outputs by least squares."""
    return not refit_steps and enough_text(calibration_tokens, source.query_heads * source.head_dim)


def _state_tokens(source: PlannedSource, calibration_tokens: int, refit_steps: int) -> int:
    """Tokens whose hidden states are kept by the default method: of the source, and of the converted model where its
    layers are fitted."""
    fitted = refit_steps or _fits_output(source, calibration_tokens, refit_steps)
    return (2 if fitted else 1) * calibration_tokens + random_count(calibration_tokens)


def conversion_disk(source: PlannedSource, calibration_tokens: int, weights_bytes: int, refit_steps: int) -> int:
    """Peak bytes on disk: the weights, and the hidden states that a resumed run goes on from."""
    return weights_bytes + record_bytes(_state_tokens(source, calibration_tokens, refit_steps), source.hidden)


def sampling_memory(source: PlannedSource, calibration_tokens: int) -> int:
    """Peak bytes of memory while the model writes its own calibration text on this machine: it and its KV cache for
    the texts that are written at once."""
    cached = min(calibration_tokens, TOKENS) * source.layers * source.cached
    return RUNTIME_BYTES + sampling_dtype().itemsize * (source.parameters + cached)


def written_bytes(source: PlannedSource, layout: CacheBudget) -> int:
    """Bytes of a converted checkpoint, which is all that a conversion writes.

    ``q_proj``, ``kv_a_proj_with_mqa`` and ``kv_b_proj`` replace the projections to queries, keys and values (with
    QK-norm, that to keys stays, and ``kv_a_proj_with_mqa`` reads keys and the layer's input), the norm of queries goes,
    and each layer gets its ``rope_freqs``; everything else stays.
    """
    latent, rope, heads, head_dim = layout.kv_lora_rank, layout.qk_rope_head_dim, source.query_heads, source.head_dim
    added = heads * 2 * head_dim * latent
    inputs = source.hidden + source.qkv_bias
    if source.qk_norm:
        keys = source.kv_heads * head_dim
        added += heads * rope * inputs + (latent + rope) * (keys + inputs) - keys * inputs - head_dim
    else:
        projected = heads * (head_dim + rope) + latent + rope  # queries, and what is cached
        added += projected * inputs - source.qkv_parameters
    parameters = source.parameters + source.layers * added
    return parameters * source.weight_bytes + source.layers * 4 * (rope // 2)
