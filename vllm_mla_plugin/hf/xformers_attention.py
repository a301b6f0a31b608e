"""xFormers' memory-efficient attention, whose keys and values may differ in width, so that MLA's need no padding.

It is registered with transformers as ``attn_implementation="xformers"``. It needs the package xformers, and a GPU.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "xformers"


def register() -> None:
    """Let transformers' models be loaded with this attention."""
    AttentionInterface.register(NAME, xformers_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def xformers_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attend, as transformers calls an attention.

    Args:
        module: the layer's attention; queries of ``num_key_value_groups`` heads share keys and values.
        query: ``[batch, heads, tokens, width]``.
        key, value: ``[batch, KV heads, keys, width]`` and ``[batch, KV heads, keys, width of values]``.
        attention_mask: boolean ``[batch, 1, tokens, keys]``, true where attention is allowed; None for causal attention
            of all tokens.
        dropout: probability.
        scaling: factor on the scores.

    Returns:
        ``[batch, tokens, heads, width of values]``, and no weights.

    Raises:
        ValueError: xformers is not installed, or the tensors are on a CPU.
    """
    if find_spec(NAME) is None or not query.is_cuda:
        raise ValueError('attn_implementation="xformers" needs the package xformers and a GPU: use "sdpa".')
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    bias: Any = LowerTriangularMask() if query.shape[2] > 1 else None
    if attention_mask is not None:
        # A view whose rows begin at multiples of 8, as the kernels want.
        tokens, keys = attention_mask.shape[-2:]
        padded = query.new_zeros(*attention_mask.shape[:-1], -(-keys // 8) * 8)[..., :keys]
        bias = padded.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
        bias = bias.expand(query.shape[0], query.shape[1], tokens, keys)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scaling), None
