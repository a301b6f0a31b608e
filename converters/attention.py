"""Causal attention of the source, and of a converted layer, on what their projections give."""

import torch
import torch.nn.functional as F


def rotate(x: torch.Tensor, freqs: torch.Tensor, start: int = 0) -> torch.Tensor:
    """RoPE on ``x`` ``[..., tokens, 2 * len(freqs)]`` at positions ``start, start + 1, ...``; pairs in halves."""
    positions = torch.arange(start, start + x.shape[-2], dtype=freqs.dtype, device=freqs.device)
    angles = torch.outer(positions, freqs)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gqa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, freqs: torch.Tensor, scale: float) -> torch.Tensor:
    """The source's attention.

    Args:
        q: ``[windows, H, tokens, d]``, before RoPE; k, v: ``[windows, g, tokens, d]``.
        freqs: ``[d / 2]`` radians per position.
        scale: factor on the scores.

    Returns:
        ``[windows, H, tokens, d]``.
    """
    return F.scaled_dot_product_attention(
        rotate(q, freqs), rotate(k, freqs), v, is_causal=True, scale=scale, enable_gqa=True
    )


def latent_attention(
    q: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, v: torch.Tensor, freqs: torch.Tensor, scale: float
) -> torch.Tensor:
    """MLA's attention, with keys and values already expanded from the latent.

    Args:
        q: ``[windows, H, queries, n + r]`` of the last tokens, the part to rotate last, before RoPE.
        k_nope, v: ``[windows, H, tokens, n]`` and ``[windows, H, tokens, d]``.
        k_rope: ``[windows, tokens, r]``, before RoPE, shared by all heads.
        freqs: ``[r / 2]`` radians per position.
        scale: factor on the scores.

    Returns:
        ``[windows, H, queries, d]``.
    """
    queries, tokens = q.shape[2], v.shape[2]
    nope_dim, value_dim = k_nope.shape[-1], v.shape[-1]
    q = torch.cat((q[..., :nope_dim], rotate(q[..., nope_dim:], freqs, tokens - queries)), dim=-1)
    k_rope = rotate(k_rope, freqs)[:, None].expand(-1, q.shape[1], -1, -1)
    # torch's fused kernels want one head size; without them, all scores would be materialised.
    width = max(q.shape[-1], value_dim)
    k = torch.cat((k_nope, k_rope), dim=-1)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    mask = None
    if queries < tokens:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=q.device).tril_(tokens - queries)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return output[..., :value_dim]
