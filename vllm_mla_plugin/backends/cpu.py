"""MLA on CPU for any ``kv_lora_rank + qk_rope_head_dim``.

Decode is multi-query attention on the latents, for all sequences of the batch at once: their
pages are gathered into one padded tensor and attended by torch's fused CPU kernel. Prefill
attends per request, with keys and values expanded from the latents.
"""

from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonMetadata,
    MLACommonMetadataBuilder,
)
from vllm.v1.attention.backend import AttentionLayer, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl


class AnySizeMLAMetadata(MLACommonMetadata):
    """vLLM's MLA metadata without its list of cached sizes (320, 512, 576)."""

    def __post_init__(self) -> None:
        pass


class AnySizeMLAMetadataBuilder(MLACommonMetadataBuilder[AnySizeMLAMetadata]):
    """Builds :class:`AnySizeMLAMetadata`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, metadata_cls=AnySizeMLAMetadata, **kwargs)


class AnySizeCPUMLABackend(CPUMLABackend):
    """vLLM's CPU MLA backend for every latent and block size."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # no restriction

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type["AnySizeCPUMLAImpl"]:
        return AnySizeCPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AnySizeMLAMetadataBuilder]:
        return AnySizeMLAMetadataBuilder


def gather_pages(cache: torch.Tensor, block_table: torch.Tensor, length: int) -> torch.Tensor:
    """The cached tokens of some sequences, each padded to ``length``.

    Args:
        cache: ``[blocks, block_size, width]``.
        block_table: ``[sequences, >= ceil(length / block_size)]`` block numbers.
        length: tokens wanted of every sequence.

    Returns:
        ``[sequences, length, width]``; what lies beyond a sequence's own length is arbitrary.
    """
    block_size = cache.shape[1]
    blocks = block_table[:, : -(-length // block_size)].long()
    return cache[blocks].flatten(1, 2)[:, :length]


class AnySizeCPUMLAImpl(CPUMLAImpl):
    """Attention on latents; the cache write is vLLM's."""

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, None]:
        """Decode one token per sequence, with the up-projections absorbed into the query.

        Args:
            q: ``[sequences, heads, latent + rope]``, or its two parts.
            kv_c_and_k_pe_cache: ``[blocks, block_size, latent + rope]``.

        Returns:
            ``[sequences, heads, latent]`` and None (no log-sum-exp).
        """
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        decode = attn_metadata.decode
        assert decode is not None
        lengths = decode.seq_lens
        longest = int(lengths.max())
        cached = gather_pages(kv_c_and_k_pe_cache, decode.block_table, longest)
        # The latent is key and value at once. The rope part of a page beyond a sequence's end can hold
        # anything, NaN included, which no mask removes from a product with zero: clear it.
        beyond = torch.arange(longest) >= lengths[:, None]  # [sequences, longest]
        cached = cached.masked_fill_(beyond[..., None], 0)
        mask = torch.zeros(beyond.shape, dtype=q.dtype).masked_fill_(beyond, float("-inf"))
        # The heads of a sequence share its one key, so they can stand where queries stand.
        output = F.scaled_dot_product_attention(
            q[:, None], cached[:, None], cached[:, None], attn_mask=mask[:, None, None], scale=self.scale
        )
        return output[:, 0, :, : self.kv_lora_rank], None

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
        """Prefill: expand keys and values per head, attend causally, request by request.

        Args:
            q: ``[tokens, heads, nope + rope]`` of all prefilling requests, end to end.
            kv_c_normed: ``[tokens, latent]`` of the same tokens.
            k_pe: ``[tokens, 1, rope]``, rotated.
            kv_c_and_k_pe_cache: ``[blocks, block_size, latent + rope]``; holds earlier chunks.
            output: ``[tokens, heads * v]``, written.
        """
        prefill = attn_metadata.prefill
        assert prefill is not None
        starts = prefill.query_start_loc.tolist()
        chunked = prefill.chunked_context
        contexts = chunked.context_lens_list if chunked is not None else [0] * (len(starts) - 1)
        new = torch.cat((kv_c_normed, k_pe.squeeze(1)), dim=-1)
        for request, context in enumerate(contexts):
            tokens = slice(starts[request], starts[request + 1])
            cached = new[tokens]
            if context:
                table = prefill.block_table[request : request + 1]
                cached = torch.cat((gather_pages(kv_c_and_k_pe_cache, table, context)[0], cached))
            output[tokens] = self._attend_causally(q[tokens], cached)

    def _attend_causally(self, q: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
        """Attention of one request's newest tokens.

        Args:
            q: ``[new, heads, nope + rope]``.
            cached: ``[all, latent + rope]``, the new tokens last.

        Returns:
            ``[new, heads * v]``.
        """
        latent, k_rope = cached.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(latent)[0].view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope = k_rope[:, None].expand(-1, self.num_heads, -1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        # torch's fused CPU kernel wants one head size; without it, all scores would be materialised.
        width = max(self.qk_head_dim, self.v_head_dim)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(0, 1)[None] for x in (q, k, v))
        new, total = q.shape[-2], cached.shape[0]
        mask = None
        if new < total:
            mask = torch.ones(new, total, dtype=torch.bool).tril_(total - new)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )  # [1, heads, new, width]
        return out[0, :, :, : self.v_head_dim].transpose(0, 1).flatten(1)
