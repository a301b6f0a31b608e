"""The cost of method ``attention-aware``. Constants were measured as in :mod:`mla_converters.methods.cost`."""

from mla_converters.checkpoints.shape import Shape
from mla_converters.methods.asked_cache import AskedCache
from mla_converters.methods.attention_aware.amounts import WINDOW, enough_text, random_count, too_little_text
from mla_converters.methods.attention_aware.layer import ATTENTION_WINDOWS
from mla_converters.methods.attention_aware.refit import BATCH, QUERIES
from mla_converters.methods.base import Cost
from mla_converters.methods.cost import CALIBRATION, CONVERTED_BYTES, Passes, conversion_cost, converted_numbers
from mla_converters.methods.search import LAYERS
from mla_converters.options import AttentionAwareOptions, Ingredient

SEARCH = 1e-3  # core-seconds per layer and number in a token's queries (``H * d``), for statistics and searches
FORMAT_SEARCH = 4e-3  # the same for each layer on which formats of a packed cache are compared
ROUNDING = 3e-8  # core-seconds per number that is packed and read again
ATTENTION = 0.9e-11  # core-seconds per token, earlier token, head, and number of its query and its value
REFIT = 4.5e-10  # core-seconds per compared token and attention parameter; includes the keys that the token reads
STEP_TOKENS = BATCH * QUERIES  # tokens whose outputs one step of the refit compares
BATCH_TOKENS = BATCH * WINDOW  # tokens that one step of the refit may read
CANDIDATES = 5  # maps of a layer that are compared, each on a window
OUTPUT_FIT = 3.5e-11  # core-seconds per token and product of two heads' outputs, or of a head's output and an error
OUTPUT_FIT_SOLVED = 1.5e-10  # core-seconds per cubed width of the heads' outputs
OUTPUT_FIT_BYTES = 52  # bytes per product of two heads' outputs: at most five float32 and four float64 matrices


def attention_aware_cost(options: AttentionAwareOptions, shape: Shape, cache: AskedCache, tokens: int) -> Cost:
    """The cost with ``tokens`` of calibration text.

    The hidden states of the source pass through the layers. With a refit or least squares, those of the converted
    model pass through too. In core-seconds per layer:

    - A refit takes ``REFIT * steps * STEP_TOKENS * attention parameters``. Its MLP, with the gradient of the MLP's
      input, takes ``2 * CALIBRATION * steps * STEP_TOKENS * 3 * D * width``.
    - Least squares of the output take ``OUTPUT_FIT * tokens * H * d * (H * d + D) + OUTPUT_FIT_SOLVED * (H * d) ** 3``.
    - The converted attention has wider heads than the source's: ``ATTENTION * tokens * WINDOW * H * 2 * r`` more, and
      three times as much where a gradient is computed.
    - Rounding takes ``ROUNDING * tokens * (R + r)``.

    See :func:`_format_search` for the search of a packed format.
    """
    budget = cache.budget
    read, random, steps = shape.query_heads * shape.head_dim, random_count(tokens), options.refit_steps
    wants_fit = not steps and Ingredient.LEAST_SQUARES not in options.without
    fits = wants_fit and enough_text(tokens, read)
    seconds, extra, converted_tokens, attended = 0.0, 0, CANDIDATES * WINDOW, 0
    if steps:
        mlp = 0 if Ingredient.MLP in options.without else 2 * CALIBRATION * 3 * shape.hidden * shape.mlp_width
        seconds = (REFIT * shape.attention_parameters + mlp) * steps * STEP_TOKENS
        per_token = 8 * shape.hidden + 16 * shape.query_heads * (shape.head_dim + budget.qk_rope_head_dim)
        extra = per_token * min(tokens, BATCH_TOKENS) + 16 * shape.mlp_width * STEP_TOKENS
        converted_tokens += tokens + steps * min(tokens, BATCH_TOKENS) // 2  # a step reads half of its windows
        attended = tokens + 3 * steps * STEP_TOKENS // 2
    elif fits:
        seconds = OUTPUT_FIT * (tokens + random) * read * (read + shape.hidden) + OUTPUT_FIT_SOLVED * read**3
        converted = converted_numbers(shape, budget)
        extra = max(0, 4 * converted + OUTPUT_FIT_BYTES * read**2 - CONVERTED_BYTES * converted) + 4 * tokens * read
        attended = tokens + random
        converted_tokens += attended
    seconds += ATTENTION * attended * WINDOW * shape.query_heads * 2 * budget.qk_rope_head_dim
    if cache.format is not None:
        seconds += ROUNDING * converted_tokens * budget.width
    if cache.searched_bytes is not None:
        seconds += _format_search(shape) / shape.layers
    passes = Passes(
        tokens=(2 if steps or fits else 1) * tokens + random,
        search=SEARCH * read,
        decompositions=10,
        seconds=seconds,
        bytes=extra,
    )
    warnings = (too_little_text(read),) if wants_fit and not fits else ()
    return conversion_cost(shape, budget, shape.head_dim, passes, warnings)


def _format_search(shape: Shape) -> float:
    """Core-seconds of the search for a packed format: some windows pass through all layers, and formats are compared
    on a few layers."""
    tokens = (ATTENTION_WINDOWS + 1) * WINDOW
    passes = CALIBRATION * tokens * shape.layer_parameters * shape.layers
    return passes + FORMAT_SEARCH * min(LAYERS, shape.layers) * shape.query_heads * shape.head_dim
