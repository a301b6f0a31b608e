"""MLA on GPUs from a packed cache: every token is packed once, and attended as it is packed, new ones too.

No step waits for the GPU or allocates by the data's values, so decoding is captured in CUDA graphs as vLLM's Triton
backend is: for batches in which all requests have equally many new tokens (``UNIFORM_BATCH``). Before vLLM 0.31, that
is one token each.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonPrefillMetadata
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_mla_plugin.backends.gpu import (
    AnySizeTritonMLABackend,
    AnySizeTritonMLAImpl,
    AnySizeTritonMLAMetadataBuilder,
    context_slots,
    shared_memory,
    token_slots,
)
from vllm_mla_plugin.backends.gpu_means import Means
from vllm_mla_plugin.backends.gpu_merge import Parts
from vllm_mla_plugin.backends.gpu_pack import pack
from vllm_mla_plugin.backends.gpu_packed_decode import EXTRA, decode_packed
from vllm_mla_plugin.backends.gpu_rows import widen
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.layouts import PackedTiles, packed_tiles


class PackedTritonMLAMetadataBuilder(AnySizeTritonMLAMetadataBuilder):
    """Reserves the scratch of the decode kernel for packed rows."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        layer: Any = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.cache_format: CacheFormat = layer.cache_format  # the constructor already reserves scratch
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def decode_tiles(self, heads: int) -> tuple[PackedTiles, int]:
        """As for unpacked rows."""
        return packed_tiles(self.cache_format, shared_memory()), self.cache_format.sizes[0] + EXTRA


class PackedTritonMLABackend(AnySizeTritonMLABackend):
    """This plugin's Triton backend for packed rows."""

    @staticmethod
    def get_impl_cls() -> type["PackedTritonMLAImpl"]:
        return PackedTritonMLAImpl

    @staticmethod
    def get_builder_cls() -> type[PackedTritonMLAMetadataBuilder]:
        return PackedTritonMLAMetadataBuilder


class PackedTritonMLAImpl(AnySizeTritonMLAImpl):
    """Attention on packed latents.

    New tokens are attended as they are packed. Otherwise a prompt would be answered differently the second time, when
    its tokens come from the cache.

    Args:
        cache_format, cache_mean, rope_freqs, max_position: as
            :class:`vllm_mla_plugin.packed_attention.PackedMLAAttention` says.
        arguments: as for vLLM's implementation.
    """

    means: Means | None = None
    tiles: PackedTiles

    def __init__(
        self,
        *,
        cache_format: CacheFormat,
        cache_mean: nn.Parameter | None,
        rope_freqs: nn.Parameter,
        max_position: int,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.cache_format, self.max_position = cache_format, max_position
        self.cache_mean, self.rope_freqs = cache_mean, rope_freqs

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        self.tiles = packed_tiles(self.cache_format, shared_memory())
        if self.cache_mean is None:
            return
        means = Means.of(self.cache_mean.data, self.rope_freqs.data, self.max_position, self.tiles.tokens)
        if self.means is None:
            self.means = means
        else:  # weights are loaded again; captured CUDA graphs read the tensors that are there
            for tensor, new in zip(self.means, means, strict=True):
                tensor.copy_(new)

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        skip_scale: bool = False,
    ) -> None:
        """Pack new tokens into the cache; arguments as for
        :meth:`vllm_mla_plugin.backends.cpu_packed.PackedCPUMLAImpl.do_kv_cache_update`."""
        if kv_cache.numel():
            slots = slot_mapping.flatten()
            # With padding for CUDA graphs, there are more tokens than slots.
            latent, k_rope = kv_c_normed[: len(slots)], k_pe.squeeze(1)[: len(slots)]
            pack(latent, k_rope, kv_cache, slots, self.cache_format)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor | Parts, torch.Tensor | None]:
        """Decode; as :meth:`vllm_mla_plugin.backends.gpu.AnySizeTritonMLAImpl.forward_mqa`."""
        assert attn_metadata.decode is not None
        q_latent, q_rope = q if isinstance(q, tuple) else q.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        parts = decode_packed(
            q_latent,
            q_rope,
            kv_c_and_k_pe_cache,
            attn_metadata.decode.block_table,
            attn_metadata.decode.seq_lens,
            self.make_scratch(q_latent, *self.decode_tiles(q_latent.shape[1])),
            self.cache_format,
            self.means,
            scale=self.scale,
            causal=attn_metadata.causal,
            tiles=self.tiles,
        )
        return self.merge_or_leave(parts, attn_metadata, layer)

    def decode_tiles(self, heads: int) -> tuple[PackedTiles, int]:
        """As for unpacked rows."""
        return self.tiles, self.kv_lora_rank + EXTRA

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Prefill; as vLLM's, but new tokens are read back from the cache, where they already are."""
        assert attn_metadata.prefill is not None
        slots, positions = new_slots(kv_c_and_k_pe_cache, attn_metadata.prefill, len(q))
        new = widen(kv_c_and_k_pe_cache, slots, positions, self.cache_format, self.means, q.dtype)
        latent, k_rope = new.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        super().forward_mha(
            q, latent, k_rope[:, None], kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale
        )

    def read_context(
        self, cache: torch.Tensor, block_table: torch.Tensor, chunk: Any, dtype: torch.dtype, scale: torch.Tensor
    ) -> torch.Tensor:
        slots, positions = context_slots(cache, block_table, chunk)
        return widen(cache, slots, positions, self.cache_format, self.means, dtype)


def new_slots(cache: torch.Tensor, prefill: MLACommonPrefillMetadata, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the new tokens of prefilling requests lie, request after request, as
    :func:`vllm_mla_plugin.backends.gpu.context_slots`.

    Args:
        cache: ``[blocks, block_size, bytes]``.
        prefill: the requests' metadata.
        tokens: how many there are. To count them on the GPU, the CPU would have to wait.
    """
    starts = prefill.query_start_loc.long()
    requests = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff(), output_size=tokens)
    positions = torch.arange(tokens, device=starts.device) - starts[requests]
    if prefill.chunked_context is not None:
        positions += prefill.chunked_context.context_lens.long()[requests]
    return token_slots(prefill.block_table, requests, positions, cache.shape[1]), positions
