"""Decode context parallelism: tensor-parallel ranks share out each context, where otherwise each keeps all of it.

For decoding, vLLM gathers the queries of all heads on every rank, and then weighs the ranks' results by their
log-sum-exps (Flash-Decoding, arXiv 2307.08691, section 3). This plugin's Triton backend returns these. For prefill,
each rank reads its part of earlier context and gets the other parts, by the two functions here.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform


def refuse_context_parallel(config: VllmConfig, latent: int) -> None:
    """Refuse decode context parallelism where it is asked for and not served.

    Args:
        config: of the engine.
        latent: ``kv_lora_rank`` of a layer.

    Raises:
        ValueError: it is asked for, on a CPU or with a latent that vLLM cannot merge.
    """
    if config.parallel_config.decode_context_parallel_size == 1:
        return
    if current_platform.is_cpu():
        raise ValueError(
            "CPUs do not serve decode context parallelism, because vLLM merges the ranks' results by a kernel for "
            "GPUs: leave --decode-context-parallel-size out."
        )
    if latent & (latent - 1):
        raise ValueError(
            "Decode context parallelism takes latents of 256, 512 or another power of two, because vLLM's kernel that "
            f"merges the ranks' results does, and this checkpoint's have {latent} numbers: leave "
            "--decode-context-parallel-size out, or convert with another --kv-lora-rank."
        )


def own_part(chunk: Any) -> Any:
    """The part of a chunk of earlier context that this rank keeps, filled up to the length of the longest part.

    Args:
        chunk: vLLM's ``ContextChunk``. Without decode context parallelism it is returned as it is.
    """
    if chunk.padded_local_token_to_seq is None:
        return chunk
    return replace(
        chunk, token_to_seq=chunk.padded_local_token_to_seq, cu_seq_lens=chunk.padded_local_cu_seq_lens
    )  # vLLM has counted ``starts`` in tokens of this rank already


def all_parts(rows: torch.Tensor, chunk: Any, group: Any) -> torch.Tensor:
    """A chunk of earlier context, request after request, from the parts that the ranks keep.

    A request's tokens come rank after rank, not in their order. Attention to earlier context does not depend on it,
    because new tokens attend to all of it, and keys are rotated already.

    Args:
        rows: ``[tokens of this rank's part, width]``, as :func:`own_part` says.
        chunk: vLLM's ``ContextChunk``.
        group: vLLM's ``GroupCoordinator`` of the ranks.

    Returns:
        ``[tokens of the chunk, width]``.
    """
    parts = group.all_gather(rows, dim=0).unflatten(0, (group.world_size, -1))
    pieces, first = [], 0
    for padded, lengths, start in zip(
        chunk.padded_local_seq_lens, chunk.local_context_lens_allranks, chunk.local_starts, strict=True
    ):
        for part, length in zip(parts, lengths, strict=True):
            pieces.append(part[first : first + min(padded, max(0, length - start))])
        first += padded
    return torch.cat(pieces)
