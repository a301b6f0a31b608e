"""Attention under a map, whatever method made it."""

import torch

from mla_converters.latent.maps import LatentMap, mla_weights
from mla_converters.latent.module import LatentAttention


def attend(maps: LatentMap, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention under ``maps``, of queries ``[windows, H, tokens, d]``, keys and values with ``g`` heads."""
    parts = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    widths = [part.shape[-1] for part in parts]
    eye = torch.eye(sum(widths), dtype=torch.float64)
    source = {f"{name}_proj.weight": rows for name, rows in zip("qkv", eye.split(widths), strict=True)}
    source["o_proj.weight"] = torch.eye(widths[0], dtype=torch.float64)
    module = LatentAttention(mla_weights(source, maps), q.shape[1], scale, dtype=torch.float64)
    with torch.inference_mode():
        return module(torch.cat(parts, dim=-1)).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
