"""MLA on GPUs for any ``kv_lora_rank + qk_rope_head_dim``: this plugin's decode kernel in vLLM's Triton backend.

``tests/gpu`` has its tests.
"""

from functools import cache
from typing import Any

import torch
import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    accumulate_mla_context_chunk,
    init_mla_context_partial,
)
from vllm.platforms import current_platform
from vllm.triton_utils import triton
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAImpl, TritonMLAMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from vllm_mla_plugin.backends.context_parallel import all_parts, own_part
from vllm_mla_plugin.backends.gpu_decode import decode, suited_parts
from vllm_mla_plugin.backends.gpu_merge import Parts
from vllm_mla_plugin.backends.metadata import AnySizeMLAMetadata
from vllm_mla_plugin.checkpoint.layouts import PackedTiles, Tiles, suited_tiles
from vllm_mla_plugin.latent_attention import LatentAttention


@cache
def gpu_tiles(latent: int, rope: int, heads: int, cache_dtype: str) -> Tiles:
    """Tiles of the decode kernel on this GPU.

    Args:
        latent, rope: sizes of a cached row.
        heads: query heads.
        cache_dtype: the cache's dtype as vLLM names it.

    Raises:
        ValueError: a row is too wide for this GPU.
    """
    return suited_tiles(latent, rope, heads, cache_dtype.startswith("fp8"), shared_memory())


@cache
def shared_memory() -> int:
    """Bytes of shared memory that one program of a kernel may take on this GPU."""
    device = torch.cuda.current_device()
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def scratch_rows(most: int, heads: int, tiles: Tiles | PackedTiles, units: int) -> int:
    """The largest number of rows times parts that a batch needs scratch for.

    Args:
        most: the batch has at most this many rows.
        heads: query heads of each.
        tiles: tiles of the kernel.
        units: the GPU's units (SMs).
    """
    return max(rows * suited_parts(rows, heads, tiles, units) for rows in range(1, most + 1))


def reserve(most: int, heads: int, tiles: Tiles | PackedTiles, numbers: int) -> None:
    """Reserve scratch of the decode kernel in vLLM's workspace, where there is one.

    Args:
        most, heads, tiles: as for :func:`scratch_rows`.
        numbers: of a part's result.
    """
    if is_workspace_manager_initialized():
        rows = scratch_rows(most, heads, tiles, current_platform.num_compute_units())
        current_workspace_manager().get_simultaneous(((rows, heads, numbers), torch.float32))


class AnySizeTritonMLAMetadataBuilder(TritonMLAMetadataBuilder):
    """Builds :class:`AnySizeMLAMetadata`. Layers of different sizes have a builder for each size."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        # Not vLLM's Triton builder: from 0.33 on, its constructor reserves the scratch of vLLM's kernel, which is
        # larger than ours and comes too late to be taken out of the memory for the cache.
        MLACommonMetadataBuilder.__init__(
            self, kv_cache_spec, layer_names, vllm_config, device, metadata_cls=AnySizeMLAMetadata
        )
        # As in vLLM's: ranks that share contexts do not advance their lengths between the steps of a draft.
        self.supports_draft_decode_metadata_update = self.dcp_world_size == 1
        if self.dcp_world_size == 1:
            # Only vLLM's own gather of context would write here: tens of MB for each size.
            self.chunked_prefill_workspace = torch.empty(0, device=self.device)
        self.reserve_scratch()

    def reserve_scratch(self) -> None:
        """Reserve the decode kernel's scratch now, because it must not grow once graphs are captured."""
        heads = self.num_heads * self.dcp_world_size
        most = self.vllm_config.scheduler_config.max_num_seqs * self.reorder_batch_threshold
        reserve(most, heads, *self.decode_tiles(heads))

    def decode_tiles(self, heads: int) -> tuple[Tiles | PackedTiles, int]:
        """Tiles of the decode kernel, and the numbers of a part's result."""
        sizes, cache_dtype = self.mla_dims, self.vllm_config.cache_config.cache_dtype
        tiles = gpu_tiles(sizes.kv_lora_rank, sizes.qk_rope_head_dim, heads, cache_dtype)
        return tiles, sizes.kv_lora_rank + 1

    @staticmethod
    def determine_prefill_query_data_type(vllm_config: VllmConfig, model_dtype: torch.dtype) -> torch.dtype:
        """The model's dtype, never fp8: vLLM's method looks for a prefill backend of its own, and may find none for
        these sizes."""
        return model_dtype


