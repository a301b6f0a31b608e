"""Finds a source's family by its configuration, and refuses the sources that MLA cannot represent.

The families themselves are in :mod:`vllm_mla_plugin.checkpoint.families`.
"""

from collections.abc import Callable

from transformers import PretrainedConfig

from mla_converters.checkpoints.rope_scaling import context_length, linear_factor
from mla_converters.errors import ConversionError
from vllm_mla_plugin.checkpoint.families import FAMILIES, Family

REQUIRED = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "hidden_size",
    "vocab_size",
)
# No model has more. One that claimed more would take hours to look at, or overflow the counters.
LARGEST = {
    "num_hidden_layers": 10_000,
    "num_experts": 10_000,
    "num_experts_per_tok": 10_000,
    "num_attention_heads": 2**31,
    "num_key_value_heads": 2**31,
    "head_dim": 2**31,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "hidden_size": 2**31,
    "intermediate_size": 2**31,
    "moe_intermediate_size": 2**31,
    "vocab_size": 2**31,
}
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")


def source_head_dim(config: PretrainedConfig) -> int:
    """Head size ``d`` of a source; some configurations do not name it, and it is computed."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def active_window(config: PretrainedConfig) -> int | None:
    """The sliding window through which some layer attends; None if no layer has one that ever cuts anything off."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        return None
    return window if window < context_length(config) else None


def window_refusal(window: int) -> str:
    """Why an active sliding window is refused, and what to do."""
    return (
        f"The source attends through a sliding window of {window} tokens, which MLA does not represent; with "
        f"--max-context {window} it is converted for contexts in which the window is inactive."
    )


REFUSALS: tuple[tuple[Callable[[dict], object], str], ...] = (
    (
        lambda config: "kv_lora_rank" in config or str(config.get("model_type", "")).endswith("_mla"),
        "uses MLA already: serve it as it is.",
    ),
    (
        lambda config: config.get("is_encoder_decoder"),
        "is an encoder-decoder, and MLA here is for decoders alone: there is no way to convert it.",
    ),
    (
        lambda config: any(key.startswith(("vision_", "audio_", "text_config")) for key in config),
        "reads more than text: convert a checkpoint of its language model alone.",
    ),
    (
        lambda config: config.get("attn_logit_softcapping"),
        "caps attention scores (attn_logit_softcapping), which vLLM's MLA backends cannot do: serve it as it is.",
    ),
    (
        lambda config: config.get("model_type") == "gpt_oss",
        "has attention sinks, which vLLM's MLA backends do not have: serve it as it is.",
    ),
    (
        lambda config: (
            config.get("alibi")
            or config.get("model_type") == "bloom"
            or (isinstance(config.get("attn_config"), dict) and config["attn_config"].get("alibi"))
        ),
        "has ALiBi instead of RoPE, which vLLM's MLA backends cannot do: serve it as it is.",
    ),
    (
        lambda config: (
            any(key.startswith(("mamba_", "ssm_", "linear_num_")) for key in config)
            or "state_size" in config
            or "hybrid_override_pattern" in config
        ),
        "has layers that are no attention (a state-space or linear-attention hybrid), which this does not convert: "
        "serve it as it is.",
    ),
)
"""Sources that MLA cannot represent, whatever the family: a test of ``config.json``, and the end of the sentence that
refuses the source."""


def architecture_names(config: dict) -> list[str]:
    """The names that a ``config.json`` gives under ``architectures``.

    Raises:
        ConversionError: it gives something else than names.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConversionError(f"config.json has architectures {names!r}, where a list of names was expected.")
    return names


def find_family(config: dict) -> Family:
    """The family of a source, by its ``config.json``.

    Raises:
        ConversionError: the source is of no family that can be converted, or uses MLA already.
    """
    architectures = architecture_names(config)
    name = architectures[0] if architectures else config.get("model_type", "none named")
    supported = ", ".join(FAMILIES)
    for applies, reason in REFUSALS:
        if applies(config):
            raise ConversionError(f"The source ({name}) {reason}")
    if name not in FAMILIES:
        raise ConversionError(f"Architecture {name!r} is not supported; supported are: {supported}.")
    family = FAMILIES[name]
    if config.get("model_type") != family.model_type:
        raise ConversionError(
            f"config.json says architecture {name} but model_type {config.get('model_type')!r}, "
            f"where {family.model_type!r} was expected."
        )
    return family


def check_config(config: PretrainedConfig, family: Family) -> None:
    """Refuse variants of a supported family that MLA cannot represent.

    Raises:
        ConversionError: MLA cannot represent the source; the sentence says why.
    """
    for name, largest in LARGEST.items():
        value = getattr(config, name, None)
        if name == "sliding_window" and value == 0:  # transformers' Qwen2-MoE without a window
            continue
        if (value is not None or name in REQUIRED) and (type(value) is not int or not 1 <= value <= largest):
            raise ConversionError(
                f"config.json has {name} {value!r}, where a number from 1 to {largest:,} was expected."
            )
    positions, factor = config.max_position_embeddings, linear_factor(config)
    if not 1 <= positions * factor <= LARGEST["max_position_embeddings"]:
        raise ConversionError(
            f"The RoPE factor {factor} with max_position_embeddings {positions} gives no context of 1 to "
            f"{LARGEST['max_position_embeddings']:,} tokens: correct it."
        )
    experts, chosen = getattr(config, "num_experts", None), getattr(config, "num_experts_per_tok", None)
    if experts is not None and (chosen or 0) > experts:
        raise ConversionError(f"config.json has num_experts_per_tok {chosen} of {experts} experts.")
    layer_types = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in layer_types and getattr(config, "sliding_window", None) is None:
        raise ConversionError(
            "config.json has layer_types with sliding_attention, but no sliding_window: config.json is wrong."
        )
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE:
        raise ConversionError(
            f"RoPE type {rope_type!r} cannot be converted, because its frequencies are not constant or not known "
            f"here; supported are: {', '.join(SUPPORTED_ROPE)}."
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0 and not family.partial_rotary:
        raise ConversionError(
            f"config.json has a partial_rotary_factor, which {family.architecture} does not have in transformers: "
            "config.json is wrong."
        )
    if source_head_dim(config) % 2:
        raise ConversionError(f"The source's head size is {source_head_dim(config)}; RoPE needs an even one.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConversionError(
            f"{config.num_attention_heads} query heads cannot be shared evenly by "
            f"{config.num_key_value_heads} KV heads: config.json is wrong."
        )
