"""Normalises the queries of models that normalise each head's query and key before RoPE (QK-norm)."""

import torch


def norm_queries(q: torch.Tensor, head_dim: int, nope_dim: int, eps: float) -> torch.Tensor:
    """Divide each head's query and its rotary part by the root mean square of the source's query.

    The source's query is normalised as in the source; the weight of its norm is folded into the weights that follow.
    The rotary part must be divided by the same number: the source computes it from the normalised query, but here it is
    a linear map of the layer's input, as the query itself is.

    Args:
        q: ``[..., head_dim + rope]``: the source's query, then the rotary part. The computation is in float32 at least.
        head_dim: ``d`` of the source.
        nope_dim: how many numbers of the source's query take part without RoPE: ``d`` or none.
        eps: the ``eps`` of the source's norm.

    Returns:
        ``[..., nope_dim + rope]`` in the dtype of ``q``.
    """
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    inverse = torch.rsqrt(wide[..., :head_dim].square().mean(-1, keepdim=True) + eps)
    return (wide[..., head_dim - nope_dim :] * inverse).to(q.dtype)
