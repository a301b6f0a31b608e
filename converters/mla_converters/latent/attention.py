"""Causal attention on projected queries, keys and values: the source's, and that of a converted layer."""

from functools import partial

import torch
import torch.nn.functional as F

# Queries are processed this many at a time, and a block is not compared with the keys after its last query.
BLOCK = 64


def rotate(x: torch.Tensor, freqs: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Apply RoPE to ``x`` ``[..., tokens, 2 * len(freqs)]`` at ``positions`` ``[tokens]`` (None: 0, 1, ...).

    A pair is component ``i`` of the first half with component ``i`` of the second.
    """
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
        positions: ``[queries]``, the tokens that are queries, ascending, on CPU; None for all tokens.

    Returns:
        ``[windows, H, queries, d]``.
    """
    return _causal(rotate(q, freqs, positions), rotate(k, freqs), v, scale, positions)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, positions: torch.Tensor | None
) -> torch.Tensor:
    """Let each query at ``positions`` (None: all) attend to its own and earlier tokens; KV heads are shared."""
    value_dim = v.shape[-1]
    # The dtype of the values tells whether autocast is on, because they are a matrix product. The dtype of the
    # queries does not, because normalised queries stay float32 under autocast.
    if q.shape[-1] == value_dim or (v.dtype.itemsize < 4 and v.is_cuda):
        width = max(q.shape[-1], value_dim)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        return _fused(q, k, v, scale, positions)[..., :value_dim]
    # On a CPU, torch's kernels for bfloat16 take longer with padding than plain products in float32 without.
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        return _unfused(q.to(dtype), k.to(dtype), v.to(dtype), scale, positions).to(v)


def _unfused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, positions: torch.Tensor | None
) -> torch.Tensor:
    """Attention by plain matrix products, which are exact enough in float32.

    Keys and values may differ in head size, so nothing is padded and there is less to compute.
    """
    positions = torch.arange(q.shape[2]) if positions is None else positions
    q = (q * scale).unflatten(1, (k.shape[1], -1))  # [windows, heads of k, query heads of each, queries, width]
    outputs = []
    for block, some in zip(positions.split(BLOCK), q.split(BLOCK, dim=3), strict=True):
        first, last = int(block[0]), int(block[-1])
        scores = (some.flatten(2, 3) @ k[:, :, : last + 1].mT).unflatten(2, some.shape[2:4])
        later = torch.arange(first, last + 1) > block[:, None]
        scores[..., first:].masked_fill_(later.to(q.device), -torch.inf)
        outputs.append((scores.softmax(-1).flatten(2, 3) @ v[:, :, : last + 1]).unflatten(2, some.shape[2:4]))
    return torch.cat(outputs, dim=3).flatten(1, 2)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, positions: torch.Tensor | None
) -> torch.Tensor:
    """Attention by torch's own kernels, which need one head size for keys and values and keep scores in float32."""
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
        q: ``[windows, H, queries, n + r]`` before RoPE; the last ``r`` components get rotated.
        k_nope, v: ``[windows, g or H, tokens, n]`` and ``[windows, g or H, tokens, d]``, one per KV or query head.
        k_rope: ``[windows, tokens, r]``, after RoPE, shared by all heads.
        freqs: ``[r / 2]`` radians per position.
        scale: factor on the scores.
        positions: ``[queries]``, the tokens that are queries, ascending, on CPU; None for all tokens.

    Returns:
        ``[windows, H, queries, d]``.
    """
    nope_dim = k_nope.shape[-1]
    q = torch.cat((q[..., :nope_dim], rotate(q[..., nope_dim:], freqs, positions)), dim=-1)
    k_rope = k_rope[:, None].expand(-1, k_nope.shape[1], -1, -1)
    return _causal(q, torch.cat((k_nope, k_rope), dim=-1), v, scale, positions)
