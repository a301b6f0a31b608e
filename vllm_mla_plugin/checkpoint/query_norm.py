"""Normalises the queries of models that normalise queries and keys before RoPE (QK-norm)."""

from collections.abc import Callable

import torch


def norm_queries(
    q: torch.Tensor,
    head_dim: int,
    nope_dim: int,
    eps: float,
    over_heads: bool = False,
    over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Divide each head's query and its rotary part by the root mean square of the source's query.

    The source's query is normalised as in the source; the weight of its norm is folded into the weights that follow.
    The rotary part must be divided by the same number: the source computes it from the normalised query, but here it is
    a linear map of the layer's input, as the query itself is.

    Args:
        q: ``[..., heads, head_dim + rope]``: the source's query, then the rotary part. The computation is in float32
            at least.
        head_dim: ``d`` of the source.
        nope_dim: how many numbers of the source's query take part without RoPE: ``d`` or none.
        eps: the ``eps`` of the source's norm.
        over_heads: whether the source takes the mean over all heads of a token, not over each head alone.
        over_ranks: takes the mean over all ranks, where each rank has some of the heads.

    Returns:
        ``[..., heads, nope_dim + rope]`` in the dtype of ``q``.
    """
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    mean = wide[..., :head_dim].square().mean(-1, keepdim=True)
    if over_heads:
        mean = mean.mean(-2, keepdim=True)
        mean = mean if over_ranks is None else over_ranks(mean)
    inverse = torch.rsqrt(mean + eps)
    return (wide[..., head_dim - nope_dim :] * inverse).to(q.dtype)
