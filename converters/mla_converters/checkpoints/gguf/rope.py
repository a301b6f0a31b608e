"""RoPE of a GGUF model as transformers' ``rope_parameters``."""

from itertools import product
from math import log
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mla_converters.checkpoints.gguf.keys import Keys
from mla_converters.errors import ConversionError

FACTORS = "rope_freqs.weight"
THETA = 10000.0  # where a file names none
# The first values are those of Llama 3.1 and its descendants.
HIGH_FREQUENCY_FACTORS = (4.0, 2.0, 8.0, 16.0, 32.0)
TRAINED_CONTEXTS = (8192, *(2**exponent for exponent in range(5, 21) if exponent != 13))
# Both sides round to float32, and interpolating between factors amplifies that. Candidates differ by far more.
TOLERANCE = 1e-5


def rope_parameters(keys: Keys, factors: torch.Tensor | None, head_dim: int) -> dict[str, Any]:
    """The parameters that give the frequencies with which llama.cpp would rotate.

    Args:
        keys: of the model.
        factors: the tensor :data:`FACTORS`, ``[head_dim / 2]``, by which frequencies are divided; None without it.
        head_dim: ``d``, all of which is rotated.

    Raises:
        ConversionError: transformers has no parameters for it.
    """
    _refuse_partial(keys, head_dim)
    theta = keys.number("rope.freq_base", THETA)
    kind, scaling = _scaling(keys)
    if factors is None or bool((factors == 1).all()):
        return {"rope_type": kind, "rope_theta": theta, **scaling}
    if kind != "default":
        raise ConversionError(f"{keys.path} scales RoPE by {FACTORS} and by rope.scaling too, which is not supported.")
    return {"rope_type": "llama3", "rope_theta": theta, **_llama3(keys, theta, factors, head_dim)}


def _refuse_partial(keys: Keys, head_dim: int) -> None:
    rotated = keys.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConversionError(
            f"{keys.path} rotates {rotated} of the {head_dim} numbers of each head (rope.dimension_count), which is "
            "not supported."
        )


def _scaling(keys: Keys) -> tuple[str, dict[str, Any]]:
    """transformers' name of the scaling, and its parameters."""
    kind = keys.text("rope.scaling.type", "linear")
    scale = keys.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        return "yarn", _yarn(keys, scale)
    if kind not in ("linear", "none"):
        raise ConversionError(f"{keys.path} has rope.scaling.type {kind!r}; supported are: none, linear, yarn.")
    if scale != 1:
        raise ConversionError(f"{keys.path} has rope.scaling.attn_factor {scale} without YaRN, which is not supported.")
    # Files older than rope.scaling have the second key. 0 is what some write for 1.
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    return ("default", {}) if kind == "none" or factor == 1 else ("linear", {"factor": factor})


def _yarn(keys: Keys, scale: float) -> dict[str, Any]:
    factor = keys.number("rope.scaling.factor")
    context = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    parameters: dict[str, Any] = {"factor": factor, "original_max_position_embeddings": context}
    for name in ("beta_fast", "beta_slow"):
        if keys.has(f"rope.scaling.yarn_{name}"):
            parameters[name] = keys.number(f"rope.scaling.yarn_{name}")
    # llama.cpp's converter writes transformers' attention_factor under this name.
    if keys.has("rope.scaling.yarn_attn_factor"):
        parameters["attention_factor"] = scale * keys.number("rope.scaling.yarn_attn_factor")
    elif scale != 1:
        parameters["attention_factor"] = scale * (1 + 0.1 * log(max(factor, 1.0)))
    return parameters


def _llama3(keys: Keys, theta: float, factors: torch.Tensor, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, recovered from the factors that llama.cpp's converter computed.

    Only the ratios of the two frequency factors and the context matter, so the lower factor is always 1.
    """
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    if factors.shape != exponents.shape or not (torch.isfinite(factors) & (factors > 0)).all():
        raise ConversionError(f"{keys.path} has {FACTORS} that are not {len(exponents)} positive numbers.")
    wanted = 1 / theta**exponents / factors
    for high, context in product(HIGH_FREQUENCY_FACTORS, TRAINED_CONTEXTS):
        parameters = {
            "factor": float(str(factors.max().numpy())),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        rope = {"rope_type": "llama3", "rope_theta": theta, **parameters}
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=head_dim, rope_parameters=rope))
        if torch.allclose(found, wanted, rtol=TOLERANCE, atol=0):
            return parameters
    raise ConversionError(
        f"{keys.path} has {FACTORS} that no setting of Llama 3.1's RoPE scaling gives; no other is supported."
    )
