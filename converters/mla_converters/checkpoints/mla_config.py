"""``config.json`` of a converted model."""

from typing import Any

from mla_converters.checkpoints.config_keys import DUAL_CHUNK
from mla_converters.checkpoints.rope_scaling import positions_for
from mla_converters.checkpoints.source import Source
from mla_converters.checkpoints.tensors import SECOND_TOKEN
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import has_query_map
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json

# dtype's older name; fields about sliding windows, which a converted model never has; and an attention that it has not.
STALE = ("torch_dtype", "layer_types", "max_window_layers", DUAL_CHUNK)


def per_layer_sizes(budgets: list[CacheBudget]) -> dict[str, list[int]]:
    """``kv_lora_ranks`` and ``qk_rope_head_dims`` where layers differ; nothing where they do not."""
    if len(set(budgets)) == 1:
        return {}
    return {
        "kv_lora_ranks": [budget.kv_lora_rank for budget in budgets],
        "qk_rope_head_dims": [budget.qk_rope_head_dim for budget in budgets],
    }


def mla_config(
    source: Source,
    budget: CacheBudget,
    sizes: dict[str, list[int]],
    nope_dim: int,
    context: int,
    dtype: str,
    format: CacheFormat | None = None,
) -> dict[str, Any]:
    """The configuration, all but the report.

    Args:
        source: the model.
        budget: sizes of the cache; where layers differ, the largest.
        sizes: of :func:`per_layer_sizes`.
        nope_dim: ``qk_nope_head_dim``.
        context: the longest that the converted model takes, in tokens.
        dtype: of the weights.
        format: the packed format of every layer's cache; None if it is not packed.
    """
    kept = {name: value for name, value in source.raw_config.items() if not name.startswith("_") and name not in STALE}
    kept |= dict.fromkeys(kept.keys() & set(SECOND_TOKEN), 0)  # layers that are left out
    if "attention_bias" in kept and source.family.biases == (
        "attention_bias",
        "attention_bias",
    ):  # which Mistral ignores, and an MLA model would not
        kept["attention_bias"] = "o_proj.bias" in source.attention_names(0)
    if source.quantisation is not None:
        kept["quantization_config"] = source.quantisation.carried(source.config.num_hidden_layers)
    return kept | {
        "architectures": [source.family.mla_architecture],
        "model_type": source.family.mla_model_type,
        "dtype": dtype,
        "head_dim": source.head_dim,
        "max_position_embeddings": positions_for(context, source.config),
        "sliding_window": None,
        "use_sliding_window": False,
        "kv_lora_rank": budget.kv_lora_rank,
        "q_lora_rank": None,
        "qk_rope_head_dim": budget.qk_rope_head_dim,
        "qk_nope_head_dim": nope_dim,
        "v_head_dim": source.head_dim,
        "rotary_query_map": has_query_map(
            source.head_dim, source.config.hidden_size, budget.qk_rope_head_dim, nope_dim, source.shape.qk_norm
        ),
        "softmax_scale": source.softmax_scale,
        "converted_rope_parameters": dict(source.config.rope_parameters),
        **sizes,
        **({} if format is None else {"latent_cache": latent_cache_json([format])}),
    }
