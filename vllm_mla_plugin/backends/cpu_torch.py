"""Attention on CPU by torch's kernel, where neither ours nor vLLM's runs."""

import torch
import torch.nn.functional as F


def decode_padded(q: torch.Tensor, cached: torch.Tensor, lengths: torch.Tensor, scale: float) -> torch.Tensor:
    """One token per sequence, on keys that are values, too.

    Args:
        q: ``[sequences, heads, width]``.
        cached: ``[sequences, longest, width]``; overwritten with zeros beyond each sequence's end.
        lengths: ``[sequences]``.
        scale: of the scores.

    Returns:
        ``[sequences, heads, width]``.
    """
    # Beyond a sequence's end a page can hold anything. If it holds NaN, no mask helps, because NaN times zero is NaN.
    # So clear these rows.
    beyond = torch.arange(cached.shape[1]) >= lengths[:, None]  # [sequences, longest]
    cached = cached.masked_fill_(beyond[..., None], 0)
    mask = torch.zeros(beyond.shape, dtype=q.dtype).masked_fill_(beyond, float("-inf"))
    # All heads of a sequence share its one key, so they can take the place of several queries of one head.
    output = F.scaled_dot_product_attention(
        q[:, None], cached[:, None], cached[:, None], attn_mask=mask[:, None, None], scale=scale
    )
    return output[:, 0]


def attend_causally(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one sequence's newest tokens.

    Args:
        q: ``[new, heads, key width]``.
        k: ``[all, heads, key width]``, the new tokens last.
        v: ``[all, heads, value width]``.
        scale: of the scores.

    Returns:
        ``[new, heads, value width]``.
    """
    # torch's fused CPU kernel wants one head size. Without that kernel, all scores would be kept in memory at once.
    value_width, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(0, 1)[None] for x in (q, k, v))
    new, total = q.shape[-2], k.shape[-2]
    mask = None
    if new < total:
        mask = torch.ones(new, total, dtype=torch.bool).tril_(total - new)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[0, :, :, :value_width].transpose(0, 1)
