"""Accounts for every key of a ``config.json``: it is known to transformers, without effect, refused, or listed."""

import re
from typing import Any

from transformers import PretrainedConfig

from mla_converters.errors import ConversionError

DUAL_CHUNK = "dual_chunk_attention_config"
UNDERSTOOD = {
    "rope_theta": "an older name, which transformers puts into rope_parameters",
    "rope_scaling": "an older name of rope_parameters",
    "partial_rotary_factor": "transformers puts it into rope_parameters, and check_config reads it there",
    "original_max_position_embeddings": "transformers puts it into rope_parameters",
    "torch_dtype": "the older name of dtype",
    "head_dim": "read by source_head_dim, and by transformers where a class does not name it",
    "layer_types": "read by active_window",
    "sliding_window": "read by active_window",
    "use_sliding_window": "only with sliding_window, which active_window reads",
    "max_window_layers": "only with sliding_window, which active_window reads",
    "attention_bias": "each bias is a tensor, and every tensor is accounted for",
    "mlp_bias": "each bias is a tensor, and every tensor is accounted for",
    "qkv_bias": "each bias is a tensor, and every tensor is accounted for",
    "quantization_config": "read by find_quantisation",
    DUAL_CHUNK: "left out of OUT with a warning",
}
"""Keys that other code reads although not every family's class names them, with that code."""
ASSUMED: dict[str, dict[str, Any]] = {
    "minimax_m2": {
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0,
    },
}
"""What a family's class in transformers computes without a key that says so, by ``model_type``."""
READ_ELSEWHERE = {
    "minimax_m2": {"rotary_dim": "transformers puts it into rope_parameters"},
}
WITHOUT_EFFECT = {
    "auto_map": "Python code for the same model, which is not run",
    "custom_pipelines": "Python code for the same model, which is not run",
    "transformers_version": "the version that wrote the file",
    "is_llama_config": "says again that the model is a Llama",
    "transformers.js_config": "settings of another runtime",
    "layer_norm_eps": "of another norm than RMSNorm, which these families do not have",
    "layer_norm_epsilon": "of another norm than RMSNorm, which these families do not have",
    "max_sequence_length": "how the model was trained or is to be called",
    "max_seq_len": "how the model was trained or is to be called",
    "seq_length": "how the model was trained or is to be called",
    "model_max_length": "how the model was trained or is to be called",
    "tokenizer_class": "of the tokenizer, which is carried over and compared",
    "tokenizer_model_max_length": "of the tokenizer, which is carried over and compared",
    "tokenizer_padding_side": "of the tokenizer, which is carried over and compared",
    "gradient_checkpointing": "about training",
    "z_loss_coefficient": "about training",
    "attn_implementation": "which kernel computes attention, not the result",
    "use_flash_attn": "which kernel computes attention, not the result",
    "use_flash_attention": "which kernel computes attention, not the result",
    "use_flash_attention_2": "which kernel computes attention, not the result",
    "flash_attention": "which kernel computes attention, not the result",
    "flash_attn": "which kernel computes attention, not the result",
    "use_fused_rms_norm": "which kernel computes the norm, not the result",
    "use_fused_rope": "which kernel computes RoPE, not the result",
    "fused_rms_norm": "which kernel computes the norm, not the result",
    "use_bfloat16": "replaced by dtype long ago",
    "torchscript": "how transformers 4 returned results",
    "tf_legacy_loss": "about training in TensorFlow",
    "pruned_heads": "how transformers 4 pruned; the shapes of all tensors are checked",
    "cross_attention_hidden_size": "of encoder-decoders, which are refused",
    "add_cross_attention": "of encoder-decoders, which are refused",
    "tie_encoder_decoder": "of encoder-decoders, which are refused",
    "is_decoder": "of encoder-decoders, which are refused",
    "decoder_start_token_id": "of encoder-decoders, which are refused",
    "finetuning_task": "how the model was trained",
    "task_specific_params": "how text is generated, not the model",
    "prefix": "how text is generated, not the model",
    "do_sample": "how text is generated, not the model",
    "temperature": "how text is generated, not the model",
    "top_k": "how text is generated, not the model",
    "top_p": "how text is generated, not the model",
    "typical_p": "how text is generated, not the model",
    "repetition_penalty": "how text is generated, not the model",
    "encoder_no_repeat_ngram_size": "how text is generated, not the model",
    "no_repeat_ngram_size": "how text is generated, not the model",
    "length_penalty": "how text is generated, not the model",
    "diversity_penalty": "how text is generated, not the model",
    "exponential_decay_length_penalty": "how text is generated, not the model",
    "num_beams": "how text is generated, not the model",
    "num_beam_groups": "how text is generated, not the model",
    "num_return_sequences": "how text is generated, not the model",
    "early_stopping": "how text is generated, not the model",
    "max_length": "how text is generated, not the model",
    "min_length": "how text is generated, not the model",
    "output_scores": "how text is generated, not the model",
    "return_dict_in_generate": "how text is generated, not the model",
    "remove_invalid_values": "how text is generated, not the model",
    "bad_words_ids": "how text is generated, not the model",
    "suppress_tokens": "how text is generated, not the model",
    "begin_suppress_tokens": "how text is generated, not the model",
}
"""Keys that do not change what the model computes, with the reason."""
PATTERNS_WITHOUT_EFFECT = {
    r"_.*": "transformers' own notes: _name_or_path, _attn_implementation …",
    r"unsloth_.*": "how the model was trained",
    r".*(dropout|pdrop|_drop).*": "of training: nothing is dropped when a model is served",
    r".*init(ializer)?(_.*)?": "how weights began before training",
    r".*_token_(id|index)": "which token has a role, not what is computed for it",
}
"""The same by regular expressions that match a whole name."""
CHANGES_RESULT = re.compile(
    r"rope|rotary|alibi|position|scal|window|softcap|logit|multiplier|norm|bias|chunk|sink|attention|attn|mask|gate|"
    r"gating|residual|mup|temperature|parallel_block|parallel_residual"
)
"""Matches in names of keys that say that they change what the model computes."""
MULTIPLIER = re.compile(r"multiplier|scal|factor|ratio")
ROPE_PARAMETERS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        *("low_freq_factor", "high_freq_factor"),
        "finetuned",  # how the model was trained
    )
)
"""Keys inside ``rope_parameters`` that transformers reads, and one without effect."""


