"""Method ``exact``: GQA written as MLA, nothing lost, nothing saved (TransMLA, section 4.1).

The rotary key shared by all heads is every KV head's rotary key side by side; a query is zero
outside its own KV head's block; the latent is the values.
"""

import torch

from mla_converters.latent.maps import LatentMap


def exact_map(kv_heads: int, head_dim: int, freqs: torch.Tensor) -> LatentMap:
    """The exact conversion of a layer.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source.
        freqs: ``[d / 2]`` RoPE frequencies of the source.

    Returns:
        A map with ``r = R = g * d`` and no part without RoPE (``n = 0``).
    """
    width, half = kv_heads * head_dim, head_dim // 2
    # Source order is (head, half, frequency); ours keeps the two halves of all pairs apart.
    order = torch.arange(width).view(kv_heads, 2, half).transpose(0, 1).flatten()
    eye = torch.eye(width, dtype=torch.float64)
    rope = eye[order]  # [r, g * d]
    return LatentMap(
        rope_freqs=freqs.float().repeat(kv_heads),
        key_to_rope=rope,
        query_to_rope=rope.view(width, kv_heads, head_dim).transpose(0, 1).contiguous(),
        query_to_nope=torch.zeros(kv_heads, 0, head_dim, dtype=torch.float64),
        kv_to_latent=torch.cat((torch.zeros_like(eye), eye), dim=1),
        latent_to_key=torch.zeros(kv_heads, 0, width, dtype=torch.float64),
        latent_to_value=eye.view(kv_heads, head_dim, width).clone(),
    )
