"""MLA decode on GPUs for any ``kv_lora_rank + qk_rope_head_dim``, by vLLM's Triton kernel.

``tests/gpu`` says what has to hold.
"""

from copy import copy
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonMetadata,
    accumulate_mla_context_chunk,
    init_mla_context_partial,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.attention.backends.mla.triton_mla import (
    TritonMLABackend,
    TritonMLAImpl,
    TritonMLAMetadataBuilder,
    _compute_num_kv_splits,
)
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from vllm_mla_plugin.backends.metadata import AnySizeMLAMetadata

MIN_TILE = 16
"""Triton multiplies tiles of no fewer columns."""
MAX_TILE = 2048
"""A wider one, of 32 tokens, does not fit the shared memory of any GPU."""
FIXED_TILES = {576: 512, 288: 256}
"""Row widths for which vLLM's kernel takes a fixed tile for the latent, whatever the latent's width."""
PROGRAMS_PER_SM = 8
"""Of the kernel: enough for a GPU to stay busy when sequences differ in length."""
HEADS_PER_PROGRAM = 16
MIN_HEADS = 2
"""For a single one vLLM takes a kernel that rounds each product of a score to 16 bits."""


def decode_width(latent: int, rope: int) -> int:
    """How many columns of a cached row the kernel shall take as values, so that its tiles fit each other.

    The kernel loads a row as two tiles, whose widths are powers of 2: the first holds at least the values and is taken
    for them, the second what is left. Values may be wider than the latent: the surplus is computed and dropped.

    Raises:
        ValueError: there is no such number.
    """
    width = latent + rope
    if tile := FIXED_TILES.get(width):
        if latent > tile:
            raise ValueError(
                f"vLLM's Triton kernel cannot split {width} cached numbers into {latent} + {rope}: convert with "
                "another --kv-lora-rank or --qk-rope-head-dim."
            )
        return latent if 2 * latent > tile else tile
    # A second tile that would be too narrow: one tile for everything.
    values = latent if rope == 0 or (rope > MIN_TILE // 2 and latent > MIN_TILE // 2) else width
    if values > MAX_TILE:
        raise ValueError(
            f"On a GPU, a token's cache in a layer has at most {MAX_TILE} numbers besides its rotary key, but this "
            f"checkpoint's has {latent} + {rope}: convert with a smaller --kv-lora-rank."
        )
    return values


def split_units(queries: int, heads: int, units: int) -> int:
    """How many of the GPU's ``units`` (SMs) vLLM shall believe in when it splits contexts.

    It splits each into at most twice as many parts, however many queries there are; results of all parts, in float32,
    are then written and read again. On an H200, 1,024 queries of 40 heads at 960 + 64 and 64K of context would need 19
    GiB for them. So few parts as keep the GPU busy are enough; a power of 2, for each number is a kernel to compile.

    Args:
        queries: of the batch.
        heads: of each.
        units: that there are.
    """
    programs = queries * -(-heads // HEADS_PER_PROGRAM)
    parts = max(2, min(2 * units, PROGRAMS_PER_SM * units // programs))
    return (1 << parts.bit_length() - 1) // 2


class AnySizeTritonMLAMetadataBuilder(TritonMLAMetadataBuilder):
    """Builds :class:`AnySizeMLAMetadata`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metadata_cls = AnySizeMLAMetadata

    def _reserve_attn_logits_workspace(self) -> None:
        """As vLLM's, for :func:`split_units` and :func:`decode_width`: it must not grow once graphs are captured."""
        if not is_workspace_manager_initialized():
            return
        heads = max(MIN_HEADS, self.num_heads * self.dcp_world_size)
        units = current_platform.num_compute_units()
        most = self.vllm_config.scheduler_config.max_num_seqs * self.reorder_batch_threshold
        length = self.model_config.max_model_len
        parts = max(
            queries * _compute_num_kv_splits(length, split_units(queries, heads, units))
            for queries in range(1, most + 1)
        )
        width = decode_width(self.mla_dims.kv_lora_rank, self.mla_dims.qk_rope_head_dim) + 1
        current_workspace_manager().get_simultaneous(((parts, heads, width), torch.float32))

    @staticmethod
    def determine_prefill_query_data_type(vllm_config: VllmConfig, model_dtype: torch.dtype) -> torch.dtype:
        """Never fp8: vLLM's looks for a prefill backend of its own, and may find none for these sizes."""
        return model_dtype


class AnySizeTritonMLABackend(TritonMLABackend):
    """vLLM's Triton MLA backend for every latent size."""

    @staticmethod
    def get_impl_cls() -> type["AnySizeTritonMLAImpl"]:
        return AnySizeTritonMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AnySizeTritonMLAMetadataBuilder]:
        return AnySizeTritonMLAMetadataBuilder


def gather_context(
    cache: torch.Tensor, block_table: torch.Tensor, chunk: Any, dtype: torch.dtype, scale: torch.Tensor
) -> torch.Tensor:
    """Cached rows of one chunk of earlier context, its requests end to end.

    vLLM's own kernel for this takes rows of 320 and 576 numbers only.

    Args:
        cache: ``[blocks, block_size, width]``, of ``dtype`` or fp8.
        block_table: ``[requests of the chunk, blocks]``.
        chunk: vLLM's ``ContextChunk``.
        dtype: of the result.
        scale: of fp8 numbers.

    Returns:
        ``[tokens of the chunk, width]``.
    """
    requests = chunk.token_to_seq.long()
    tokens = torch.arange(len(requests), device=cache.device) - chunk.cu_seq_lens[requests] + chunk.starts[requests]
    block_size = cache.shape[1]
    rows = cache[block_table[requests, tokens // block_size].long(), tokens % block_size]
    return rows if rows.dtype == dtype else (rows.float() * scale).to(dtype)


class AnySizeTritonMLAImpl(TritonMLAImpl):
    """Decode by vLLM's kernel, with its tiles made to fit; prefill by vLLM's code, with a gather for every size."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM's decode, told another width of the values.
        self._decoder = copy(self)
        self._decoder.kv_lora_rank = decode_width(self.kv_lora_rank, self.qk_rope_head_dim)
        self._units = self._sm_count

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decode; shapes as in :meth:`vllm_mla_plugin.backends.cpu.AnySizeCPUMLAImpl.forward_mqa`, and log-sum-exp."""
        q = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        queries, heads, width = q.shape
        if heads < MIN_HEADS:
            q = q.expand(queries, MIN_HEADS, width)
        self._decoder._sm_count = split_units(queries, q.shape[1], self._units)
        output, lse = self._decoder._decode(q, kv_c_and_k_pe_cache, attn_metadata, layer)
        return output[:, :heads, : self.kv_lora_rank].contiguous(), None if lse is None else lse[:, :heads]

    def _decode(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().forward_mqa(*arguments)

    def _compute_prefill_context(
        self,
        q: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        k_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to earlier context, in chunks that fit vLLM's workspace, for ``forward_mha`` to merge.

        Returns:
            ``[tokens, heads, v]`` and the log-sum-exp ``[heads, tokens]``.
        """
        prefill = attn_metadata.prefill
        assert prefill is not None and prefill.chunked_context is not None and prefill.prefill_backend is not None
        merged = None
        for chunk in prefill.chunked_context.chunks:
            table = prefill.block_table[chunk.request_slice]
            rows = gather_context(kv_c_and_k_pe_cache, table, chunk, q.dtype, k_scale)
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
