"""What the backends of this plugin share: metadata without vLLM's list of cached sizes, and access to pages."""

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata


class AnySizeMLAMetadata(MLACommonMetadata):
    """vLLM's MLA metadata without its list of cached sizes (320, 512, 576)."""

    def __post_init__(self) -> None:
        pass


def page_slots(block_table: torch.Tensor, block_size: int, length: int) -> torch.Tensor:
    """Where the first ``length`` tokens of some sequences lie in the cache, counted in tokens.

    Args:
        block_table: ``[sequences, >= ceil(length / block_size)]`` block numbers.

    Returns:
        ``[sequences, length]``, of the table's dtype; what lies beyond a sequence's own length is arbitrary.
    """
    blocks = block_table[:, : -(-length // block_size)]
    offsets = torch.arange(block_size, dtype=block_table.dtype, device=block_table.device)
    return (blocks[..., None] * block_size + offsets).flatten(1)[:, :length]
