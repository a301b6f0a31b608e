"""Text that was not calibrated on, to measure what a conversion lost."""

from collections.abc import Sequence

import torch

WINDOWS = 2  # of all texts together, but at least one of each
LENGTH = 512  # tokens in a window
GRAM = 32  # tokens in a row that a held-out window must not share with the calibration


def held_out_windows(texts: Sequence[torch.Tensor], used: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    """Windows of texts that share no run of tokens with what was used.

    Args:
        texts: ``[tokens]`` of each text.
        used: ``[windows, tokens]``, the calibration's token ids.
        length: tokens in a window.
        seed: chooses the windows.

    Returns:
        ``[windows, length]`` int64; a text that was used whole gives none.
    """
    seen = {tuple(gram) for window in used for gram in _grams(window)}
    generator = torch.Generator().manual_seed(seed + 1)  # not the numbers that cut the calibration
    count, found = max(1, WINDOWS // len(texts)), [used.new_empty(0, length)]
    for ids in texts:
        pieces = ids[: len(ids) // length * length].view(-1, length)
        order = torch.randperm(len(pieces), generator=generator).tolist()
        new = (pieces[index] for index in order if not any(tuple(gram) in seen for gram in _grams(pieces[index])))
        found += [piece[None] for _, piece in zip(range(count), new, strict=False)]
    return torch.cat(found)


def _grams(ids: torch.Tensor) -> list[list[int]]:
    """All runs of :data:`GRAM` tokens; the whole if it is shorter."""
    return ids.unfold(0, min(GRAM, len(ids)), 1).tolist()
