"""One attention layer's backend alone, its cache, and attention in float64 to compare it with."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_mla_plugin.backends.cpu import AnySizeCPUMLAImpl

current_platform.import_kernels()


@dataclass(frozen=True)
class Sizes:
    """Sizes of one layer; the defaults are SmolLM2's at half its cache."""

    heads: int = 9
    latent: int = 128
    rope: int = 64
    nope: int = 64
    v: int = 64
    block: int = 16


class Projection(torch.nn.Linear):
    """What the backend needs of vLLM's linear layers, which need a distributed environment."""

    quant_method = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


def impl_arguments(sizes: Sizes, kv_b_proj: torch.nn.Module, cache_dtype: str = "auto") -> dict[str, Any]:
    """What vLLM's MLA layer makes its backend's implementation with."""
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


def make_impl(sizes: Sizes, dtype: torch.dtype) -> AnySizeCPUMLAImpl:
    kv_b_proj = Projection(sizes.latent, sizes.heads * (sizes.nope + sizes.v), bias=False, dtype=dtype)
    kv_b_proj.weight.data.normal_(std=sizes.latent**-0.5)
    impl = AnySizeCPUMLAImpl(**impl_arguments(sizes, kv_b_proj))
    impl.process_weights_after_loading(dtype)
    return impl


def make_cache(sizes: Sizes, lengths: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache whose pages lie in random order, NaN where no token is; and the block table, its slack pointing there."""
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
    """``[length, width]`` in float64."""
    return cache[table.long()].flatten(0, 1)[:length].double()


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention ``[new, heads, v]`` of the newest tokens, in float64."""
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    new, total = scores.shape[1:]
    scores.masked_fill_(torch.ones(new, total, dtype=torch.bool).triu(total - new + 1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double())
