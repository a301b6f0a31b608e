"""Shared by the backends of this plugin: metadata without vLLM's list of cached sizes, and access to pages."""

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata


class AnySizeMLAMetadata(MLACommonMetadata):
    """vLLM's MLA metadata without its list of cached sizes (320, 512, 576)."""

    def __post_init__(self) -> None:
        pass


def page_slots(block_table: torch.Tensor, block_size: int, length: int) -> torch.Tensor:
    """The positions in the cache of the first ``length`` tokens of some sequences, counted in tokens.

    Args:
        block_table: ``[sequences, >= ceil(length / block_size)]`` block numbers.
        block_size: tokens of a block.
        length: how many tokens of every sequence.

    Returns:
        ``[sequences, length]`` in the table's dtype. Entries beyond a sequence's own length are arbitrary.
    """
    blocks = block_table[:, : -(-length // block_size)]
    offsets = torch.arange(block_size, dtype=block_table.dtype, device=block_table.device)
    return (blocks[..., None] * block_size + offsets).flatten(1)[:, :length]
