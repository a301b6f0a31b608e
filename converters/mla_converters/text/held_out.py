"""Text that was not calibrated on, to measure what a conversion lost."""

from collections.abc import Sequence

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.text.origins import read_texts, text_windows

WINDOWS = 2  # of all texts together, but at least one of each
LENGTH = 512  # tokens in a window
GRAM = 32  # tokens in a row that a held-out window must not share with the calibration


def held_out_windows(
    source: Source, origins: Sequence[str], used: torch.Tensor, seed: int, progress: Progress, device: str = "cpu"
) -> torch.Tensor:
    """Token ids of the same texts that were not used.

    Args:
        source: the model.
        origins: UTF-8 text files, ``self`` or ``chat``.
        used: ``[windows, tokens]``, the calibration's token ids.
        seed: the calibration's seed.
        progress: shows the progress of text that the model writes.
        device: where the model writes text.

    Returns:
        ``[windows, tokens]`` int64; a text that was used whole gives none.
    """
    length = min(LENGTH, source.config.max_position_embeddings, used.shape[1])
    seen = {tuple(gram) for window in used for gram in _grams(window)}

    def cut(ids: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        pieces = ids[: len(ids) // length * length].view(-1, length)
        order = torch.randperm(len(pieces), generator=generator).tolist()
        new = (pieces[index] for index in order if not any(tuple(gram) in seen for gram in _grams(pieces[index])))
        found = [piece for _, piece in zip(range(count), new, strict=False)]
        return torch.stack(found) if found else pieces[:0]

    generator = torch.Generator().manual_seed(seed + 1)  # what the model writes differs from the calibration
    count = max(1, WINDOWS // len(origins))
    texts = read_texts(source, origins)
    return torch.cat(text_windows(source, texts, count, length, cut, generator, progress, device))


def _grams(ids: torch.Tensor) -> list[list[int]]:
    """All runs of :data:`GRAM` tokens; the whole if it is shorter."""
    return ids.unfold(0, min(GRAM, len(ids)), 1).tolist()
