"""Causal attention of the source, and of a converted layer, on what their projections give."""

from functools import partial

import torch
import torch.nn.functional as F

BLOCK = 64  # of queries at some positions, together: they read no key after the last of them


def rotate(x: torch.Tensor, freqs: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """RoPE on ``x`` ``[..., tokens, 2 * len(freqs)]`` at ``positions`` ``[tokens]`` (None: 0, 1, ...); pairs in
    halves."""
    if positions is None:
        positions = torch.arange(x.shape[-2], device=freqs.device)
    angles = torch.outer(positions.to(freqs), freqs)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gqa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    freqs: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """The source's attention.

    Args:
        q: ``[windows, H, queries, d]``, before RoPE; k, v: ``[windows, g, tokens, d]``.
        freqs: ``[d / 2]`` radians per position.
        scale: factor on the scores.
        positions: ``[queries]`` of the queries among the tokens, ascending, on CPU; None: every token's.

    Returns:
        ``[windows, H, queries, d]``.
    """
    return _causal(rotate(q, freqs, positions), rotate(k, freqs), v, scale, positions)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, positions: torch.Tensor | None
) -> torch.Tensor:
    """Attention of queries at ``positions`` (None: all) to what is not after them; KV heads are shared."""
    attend = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if positions is None:
        return attend(q, k, v, is_causal=True)
    outputs = []
    for block, some in zip(positions.split(BLOCK), q.split(BLOCK, dim=2), strict=True):
        seen = int(block[-1]) + 1
        mask = (torch.arange(seen) <= block[:, None]).to(q.device)
        outputs.append(attend(some, k[:, :, :seen], v[:, :, :seen], attn_mask=mask))
    return torch.cat(outputs, dim=2)


def latent_attention(
    q: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    freqs: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """MLA's attention, with keys and values already expanded from the latent.

    Args:
        q: ``[windows, H, queries, n + r]``, the part to rotate last, before RoPE.
        k_nope, v: ``[windows, H, tokens, n]`` and ``[windows, H, tokens, d]``.
        k_rope: ``[windows, tokens, r]``, before RoPE, shared by all heads.
        freqs: ``[r / 2]`` radians per position.
        scale: factor on the scores.
        positions: ``[queries]`` of the queries among the tokens, ascending, on CPU; None: every token's.

    Returns:
        ``[windows, H, queries, d]``.
    """
    nope_dim, value_dim = k_nope.shape[-1], v.shape[-1]
    q = torch.cat((q[..., :nope_dim], rotate(q[..., nope_dim:], freqs, positions)), dim=-1)
    k_rope = rotate(k_rope, freqs)[:, None].expand(-1, q.shape[1], -1, -1)
    # torch's fused kernels want one head size; without them, all scores would be materialised.
    width = max(q.shape[-1], value_dim)
    k = torch.cat((k_nope, k_rope), dim=-1)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return _causal(q, k, v, scale, positions)[..., :value_dim]