def account_for_keys(raw: dict[str, Any], config_class: type[PretrainedConfig]) -> tuple[list[str], list[str]]:
    """Check the keys that the family's class in transformers does not know.

    Args:
        raw: the content of ``config.json``.
        config_class: the family's class.

    Returns:
        Keys that were not understood and that may or may not matter, sorted; and warnings.

    Raises:
        ConversionError: a key says that it changes what the model computes, in a way that is not known here.
    """
    known = _known(config_class)
    strange = {name: value for name, value in raw.items() if name not in known and not _without_effect(name)}
    model_type = config_class.model_type
    assumed = ASSUMED.get(model_type, {})
    strange = {
        name: value
        for name, value in strange.items()
        if not (name in READ_ELSEWHERE.get(model_type, {}) or (name in assumed and value == assumed[name]))
        # 1 for attention in each layer
        and not (name == "attn_type_list" and isinstance(value, list) and set(value) == {1})
    }
    strange |= _strange_rope_parameters(raw)
    unknown = []
    for name, value in strange.items():
        if name in assumed or CHANGES_RESULT.search(name.lower()):
            if name in assumed or not is_neutral(name, value):
                raise ConversionError(
                    f"config.json has {name} {_shown(value)}, which by its name changes what the model computes, and "
                    f"transformers' {config_class.__name__} does not know it: take the key out if the model does not "
                    "need it, else the model cannot be converted."
                )
        else:
            unknown.append(name)
    return sorted(unknown), [_dual_chunk_warning(raw[DUAL_CHUNK])] if raw.get(DUAL_CHUNK) else []


def is_neutral(name: str, value: Any) -> bool:
    """Whether a key with this value changes nothing: it is off, empty, or multiplies by 1."""
    if value is None or value is False or (isinstance(value, str | list | dict) and not value):
        return True
    if value is True or not isinstance(value, int | float):
        return False
    return value == (1 if MULTIPLIER.search(name.lower()) else 0)


def _known(config_class: type[PretrainedConfig]) -> set[str]:
    return {*config_class().to_dict(), *config_class.attribute_map, *UNDERSTOOD}


def _without_effect(name: str) -> bool:
    return name in WITHOUT_EFFECT or any(re.fullmatch(pattern, name) for pattern in PATTERNS_WITHOUT_EFFECT)


def _strange_rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """Keys of RoPE's parameters that transformers does not read, by their full names."""
    return {
        f"{outer}.{name}": value
        for outer in ("rope_scaling", "rope_parameters")
        if isinstance(raw.get(outer), dict)
        for name, value in raw[outer].items()
        if name not in ROPE_PARAMETERS
    }


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}…"


def _dual_chunk_warning(settings: Any) -> str:
    size = settings.get("original_max_position_embeddings") if isinstance(settings, dict) else None
    within = f" within {size:,} tokens" if isinstance(size, int) else " within the context that it was trained with"
    return (
        f"The source's config.json has {DUAL_CHUNK}, for contexts longer than it was trained with; MLA does not have "
        f"that attention, so that OUT leaves the key out and computes what the source does{within} only."
    )
