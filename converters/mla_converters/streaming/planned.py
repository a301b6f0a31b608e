"""The tensors of a converted checkpoint, computed from shapes alone."""

import torch

from mla_converters.checkpoints.source import LAYERS, Source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import LatentMap, mla_weights
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

SELF_ATTENTION = ".self_attn."
FREQS = "rope_freqs"
MEAN = "cache_mean"


def planned_tensors(
    source: Source,
    budgets: list[CacheBudget],
    nope_dim: int,
    dtype: torch.dtype | None,
    format: CacheFormat | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor of the converted checkpoint, on the meta device.

    Args:
        source: the model.
        budgets: cache sizes of each layer.
        nope_dim: ``qk_nope_head_dim``.
        dtype: dtype of the written weights, except for those of quantised modules. None keeps the dtype of each
            tensor, and gives converted projections the dtype of the projections that they are made of.
        format: the packed format of the cache; None if it is not packed.
    """
    tensors = {name: source.carried_meta(name) for name in source.carried_names()}
    for index, budget in enumerate(budgets):
        attention = source.attention_meta(index)
        maps = _meta_map(source.config.num_key_value_heads, source.head_dim, nope_dim, budget)
        converted = mla_weights(attention, maps)
        for name, tensor in converted.items():
            tensors[f"{LAYERS}{index}.self_attn.{name}"] = tensor.to(_converted_dtype(name, attention))
        if format is not None and format.mean:
            tensors[f"{LAYERS}{index}.self_attn.{MEAN}"] = torch.empty(2, budget.width, device="meta")
        tensors |= {name: source.carried_meta(name) for name in source.carried_names(index)}
    if dtype is None:
        return tensors
    return {name: tensor if _is_kept(source, name) else tensor.to(dtype) for name, tensor in tensors.items()}


def _is_kept(source: Source, name: str) -> bool:
    """Whether a tensor of the converted checkpoint keeps its dtype whatever the user wants."""
    if SELF_ATTENTION in name:
        return name.endswith((FREQS, MEAN))
    return source.is_quantised(name)


def _meta_map(kv_heads: int, head_dim: int, nope_dim: int, budget: CacheBudget) -> LatentMap:
    width, rope, latent = kv_heads * head_dim, budget.qk_rope_head_dim, budget.kv_lora_rank
    with torch.device("meta"):
        return LatentMap(
            rope_freqs=torch.empty(rope // 2),
            key_to_rope=torch.empty(rope, width, dtype=torch.float64),
            query_to_rope=torch.empty(kv_heads, rope, head_dim, dtype=torch.float64),
            query_to_nope=torch.empty(kv_heads, nope_dim, head_dim, dtype=torch.float64),
            kv_to_latent=torch.empty(latent, 2 * width, dtype=torch.float64),
            latent_to_key=torch.empty(kv_heads, nope_dim, latent, dtype=torch.float64),
            latent_to_value=torch.empty(kv_heads, head_dim, latent, dtype=torch.float64),
        )


def _converted_dtype(name: str, attention: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype of a converted tensor, by the dtypes of the source's attention."""
    if name == FREQS:
        # One that is rounded to 16 bits is off by whole turns after a few hundred tokens.
        return torch.float32
    if name in attention:
        return attention[name].dtype
    return torch.promote_types(attention["k_proj.weight"].dtype, attention["v_proj.weight"].dtype)
