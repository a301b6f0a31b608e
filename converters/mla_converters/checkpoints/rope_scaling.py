"""RoPE scalings, and the contexts that belong to them.

The type ``linear`` is special: vLLM multiplies ``max_position_embeddings`` by its factor, and so takes it for the
context before the scaling. With all other types that are supported here, it is the context after the scaling.
"""

import math
from copy import deepcopy
from typing import Any

from transformers import PretrainedConfig

from mla_converters.errors import ConversionError

LINEAR = "linear"
ORIGINAL = "original_max_position_embeddings"
WITH_ORIGINAL = ("yarn", "llama3")  # the types that have it among their parameters
FROM_ELSEWHERE = ("type", "rope_theta", ORIGINAL)  # set in the source's parameters where the user need not say them
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")  # the first two are older names


def linear_factor(config: PretrainedConfig) -> float:
    """The factor by which a context is longer than ``max_position_embeddings``."""
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") if rope.get("rope_type") == LINEAR else None
    return factor if isinstance(factor, int | float) and math.isfinite(factor) else 1


def context_length(config: PretrainedConfig) -> int:
    """The longest context in tokens, as vLLM reads it from a configuration."""
    return int(config.max_position_embeddings * linear_factor(config))


def positions_for(context: int, config: PretrainedConfig) -> int:
    """The largest ``max_position_embeddings`` that gives at most this context."""
    return math.ceil((context + 1) / linear_factor(config)) - 1


def scale_rope(config: PretrainedConfig, scaling: dict[str, Any]) -> PretrainedConfig:
    """A configuration with another RoPE scaling, and the context that belongs to it.

    Args:
        config: of the source.
        scaling: ``rope_type``, ``factor`` and further parameters, as transformers names them.

    Returns:
        A copy. Its base frequency is the source's. Its :func:`context_length` is ``factor`` times the context before
        the scaling, rounded down.

    Raises:
        ConversionError: the source has another scaling already.
    """
    before = config.rope_parameters
    if before.get("rope_type", "default") != "default":
        same = {name: value for name, value in before.items() if name in scaling or name not in FROM_ELSEWHERE}
        if same != scaling:
            raise ConversionError(
                f"The source scales RoPE already ({before}), so that --rope-scaling cannot scale it in another way: "
                "leave --rope-scaling out, or give the model before its context was extended."
            )
        return config
    scaling = dict(scaling)
    original = scaling.get(ORIGINAL) or config.max_position_embeddings
    if scaling["rope_type"] in WITH_ORIGINAL:
        scaling[ORIGINAL] = original
    config = deepcopy(config)
    kept = {name: before[name] for name in ("rope_theta", "partial_rotary_factor") if name in before}
    config.rope_parameters = {**kept, **scaling}
    if scaling["rope_type"] != LINEAR:
        config.max_position_embeddings = int(scaling["factor"] * original)
    return config


def with_rope_of(raw: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """A ``config.json`` with the RoPE parameters and the context of a transformers configuration."""
    kept = {name: value for name, value in raw.items() if name not in ROPE_KEYS}
    return kept | {
        "rope_parameters": dict(config.rope_parameters),
        "max_position_embeddings": config.max_position_embeddings,
    }
