"""Rotary embedding from the frequencies that a converted layer carries in ``rope_freqs``."""

from weakref import WeakValueDictionary

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

CPU_MULTIPLE = 16
"""vLLM's CPU kernel (0.32) ends the process at 16-bit queries whose size is no multiple of this."""

# cos/sin tables, by everything that determines them, so that layers with the same frequencies share one.
_TABLES: WeakValueDictionary[tuple, torch.Tensor] = WeakValueDictionary()


class FrequencyRotaryEmbedding(RotaryEmbedding):
    """RoPE whose ``rotary_dim / 2`` frequencies come from the checkpoint instead of a base.

    The pairs are laid out in halves: component ``i`` is dimensions ``i`` and ``i + dim / 2``.
    vLLM's own kernels do the rotation; only the cos/sin table is ours.

    Args:
        freqs: ``[dim / 2]`` radians per position.
        max_position: number of positions in the table.
        dtype: dtype of the table; it is the model's, as in vLLM.
    """

    def __init__(self, freqs: torch.Tensor, max_position: int, dtype: torch.dtype) -> None:
        dim = 2 * freqs.numel()
        super().__init__(
            head_size=dim,
            rotary_dim=dim,
            max_position_embeddings=max_position,
            base=0.0,
            is_neox_style=True,
            dtype=dtype,
            init_cache=False,
        )
        self.set_frequencies(freqs)

    def set_frequencies(self, freqs: torch.Tensor) -> None:
        """Use the table of ``freqs`` (``[dim / 2]``, float32), which is made if no layer has it yet."""
        device = freqs.device
        key = (tuple(freqs.tolist()), self.max_position_embeddings, self.dtype, device)
        table = _TABLES.get(key)
        if table is None:
            positions = torch.arange(self.max_position_embeddings, dtype=torch.float32, device=device)
            angles = torch.outer(positions, freqs.float())
            table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.dtype)
            _TABLES[key] = table
        self.register_buffer("cos_sin_cache", table, persistent=False)
        self._frequencies = key[0]

    def has_frequencies(self, freqs: torch.Tensor) -> bool:
        """Whether the table is that of ``freqs`` (``[dim / 2]``, float32)."""
        return self._frequencies == tuple(freqs.tolist())

    def forward_cpu(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate with torch, because vLLM's CPU kernel (0.32) reads a query ``[tokens, heads, dim]`` wrongly.

        That kernel wants two dimensions, which a slice of MLA's query cannot have without a copy.
        """
        return self.forward_native(positions, query, key)

    def rotated_queries(self, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Rotate by vLLM's kernels where they can, possibly in place.

        Args:
            positions: ``[tokens]``.
            query: ``[tokens, heads, dim]``, contiguous.
        """
        if not query.is_cpu:
            return self.forward_cuda(positions, query)[0]
        if self.head_size % CPU_MULTIPLE:
            return self.forward_native(positions, query)[0]
        super().forward_cpu(positions, query.flatten(1))
        return query
