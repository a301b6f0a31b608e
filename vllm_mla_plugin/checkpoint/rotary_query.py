"""Each head's map from its own query to its rotary query, which a checkpoint may hold as a tensor of its own.

In every method's closed form, a head's rotary query is a linear map of the head's query in the source. With the map
apart, ``q_proj`` has the source's size, and decoding multiplies queries by the map and by the keys' up-projection in
one product.
"""

import torch
from torch import nn


class RotaryQueryMap(nn.Module):
    """The maps of all heads of a layer, ``weight`` ``[heads, head_dim, rope]``.

    Args:
        heads: query heads.
        head_dim: numbers of a head's own query.
        rope: ``qk_rope_head_dim`` of the layer.
    """

    def __init__(self, heads: int, head_dim: int, rope: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, rope))
        nn.init.normal_(self.weight, std=head_dim**-0.5)  # of a model that is made without weights

    def forward(self, q: torch.Tensor, nope_dim: int) -> torch.Tensor:
        """Put each head's rotary query behind its query without RoPE.

        Args:
            q: ``[..., heads, head_dim]``, after the norm if queries are normalised.
            nope_dim: ``qk_nope_head_dim``: ``head_dim``; or 0, and the query itself is left out.

        Returns:
            ``[..., heads, nope_dim + rope]``, before RoPE.
        """
        rotary = torch.einsum("...hd,hdr->...hr", q, self.weight)
        return torch.cat((q, rotary), dim=-1) if nope_dim else rotary
