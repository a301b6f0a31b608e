"""Token windows to train on: all of a text file, or what the model writes."""

from collections.abc import Sequence

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.text.origins import read_texts, text_windows

HELD_OUT = 32  # one window in so many is not trained on
WRITTEN_LENGTH = 256  # tokens of a text that the model writes: twice as many that are half as long teach more
LEAST = 2  # windows: one to train on, one held out


def training_windows(
    source: Source, origins: Sequence[str], tokens: int, length: int, seed: int, progress: Progress
) -> torch.Tensor:
    """Token ids to train on.

    Args:
        source: the model.
        origins: UTF-8 text files, cut end to end, or ``self`` or ``chat`` for what the model writes.
        tokens: at most so many of all together, an equal share of each; a shorter file gives what it has.
        length: tokens in a window, or the model's context if that is less.
        seed: which windows of a longer file, and what to sample.
        progress: for the bar.

    Returns:
        ``[windows, length]`` int64, of each text in random order, and in any part of them as large a share of each text
        as in all: what is held out stands for all.

    Raises:
        ConversionError: a text cannot be read, there is too little of all, or the model has no chat template.
    """
    length = min(length, source.config.max_position_embeddings)
    share = tokens // len(origins) // length
    if share * len(origins) < LEAST:
        needed = length * max(LEAST, len(origins))
        raise ConversionError(f"--tokens is {tokens}, but must be at least {needed}: windows of {length}.")
    texts = read_texts(source, origins)
    generator = torch.Generator().manual_seed(seed)
    of_each = text_windows(source, texts, share, length, _cut, generator, progress, WRITTEN_LENGTH)
    windows = torch.cat([of_one[torch.randperm(len(of_one), generator=generator)] for of_one in of_each])
    if len(windows) < LEAST:
        raise ConversionError(
            f"--text gives {len(windows)} windows of {length} tokens, but {LEAST} are needed: give more text, or a "
            "smaller --length."
        )
    along = torch.cat([(torch.arange(len(of_one)) + 0.5) / len(of_one) for of_one in of_each])
    return windows[along.argsort(stable=True)]


def hold_out(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows ``[windows, tokens]`` to train on, and one in :data:`HELD_OUT` to see what it brings."""
    count = -(-len(windows) // HELD_OUT)
    return windows[count:], windows[:count]


def divided(windows: torch.Tensor, length: int) -> torch.Tensor:
    """Windows ``[windows, tokens]`` cut into shorter ones of ``length`` tokens or a few more, all alike."""
    pieces = max(1, windows.shape[1] // length)
    length = windows.shape[1] // pieces
    return windows[:, : pieces * length].reshape(-1, length)


def _cut(ids: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[torch.randperm(len(windows), generator=generator)[:count]]
