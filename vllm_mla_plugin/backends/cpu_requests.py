"""The requests of a batch that prefill, and which of them a backend attends in the same way."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata


class Prefills(NamedTuple):
    """Requests that prefill.

    Attributes:
        starts: ``[requests + 1]`` int32, the position where each one's new tokens begin.
        contexts: ``[requests]`` int32, how many cached tokens each one has.
        block_table: ``[requests, anything]``.
    """

    starts: torch.Tensor
    contexts: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def of(cls, metadata: MLACommonPrefillMetadata) -> "Prefills":
        """All of a batch."""
        starts, chunked = metadata.query_start_loc, metadata.chunked_context
        contexts = torch.zeros_like(starts[1:]) if chunked is None else chunked.context_lens.int()
        return cls(starts, contexts, metadata.block_table)

    def runs(self, as_latents: Callable[[int, int], bool], most: int) -> Iterator[tuple[slice, "Prefills", bool]]:
        """Neighbours that are attended alike: as latents, or with expanded keys and values.

        Args:
            as_latents: says of a request's new and cached tokens whether to attend to them as latents.
            most: cached tokens of neighbours that are expanded together.

        Yields:
            Which of the batch's tokens are theirs, the requests, and whether to attend to latents.
        """
        lengths, contexts = self.starts.diff().tolist(), self.contexts.tolist()
        kinds = [as_latents(*sizes) for sizes in zip(lengths, contexts, strict=True)]
        first, cached = 0, contexts[0]
        for i in range(1, len(kinds)):
            if kinds[i] != kinds[first] or (not kinds[i] and cached + contexts[i] > most):
                yield *self._from_to(first, i), kinds[first]
                first, cached = i, 0
            cached += contexts[i]
        yield *self._from_to(first, len(kinds)), kinds[first]

    def _from_to(self, first: int, end: int) -> tuple[slice, "Prefills"]:
        starts = self.starts[first : end + 1]
        tokens = slice(int(starts[0]), int(starts[-1]))
        return tokens, Prefills(starts - starts[0], self.contexts[first:end], self.block_table[first:end])
