"""Second moments of a layer's queries, keys and values over calibration tokens.

Moments, never activations: their size does not depend on how much text calibrates.
"""

from copy import copy

import torch


class LayerMoments:
    """Running uncentred second moments of one layer, before RoPE.

    Attributes:
        tokens: how many tokens went in.
    """

    def __init__(self, kv_heads: int, head_dim: int, device: str = "cpu") -> None:
        width = 2 * kv_heads * head_dim
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.tokens = 0
        self._kv = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take in some tokens.

        Args:
            k, v: ``[..., g * d]``, any float dtype.
        """
        kv = torch.cat((k, v), dim=-1).flatten(0, -2)
        self._kv += (kv.mT @ kv).double()
        self.tokens += kv.shape[0]

    def corrected(self, biased: "LayerMoments", true: "LayerMoments") -> "LayerMoments":
        """These moments less the bias that shows on a part of the tokens (a control variate).

        Args:
            biased: of the part, computed as these were.
            true: of the part, computed as they should be.
        """
        moments = copy(self)
        moments._kv = self._kv + self.tokens * (true.kv - biased.kv)
        return moments

    @property
    def kv(self) -> torch.Tensor:
        """``E [k; v][k; v]ᵀ``, ``[2 * g * d, 2 * g * d]`` float64."""
        return self._kv / self.tokens