class AnySizeTritonMLABackend(TritonMLABackend):
    """vLLM's Triton MLA backend for every latent size."""

    @staticmethod
    def get_impl_cls() -> type["AnySizeTritonMLAImpl"]:
        return AnySizeTritonMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AnySizeTritonMLAMetadataBuilder]:
        return AnySizeTritonMLAMetadataBuilder


def context_slots(cache: torch.Tensor, block_table: torch.Tensor, chunk: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens of one chunk of earlier context lie, request after request.

    Args:
        cache: ``[blocks, block_size, width]``.
        block_table: ``[requests of the chunk, blocks]``.
        chunk: vLLM's ``ContextChunk``.

    Returns:
        ``[tokens of the chunk]`` int64 each: slots, counted in tokens, and positions in their sequences.
    """
    requests = chunk.token_to_seq.long()
    positions = torch.arange(len(requests), device=cache.device) - chunk.cu_seq_lens[requests] + chunk.starts[requests]
    return token_slots(block_table, requests, positions, cache.shape[1]), positions


def token_slots(
    block_table: torch.Tensor, requests: torch.Tensor, positions: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Where tokens lie in the cache, counted in tokens, int64, by their requests and positions ``[tokens]`` int64."""
    return block_table[requests, positions // block_size].long() * block_size + positions % block_size


def gather_context(
    cache: torch.Tensor, block_table: torch.Tensor, chunk: Any, dtype: torch.dtype, scale: torch.Tensor
) -> torch.Tensor:
    """Cached rows of one chunk of earlier context, request after request.

    vLLM's own kernel for this takes rows of 320 and 576 numbers only.

    Args:
        cache: ``[blocks, block_size, width]``, in ``dtype`` or fp8.
        block_table: ``[requests of the chunk, blocks]``.
        chunk: vLLM's ``ContextChunk``.
        dtype: dtype of the result.
        scale: scale of fp8 numbers.

    Returns:
        ``[tokens of the chunk, width]``.
    """
    slots, _ = context_slots(cache, block_table, chunk)
    rows = cache[slots // cache.shape[1], slots % cache.shape[1]]
    return rows if rows.dtype == dtype else (rows.float() * scale).to(dtype)


class AnySizeTritonMLAImpl(TritonMLAImpl):
    """Decodes with this plugin's kernel. Prefill is vLLM's code, with a gather of context for every size."""

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor | Parts, torch.Tensor | None]:
        """Decode; shapes as in :meth:`vllm_mla_plugin.backends.cpu.AnySizeCPUMLAImpl.forward_mqa`, and log-sum-exp; or
        as :meth:`merge_or_leave` says."""
        assert attn_metadata.decode is not None
        q_latent, q_rope = q if isinstance(q, tuple) else q.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        tiles, numbers = self.decode_tiles(q_latent.shape[1])
        assert isinstance(tiles, Tiles)
        parts = decode(
            q_latent,
            q_rope,
            kv_c_and_k_pe_cache,
            attn_metadata.decode.block_table,
            attn_metadata.decode.seq_lens,
            self.make_scratch(q_latent, tiles, numbers),
            layer._k_scale,
            scale=self.scale,
            causal=attn_metadata.causal,
            tiles=tiles,
        )
        return self.merge_or_leave(parts, attn_metadata, layer)

    def merge_or_leave(
        self, parts: Parts, attn_metadata: MLACommonMetadata, layer: AttentionLayer
    ) -> tuple[torch.Tensor | Parts, torch.Tensor | None]:
        """Results and their log-sum-exp; or the parts as they are, which the layer then merges together with its
        product with W_UV.

        That saves a launch, which matters for few queries. A batch with prefill takes much longer than a launch.
        """
        if (
            isinstance(layer, LatentAttention)
            and layer.merges_parts
            and attn_metadata.num_prefills == 0
            and self.dcp_world_size == 1  # other ranks' results are merged before the product
            and not envs.VLLM_BATCH_INVARIANT  # a result must not depend on how many queries there are
            and parts.suits_projection(self.v_head_dim)
        ):
            return parts, None
        return parts.merge()

    def decode_tiles(self, heads: int) -> tuple[Tiles | PackedTiles, int]:
        """As for the metadata builder."""
        tiles = gpu_tiles(self.kv_lora_rank, self.qk_rope_head_dim, heads, self.kv_cache_dtype)
        return tiles, self.kv_lora_rank + 1

    def reserve_workspace(self) -> None:
        """Reserve scratch as the metadata builder does; vLLM calls this from 0.33 on, before it sizes the cache."""
        from vllm.v1.attention.backend import max_decode_query_len  # vLLM has it from 0.32 on

        heads = self.num_heads * self.dcp_world_size
        most = self._vllm_config.scheduler_config.max_num_seqs * max_decode_query_len(self._vllm_config)
        reserve(most, heads, *self.decode_tiles(heads))

    def make_scratch(self, q_latent: torch.Tensor, tiles: Tiles | PackedTiles, numbers: int) -> torch.Tensor:
        """Scratch of the decode kernel, ``[rows, heads, parts, numbers]`` float32: as many parts as suit the batch."""
        rows, heads, _ = q_latent.shape
        # With one part, a result does not depend on the rest of the batch.
        parts = 1 if envs.VLLM_BATCH_INVARIANT else suited_parts(rows, heads, tiles, self._sm_count)
        shape = (rows, heads, parts, numbers)
        if is_workspace_manager_initialized():
            (scratch,) = current_workspace_manager().get_simultaneous((shape, torch.float32))
            return scratch
        return torch.empty(shape, dtype=torch.float32, device=q_latent.device)

    def read_context(
        self, cache: torch.Tensor, block_table: torch.Tensor, chunk: Any, dtype: torch.dtype, scale: torch.Tensor
    ) -> torch.Tensor:
        """Numbers of one chunk of earlier context, ``[tokens of the chunk, latent + rope]``."""
        return gather_context(cache, block_table, chunk, dtype, scale)

    def _compute_prefill_context(
        self,
        q: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        k_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to earlier context, in chunks that fit vLLM's workspace, for ``forward_mha`` to merge.

        With decode context parallelism, the ranks exchange their parts of a chunk.

        Returns:
            ``[tokens, heads, v]`` and the log-sum-exp ``[heads, tokens]``.
        """
        prefill = attn_metadata.prefill
        assert prefill is not None and prefill.chunked_context is not None and prefill.prefill_backend is not None
        merged, group = None, getattr(prefill.chunked_context.dcp_manager, "group", None)
        for chunk in prefill.chunked_context.chunks:
            table = prefill.block_table[chunk.request_slice]
            rows = self.read_context(kv_c_and_k_pe_cache, table, own_part(chunk), q.dtype, k_scale)
            if group is not None:
                rows = all_parts(rows, chunk, group)
            latent, k_rope = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            kv = self.kv_b_proj(latent)[0].view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
            k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
            part = prefill.prefill_backend.run_prefill_context_chunk(
                chunk=chunk, q=q[chunk.token_slice], k=self._concat_k_nope_k_pe(k_nope, k_rope[:, None]), v=v
            )
            if merged is None:
                merged = init_mla_context_partial(prefill.chunked_context, *part, num_tokens=q.shape[0])
            accumulate_mla_context_chunk(chunk, *part, *merged)
        assert merged is not None
        return merged

    def _context_parallel_compute_prefill_context(
        self,
        q: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        k_scale: torch.Tensor,
        **arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with decode context parallelism: vLLM's method reads fp8 rows of 320 and 576 numbers only."""
        return self._compute_prefill_context(q, kv_c_and_k_pe_cache, attn_metadata, k_scale)
