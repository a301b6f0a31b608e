"""One attention layer: its sizes, a random cache, and attention in float64 to compare a backend with."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sizes:
    """Sizes of one layer; the defaults are SmolLM2's at half of its cache.

    Attributes:
        heads: query heads.
        latent: ``kv_lora_rank``.
        rope: ``qk_rope_head_dim``.
        nope: ``qk_nope_head_dim``.
        v: ``v_head_dim``.
        block: tokens of a page of the cache.
    """

    heads: int = 9
    latent: int = 128
    rope: int = 64
    nope: int = 64
    v: int = 64
    block: int = 16


class Projection(torch.nn.Linear):
    """What a backend uses of vLLM's linear layers, which themselves need a distributed environment."""

    quant_method = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The product, and no bias: vLLM's layers return both."""
        return super().forward(x), None


def impl_arguments(sizes: Sizes, kv_b_proj: torch.nn.Module, cache_dtype: str = "auto") -> dict[str, Any]:
    """The arguments with which vLLM's MLA layer makes its backend's implementation."""
    return dict(
        num_heads=sizes.heads,
        head_size=sizes.latent + sizes.rope,
        scale=sizes.v**-0.5,
        num_kv_heads=1,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype=cache_dtype,
        logits_soft_cap=None,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
        q_lora_rank=None,
        kv_lora_rank=sizes.latent,
        qk_nope_head_dim=sizes.nope,
        qk_rope_head_dim=sizes.rope,
        qk_head_dim=sizes.nope + sizes.rope,
        v_head_dim=sizes.v,
        kv_b_proj=kv_b_proj,
    )


def make_cache(sizes: Sizes, lengths: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache with random tokens for sequences of these lengths, its pages in random order.

    Returns:
        The cache ``[pages, block, latent + rope]``, NaN wherever there is no token, and the block table
        ``[sequences, pages of the longest + 1]`` int32. Unused entries of the table point to a page of NaN.
    """
    needed = [-(-length // sizes.block) for length in lengths]
    order = (torch.randperm(sum(needed)) + 1).int()
    cache = torch.full((sum(needed) + 1, sizes.block, sizes.latent + sizes.rope), float("nan"), dtype=dtype)
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    for i, (length, blocks) in enumerate(zip(lengths, order.split(needed), strict=True)):
        table[i, : len(blocks)] = blocks
        for j in range(length):
            cache[blocks[j // sizes.block], j % sizes.block] = torch.randn(cache.shape[-1], dtype=dtype)
    return cache, table


def cached_tokens(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The tokens of the sequence with this row of the block table: ``[length, latent + rope]`` float64."""
    return cache[table.long()].flatten(0, 1)[:length].double()


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the newest tokens to all tokens, in float64.

    Args:
        q: ``[new, heads, nope + rope]``.
        k: ``[tokens, heads, nope + rope]``.
        v: ``[tokens, heads, v]``.
        scale: of the scores before the softmax.

    Returns:
        ``[new, heads, v]`` float64.
    """
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    new, total = scores.shape[1:]
    scores.masked_fill_(torch.ones(new, total, dtype=torch.bool).triu(total - new + 1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double())


def absorption(
    heads: int, own: int, latent: int, rope: int, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random arguments of :func:`vllm_mla_plugin.backends.gpu_absorb.absorb`.

    The queries are a part of a projection's result, and positions are out of order.
    """
    q = torch.randn(rows, heads * own + 3, dtype=dtype)[:, : heads * own].unflatten(-1, (heads, own))
    weight = torch.randn(heads, own, latent + rope, dtype=dtype) * own**-0.5
    angles = torch.outer(torch.arange(200.0), torch.rand(rope // 2))
    return q, weight, torch.randperm(200).repeat(-(-rows // 200))[:rows], torch.cat((angles.cos(), angles.sin()), -1)


def absorbed(q: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """What :func:`vllm_mla_plugin.backends.gpu_absorb.absorb` computes, in float64."""
    out = torch.einsum("thd,hdn->thn", q.double(), weight.double())
    cos, sin = turns.double()[positions][:, None].chunk(2, dim=-1)
    latent, first, second = out.split([out.shape[-1] - turns.shape[-1], cos.shape[-1], cos.shape[-1]], dim=-1)
    return torch.cat((latent, first * cos - second * sin, second * cos + first * sin), dim=-1)
