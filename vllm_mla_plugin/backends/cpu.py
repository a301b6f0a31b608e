"""MLA on CPU for any ``kv_lora_rank + qk_rope_head_dim``.

Decode is multi-query attention on the latents, by a kernel of ours. Prefill expands keys and values from the latents,
then attends by vLLM's kernel where that runs, and by torch's elsewhere.
"""

from typing import Any

import torch
from vllm.config import CacheConfig
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.v1.attention.backend import AttentionLayer, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from vllm_mla_plugin.backends.cpu_kernel import DecodeKernel, compile_kernel
from vllm_mla_plugin.backends.cpu_prefill import (
    MULTIPLE,
    ExpandKernel,
    compile_expansion,
    extend,
    has_extend_kernel,
)
from vllm_mla_plugin.backends.cpu_requests import Prefills
from vllm_mla_plugin.backends.cpu_torch import attend_causally, decode_padded
from vllm_mla_plugin.backends.dequantise import dequantise
from vllm_mla_plugin.backends.metadata import AnySizeMLAMetadata, page_slots

MAX_EXPANDED_BYTES = 256 * 2**20
"""Prefill expands keys and values of earlier context up to this size. Beyond it, prefill attends to the latents
themselves."""


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

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """vLLM's default, 16. On CPUs, 0.33 passes 128 here, of which prefixes rarely are multiples."""
        return CacheConfig.DEFAULT_BLOCK_SIZE

    @staticmethod
    def get_impl_cls() -> type["AnySizeCPUMLAImpl"]:
        return AnySizeCPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AnySizeMLAMetadataBuilder]:
        return AnySizeMLAMetadataBuilder


