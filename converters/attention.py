"""Causal attention of the source, and of a converted layer, on queries, keys and values before RoPE."""

import torch
import torch.nn.functional as F

from mla_converters.latent_map import LatentMap


def rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """RoPE on ``x`` ``[..., tokens, 2 * len(freqs)]`` at positions 0, 1, ...; pairs in halves."""
    positions = torch.arange(x.shape[-2], dtype=freqs.dtype, device=freqs.device)
    angles = torch.outer(positions, freqs)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gqa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, freqs: torch.Tensor, scale: float) -> torch.Tensor:
    """The source's attention.

    Args:
        q: ``[windows, H, tokens, d]``; k, v: ``[windows, g, tokens, d]``.
        freqs: ``[d / 2]`` radians per position.
        scale: factor on the scores.

    Returns:
        ``[windows, H, tokens, d]``.
    """
    return F.scaled_dot_product_attention(
        rotate(q, freqs), rotate(k, freqs), v, is_causal=True, scale=scale, enable_gqa=True
    )


def mla_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, maps: LatentMap, scale: float) -> torch.Tensor:
    """What the source's attention becomes under ``maps``; shapes as in :func:`gqa_attention`."""
    kv_heads, tokens = k.shape[1:3]
    cast = {name: value.to(q) for name, value in vars(maps).items() if name != "rope_freqs"}
    freqs = maps.rope_freqs.to(q.device)
    flat_k, flat_v = (x.transpose(1, 2).flatten(2) for x in (k, v))  # [windows, tokens, g * d]
    latent = torch.cat((flat_k, flat_v), dim=-1) @ cast["kv_to_latent"].mT
    k_rope = rotate(flat_k @ cast["key_to_rope"].mT, freqs)
    k_nope, values = (
        (latent @ cast[name].flatten(0, 1).mT).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        for name in ("latent_to_key", "latent_to_value")
    )
    keys = torch.cat((k_nope, k_rope[:, None].expand(-1, kv_heads, -1, -1)), dim=-1)
    grouped = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [windows, g, H / g * tokens, d]
    q_nope, q_rope = (
        (grouped @ cast[name].mT).unflatten(2, (-1, tokens)).flatten(1, 2)
        for name in ("query_to_nope", "query_to_rope")
    )
    queries = torch.cat((q_nope, rotate(q_rope, freqs)), dim=-1)
    # torch's fused kernels want one head size; without them, all scores would be materialised.
    width, value_width = queries.shape[-1], values.shape[-1]
    if value_width < width:
        values = F.pad(values, (0, width - value_width))
    output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    return output[..., :value_width]
