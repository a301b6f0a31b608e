"""MLA prefill on GPUs for head sizes that vLLM's own backends refuse, by FlashAttention.

``tests/gpu`` says what has to hold.
"""

from typing import Any

import torch
import torch.nn.functional as F
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions
from vllm.v1.attention.backends.mla.prefill.flash_attn import FlashAttnPrefillBackend

MAX_HEAD_SIZE = 256
"""FlashAttention has no kernels beyond."""
MULTIPLE = 8
"""Its head sizes are multiples of this."""


class AnySizeFlashAttnPrefillBackend(FlashAttnPrefillBackend):
    """FlashAttention with queries, keys and values padded to sizes that it has kernels for."""

    requires_v_padding: bool

    @classmethod
    def supports_mla_dimensions(cls, mla_dimensions: MLADimensions) -> bool:
        size = mla_dimensions.qk_nope_head_dim + mla_dimensions.qk_rope_head_dim
        return max(size, mla_dimensions.v_head_dim) <= MAX_HEAD_SIZE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._size = max(self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)
        self._size += -self._size % MULTIPLE
        # FlashAttention 3 has kernels of two sizes for this pair; all others are of one. Values come as they are then,
        # a slice that begins after the keys.
        two_sizes = 128 < self._size <= 192 and 96 < self.v_head_dim <= 128
        aligned = not (self.v_head_dim % MULTIPLE or self.qk_nope_head_dim % MULTIPLE)
        self.requires_v_padding = self.requires_v_padding or not (two_sizes and aligned)

    def _flash_attn_varlen_diff_headdims(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As vLLM's, which pads the values to the queries' size, and ``forward_mha`` drops what was padded."""
        if self._size != q.shape[-1]:  # padding by nothing would copy
            q, k = (F.pad(x, (0, self._size - x.shape[-1])) for x in (q, k))
        return super()._flash_attn_varlen_diff_headdims(q, k, v, *args, **kwargs)