class AnySizeCPUMLAImpl(CPUMLAImpl):
    """Attention on latents. vLLM's code writes the cache."""

    kernel: DecodeKernel | None
    expand: ExpandKernel | None
    w_uk: torch.Tensor  # [heads, nope, latent]
    w_uv: torch.Tensor  # [heads, latent, v]

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Split ``kv_b_proj`` into its two halves, and make the kernels."""
        dequantise(self.kv_b_proj, act_dtype)
        weight = self.kv_b_proj.weight.to(act_dtype)
        weight = weight.view(self.num_heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        w_uk, w_uv = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        self.w_uk, self.w_uv = w_uk, w_uv.mT
        self.kernel = self.make_kernel(act_dtype)
        self.expand = None
        if has_extend_kernel(act_dtype):
            sizes = (self.num_heads, self.kv_lora_rank, self.qk_rope_head_dim, self.qk_nope_head_dim, self.v_head_dim)
            library = compile_expansion(*sizes)
            self.expand = None if library is None else ExpandKernel(w_uk, w_uv, self.qk_rope_head_dim, library)

    def make_kernel(self, dtype: torch.dtype) -> DecodeKernel | None:
        """The decode kernel, or None where nothing can compile it."""
        library = compile_kernel(self.num_heads, self.kv_lora_rank, self.qk_rope_head_dim, dtype)
        return None if library is None else DecodeKernel(library, self.kv_lora_rank, self.scale)

    def read_new(
        self, latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, requests: Prefills
    ) -> torch.Tensor:
        """New tokens as the cache gives them back, ``[tokens, latent + rope]``.

        Args:
            latent: ``[tokens, latent]`` of all prefilling requests, end to end.
            k_rope: ``[tokens, rope]``, rotated.
            cache: ``[blocks, block_size, row]``; has them already.
        """
        return torch.cat((latent, k_rope), dim=-1)

    def read_cached(self, cache: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cached tokens, ``[tokens, latent + rope]``; a copy.

        Args:
            cache: ``[blocks, block_size, row]``.
            slots: ``[tokens]``, where they lie, counted in tokens.
            positions: ``[tokens]`` in their sequences.
        """
        return cache.view(-1, cache.shape[-1])[slots.long()]

    def read_range(
        self, cache: torch.Tensor, requests: Prefills, first: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """Each request's cached tokens from position ``first`` to before ``end``, request after request.

        Args:
            cache: ``[blocks, block_size, row]``.
            first, end: ``[requests]``.

        Returns:
            ``[tokens, latent + rope]``; a copy.
        """
        positions = torch.arange(int(end.max())).expand(len(end), -1)
        wanted = (positions >= first[:, None]) & (positions < end[:, None])
        slots = page_slots(requests.block_table, cache.shape[1], positions.shape[1])
        return self.read_cached(cache, slots[wanted], positions[wanted])

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decode one token per sequence, with the up-projections absorbed into the query.

        Args:
            q: ``[sequences, heads, latent + rope]``, or its two parts.
            kv_c_and_k_pe_cache: ``[blocks, block_size, row]``.

        Returns:
            ``[sequences, heads, latent]`` and None (no log-sum-exp).
        """
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        decode = attn_metadata.decode
        assert decode is not None
        if self.kernel is not None:
            return self.kernel(q, kv_c_and_k_pe_cache, decode.block_table, decode.seq_lens), None
        slots = page_slots(decode.block_table, kv_c_and_k_pe_cache.shape[1], int(decode.seq_lens.max()))
        positions = torch.arange(slots.shape[1]).expand(slots.shape)
        cached = self.read_cached(kv_c_and_k_pe_cache, slots.flatten(), positions.flatten()).view(*slots.shape, -1)
        return decode_padded(q, cached, decode.seq_lens, self.scale)[..., : self.kv_lora_rank], None

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
        """Prefill: attend causally to the new tokens, and to all earlier ones of the same request.

        Args:
            q: ``[tokens, heads, nope + rope]`` of all prefilling requests, request after request.
            kv_c_normed: ``[tokens, latent]`` of the same tokens.
            k_pe: ``[tokens, 1, rope]``, rotated.
            kv_c_and_k_pe_cache: ``[blocks, block_size, row]``; holds earlier chunks and the new tokens.
            output: ``[tokens, heads * v]``, written.
        """
        assert attn_metadata.prefill is not None
        requests = Prefills.of(attn_metadata.prefill)
        new = self.read_new(kv_c_normed, k_pe.squeeze(1), kv_c_and_k_pe_cache, requests)
        if not has_extend_kernel(q.dtype):
            self._prefill_with_torch(q, new, kv_c_and_k_pe_cache, requests, output)
            return
        for tokens, part, as_latents in requests.runs(self._latents_are_cheaper, self._most_expanded):
            extend_part = self._extend_latents if as_latents else self._extend_expanded
            output[tokens] = extend_part(q[tokens], new[tokens], kv_c_and_k_pe_cache, part).flatten(1)

    @property
    def _most_expanded(self) -> int:
        """Cached tokens whose keys and values are as large as :data:`MAX_EXPANDED_BYTES`."""
        return MAX_EXPANDED_BYTES // (self.num_heads * (self.qk_head_dim + self.v_head_dim) * 2)

    def _latents_are_cheaper(self, new: int, cached: int) -> bool:
        """Whether to attend to a request's latents: because that is cheaper, with few new tokens after many cached
        ones; or because expanded keys and values would be too large."""
        if not cached:
            return False
        if cached > self._most_expanded:
            return True
        # Multiplications per head: for scores and values, of each pair of tokens; and for the up-projections.
        pairs = new * (cached + new / 2)
        projection = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        latents = pairs * (2 * self.kv_lora_rank + self.qk_rope_head_dim) + new * projection
        expanded = pairs * (self.qk_head_dim + self.v_head_dim) + (new + cached) * projection
        return latents < expanded

    def _extend_latents(
        self, q: torch.Tensor, new: torch.Tensor, cache: torch.Tensor, requests: Prefills
    ) -> torch.Tensor:
        """Attend to the latents where they lie, with the up-projections absorbed into queries and outputs."""
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1)
        cached, slots = self._context_in_place(cache, requests)
        out = extend(
            torch.cat((q_latent, q_rope), dim=-1),
            new[:, None],
            new[:, None, : self.kv_lora_rank],
            requests.starts,
            requests.contexts,
            cached[:, None],
            cached[:, None, : self.kv_lora_rank],
            slots,
            self.scale,
        )
        return torch.bmm(out.transpose(0, 1), self.w_uv).transpose(0, 1)

    def _extend_expanded(
        self, q: torch.Tensor, new: torch.Tensor, cache: torch.Tensor, requests: Prefills
    ) -> torch.Tensor:
        """Attend head by head to keys and values, which are expanded from cached latents and from new ones."""
        k, v = self._expand(new)
        cached_k, cached_v, slots = k, v, requests.starts.new_zeros(len(requests.contexts), 0)
        if requests.contexts.any():
            context, slots = self._context(cache, requests)
            cached_k, cached_v = self._expand(context)
        return extend(q, k, v, requests.starts, requests.contexts, cached_k, cached_v, slots, self.scale)

    def _context_in_place(self, cache: torch.Tensor, requests: Prefills) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ``[anything, latent + rope]`` among which are those of earlier context, and which of them they are:
        ``[requests, longest context]`` int32."""
        if self.kv_lora_rank % MULTIPLE or self.qk_rope_head_dim % MULTIPLE:
            return self._context(cache, requests)  # these are padded, which the whole cache should not be
        slots = page_slots(requests.block_table, cache.shape[1], int(requests.contexts.max()))
        return cache.view(-1, cache.shape[-1]), slots

    def _context(self, cache: torch.Tensor, requests: Prefills) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_context_in_place`, but a copy of what is needed, end to end."""
        contexts = requests.contexts
        starts = contexts.cumsum(0, dtype=torch.int32) - contexts
        rows = self.read_range(cache, requests, torch.zeros_like(contexts), contexts)
        return rows, starts[:, None] + torch.arange(int(contexts.max())).int()

    def _expand(self, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[tokens, heads, nope + rope]`` and values ``[tokens, heads, v]``, from ``[tokens, latent + rope]``."""
        if self.expand is not None:
            return self.expand(cached)
        latent, k_rope = cached.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(latent)[0].view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope = k_rope[:, None].expand(-1, self.num_heads, -1)
        return torch.cat((k_nope, k_rope), dim=-1), v

    def _prefill_with_torch(
        self,
        q: torch.Tensor,
        new: torch.Tensor,
        cache: torch.Tensor,
        requests: Prefills,
        output: torch.Tensor,
    ) -> None:
        """Prefill one request after another, with torch's kernel."""
        starts = requests.starts.tolist()
        for request, context in enumerate(requests.contexts.tolist()):
            tokens = slice(starts[request], starts[request + 1])
            cached = new[tokens]
            if context:
                slots = page_slots(requests.block_table[request : request + 1], cache.shape[1], context)[0]
                cached = torch.cat((self.read_cached(cache, slots, torch.arange(context)), cached))
            k, v = self._expand(cached)
            output[tokens] = attend_causally(q[tokens], k, v, self.scale).flatten(1)
