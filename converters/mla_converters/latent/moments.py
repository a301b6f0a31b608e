"""Second moments of a layer's queries, keys and values over calibration tokens.

Moments are kept instead of activations, because their size does not depend on the amount of calibration text.
"""

from copy import copy

import torch


class LayerMoments:
    """Running uncentred second moments of one layer, before RoPE.

    Attributes:
        tokens: how many tokens were added.
    """

    def __init__(self, kv_heads: int, head_dim: int, device: str = "cpu") -> None:
        width = 2 * kv_heads * head_dim
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.tokens = 0
        self._kv = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add some tokens.

        Args:
            k, v: ``[..., g * d]``, any float dtype.
        """
        kv = torch.cat((k, v), dim=-1).flatten(0, -2)
        self._kv += (kv.mT @ kv).double()
        self._sum += kv.sum(0, dtype=torch.float64)
        self.tokens += kv.shape[0]

    def corrected(self, biased: "LayerMoments", true: "LayerMoments") -> "LayerMoments":
        """These moments, corrected by a bias that was measured on some of the tokens (a control variate).

        Args:
            biased: moments of those tokens, computed in the same biased way as these moments.
            true: moments of the same tokens, computed in the exact way.
        """
        moments = copy(self)
        moments._kv = self._kv + self.tokens * (true.kv - biased.kv)
        return moments

    @property
    def kv(self) -> torch.Tensor:
        """``E [k; v][k; v]ᵀ``, ``[2 * g * d, 2 * g * d]`` float64."""
        return self._kv / self.tokens

    @property
    def covariance(self) -> torch.Tensor:
        """Second moments around the mean, ``[2 * g * d, 2 * g * d]`` float64."""
        mean = self._sum / self.tokens
        return self.kv - torch.outer(mean, mean)
