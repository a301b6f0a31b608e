"""vLLM's MLA attention layer for checkpoints with ``q_rope_map``: it makes rotary queries from queries.

vLLM's layer takes rotated queries, and absorbs the keys' up-projection into the rest of them when it decodes. Here the
layer takes queries as ``q_proj`` gives them. When it decodes, one product absorbs the up-projection and makes the
rotary queries, which are rotated after that. Otherwise it makes rotary queries first, and leaves the rest to vLLM.
"""

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from vllm_mla_plugin.backends.gpu_absorb import absorb
from vllm_mla_plugin.checkpoint.rotary_query import RotaryQueryMap
from vllm_mla_plugin.latent_attention import LatentAttention
from vllm_mla_plugin.packed_attention import PackedMLAAttention
from vllm_mla_plugin.rope import FrequencyRotaryEmbedding


class RankRotaryQueryMap(RotaryQueryMap):
    """The maps of this tensor-parallel rank's heads."""

    def __init__(self, heads: int, head_dim: int, rope: int) -> None:
        super().__init__(heads, head_dim, rope)
        self.weight.requires_grad_(False)
        set_weight_attrs(self.weight, {"weight_loader": self._load})

    def _load(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        heads = len(param)
        param.data.copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * heads, heads))


class MapsQueries:
    """Mixed into ``MLAAttention``.

    Args:
        q_rope_map: the maps of this rank's heads.
        rotary_emb: rotates by the layer's frequencies.
        arguments: as for ``MLAAttention``.
    """

    query_weight: torch.Tensor | None = None
    """``[heads, head_dim, latent + rope]``: the keys' up-projection beside the map; None if vLLM stores the
    up-projection in a form of its own."""
    impl: Any

    def __init__(
        self, *, q_rope_map: RankRotaryQueryMap, rotary_emb: FrequencyRotaryEmbedding, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.around = (q_rope_map, rotary_emb)  # in a tuple, because they are modules of the layer around this one

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Also put the keys' up-projection and the map into one matrix."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]  # MLAAttention's
        up, rotary = getattr(self, "W_UK_T", None), self.around[0].weight.data.to(act_dtype)
        if up is None:
            return
        if not self.qk_nope_head_dim:  # type: ignore[attr-defined]
            up = rotary.new_zeros(*rotary.shape[:2], self.kv_lora_rank)  # type: ignore[attr-defined]
        weight = torch.cat((up, rotary), dim=-1)
        if self.query_weight is None:
            self.query_weight = weight
        else:  # weights are loaded again; captured CUDA graphs read the tensor that is there
            self.query_weight.copy_(weight)

    def forward(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        positions: torch.Tensor,
        output_shape: torch.Size | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: ``[tokens, heads, head_dim]``.
            kv_c_normed: ``[tokens, latent]``.
            k_pe: ``[tokens, 1, rope]``, rotated.
            positions: ``[tokens]``.
            output_shape: ``[tokens, heads * v]``.
        """
        # vLLM's operator hands one more tensor on to :meth:`forward_impl`, which is of use to other models only.
        return super().forward(  # type: ignore[misc]  # MLAAttention's
            q, kv_c_normed, k_pe, output_shape=output_shape, q_dcp_replicated=positions
        )

    def forward_impl(
        self,
        q: torch.Tensor,
        k_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *,
        q_dcp_replicated: torch.Tensor,
        **fused: Any,
    ) -> torch.Tensor:
        """Attend; vLLM's operator calls this. ``q_dcp_replicated`` holds the positions."""
        positions = q_dcp_replicated
        if attn_metadata is not None and self._only_decodes(attn_metadata, fused):
            return self._decode(q, positions, kv_cache, attn_metadata, output)
        if attn_metadata is not None:
            q = self.with_rotary(q, positions)
        return super().forward_impl(  # type: ignore[misc]  # MLAAttention's
            q, k_c_normed, k_pe, kv_cache, attn_metadata, output, **fused
        )

    def _only_decodes(self, metadata: Any, fused: dict[str, Any]) -> bool:
        """Whether all queries of a batch read the cache, and vLLM's layer would do nothing but :meth:`_decode`."""
        return (
            metadata.num_decode_tokens == metadata.num_actual_tokens
            and self.query_weight is not None
            and self.impl.dcp_world_size <= 1
            and getattr(self, "q_pad_num_heads", None) is None
            and all(value is None for value in fused.values())
        )

    def _decode(
        self, q: torch.Tensor, positions: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, output: torch.Tensor
    ) -> torch.Tensor:
        tokens = metadata.num_actual_tokens  # inputs and outputs may be padded for CUDA graphs
        layer: Any = self
        queries = self.absorbed(q[:tokens], positions[:tokens])
        if layer.kv_cache_dtype.startswith("fp8"):
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
            if self.impl.supports_quant_query_input:
                parts = queries.split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1)
                queries = layer._decode_concat_quant_fp8_op(*parts, layer._q_scale)
        result, _ = self.impl.forward_mqa(queries, kv_cache, metadata, self)
        layer._v_up_proj(result, out=output[:tokens])
        return output

    def absorbed(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries for the cached rows, ``[tokens, heads, latent + rope]``, from ``[tokens, heads, head_dim]``."""
        assert self.query_weight is not None
        rotary_emb = self.around[1]
        if current_platform.is_cuda_alike():
            return absorb(q, self.query_weight, positions, rotary_emb.cos_sin_cache)
        queries = _by_head(q, self.query_weight)
        rotary = queries[..., -rotary_emb.head_size :]
        rotary.copy_(rotary_emb.forward_native(positions, rotary)[0])
        return queries

    def with_rotary(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries ``[tokens, heads, nope + rope]``, rotated, from ``[tokens, heads, head_dim]``."""
        q_rope_map, rotary_emb = self.around
        rotary = rotary_emb.rotated_queries(positions, _by_head(q, q_rope_map.weight))
        return torch.cat((q, rotary), dim=-1) if self.qk_nope_head_dim else rotary  # type: ignore[attr-defined]


def _by_head(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[tokens, heads, n]``, contiguous, from ``[tokens, heads, head_dim]`` and ``[heads, head_dim, n]``."""
    if q.is_cpu:  # there, a product that is written in strides takes four times as long
        return torch.bmm(q.transpose(0, 1), weight).transpose(0, 1).contiguous()
    product = q.new_empty(*q.shape[:2], weight.shape[-1])
    torch.bmm(q.transpose(0, 1), weight, out=product.transpose(0, 1))
    return product


class MappedMLAAttention(MapsQueries, LatentAttention):
    """``LatentAttention`` that makes rotary queries."""


class PackedMappedMLAAttention(MapsQueries, PackedMLAAttention):
    """``LatentAttention`` with a packed cache that makes rotary queries."""
