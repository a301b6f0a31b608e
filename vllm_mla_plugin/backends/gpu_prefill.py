"""MLA prefill on GPUs by FlashAttention, for head sizes that vLLM's own backends refuse.

``tests/gpu`` has its tests.
"""

from typing import Any

import torch
import torch.nn.functional as F
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions
from vllm.v1.attention.backends.mla.prefill.flash_attn import FlashAttnPrefillBackend

from vllm_mla_plugin.checkpoint.layouts import MAX_PREFILL_HEAD_SIZE

MULTIPLE = 8
"""FlashAttention's head sizes are multiples of this."""


class AnySizeFlashAttnPrefillBackend(FlashAttnPrefillBackend):
    """FlashAttention with queries, keys and values padded to sizes for which it has kernels."""

    requires_v_padding: bool

    @classmethod
    def supports_mla_dimensions(cls, mla_dimensions: MLADimensions) -> bool:
        size = mla_dimensions.qk_nope_head_dim + mla_dimensions.qk_rope_head_dim
        return max(size, mla_dimensions.v_head_dim) <= MAX_PREFILL_HEAD_SIZE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._size = max(self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)
        self._size += -self._size % MULTIPLE
        # FlashAttention 3 has kernels with two head sizes, one of keys and one of values, for this pair alone. All its
        # other kernels have one. With two, the values need no padding: they stay a slice that begins after the keys.
        two_sizes = 128 < self._size <= 192 and 96 < self.v_head_dim <= 128
        aligned = not (self.v_head_dim % MULTIPLE or self.qk_nope_head_dim % MULTIPLE)
        self.requires_v_padding = self.requires_v_padding or not (two_sizes and aligned)

    def supports_quant_output(self, quant_key: Any) -> bool:
        """As vLLM's, but not where values are padded: the output is wider than what it would be written into."""
        return not self.requires_v_padding and super().supports_quant_output(quant_key)

    def _flash_attn_varlen_diff_headdims(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Pad queries and keys, then do as vLLM's: it pads the values to their size, and ``forward_mha`` drops what was
        padded."""
        if self._size != q.shape[-1]:  # padding by nothing would make a copy
            q, k = (F.pad(x, (0, self._size - x.shape[-1])) for x in (q, k))
        return super()._flash_attn_varlen_diff_headdims(q, k, v, *args, **kwargs)
