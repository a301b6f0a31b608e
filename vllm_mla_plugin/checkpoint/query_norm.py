"""Queries of models that normalise each head's query and key before RoPE (QK-norm)."""

import torch


def norm_queries(q: torch.Tensor, head_dim: int, nope_dim: int, eps: float) -> torch.Tensor:
    """Bring each head's query to a root mean square of one, and its rotary part along.

    The source's query is normalised as in the source; its norm's weight is folded into what follows. The rotary part is
    linear in the same input, and the source's is a map of the normalised query: so it is divided by the same number.

    Args:
        q: ``[..., head_dim + rope]``: the source's query, then the rotary part; computed at least in float32.
        head_dim: ``d`` of the source.
        nope_dim: numbers of the query that take part without RoPE: ``d`` or none.
        eps: of the source's norm.

    Returns:
        ``[..., nope_dim + rope]``, dtype of ``q``.
    """
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    inverse = torch.rsqrt(wide[..., :head_dim].square().mean(-1, keepdim=True) + eps)
    return (wide[..., head_dim - nope_dim :] * inverse).to(q.dtype)
