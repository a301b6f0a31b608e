"""Token windows to train on: from text files, or written by the model."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from rich.progress import Progress

from mla_converters.checkpoints.rope_scaling import context_length
from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.options.text import parse_weighted
from mla_converters.text.chat import ChatTemplate
from mla_converters.text.documents import Documents
from mla_converters.text.origins import read_texts, written_windows
from mla_converters.text.sampling import LENGTH


class Sliceable(Protocol):
    """A tensor or a sequence."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...


Windows = TypeVar("Windows", bound=Sliceable)
HELD_OUT = 32  # one window in 32 is held out, and not trained on
FEW_HELD_OUT, SHARE = 4, 8  # of few windows, so many are held out, but at most one in 8: a single one tells too little
MOST_HELD_OUT = 128  # windows; more would take time, and tell no more
WRITTEN_LENGTH = 256  # tokens of a text that the model writes; short, because twice as many half as long teach more
LEAST = 2  # windows: one to train on, and one to hold out


def training_windows(
    source: Source,
    origins: Sequence[str],
    tokens: int,
    length: int,
    seed: int,
    progress: Progress,
    device: str = "cpu",
) -> torch.Tensor:
    """Token ids to train on.

    Args:
        source: the model.
        origins: UTF-8 text files, which are cut into windows from end to end; documents, see
            :mod:`mla_converters.text.documents`; or ``self`` or ``chat`` for text that the model writes. Each may have
            a weight after a colon.
        tokens: limit on the tokens of all texts together. Each text gets a share by its weight; a shorter text is used
            whole.
        length: tokens in a window; the model's context if that is less.
        seed: decides which windows of a longer file are used, and which text is sampled.
        progress: shows the progress.
        device: where the model writes text.

    Returns:
        ``[windows, length]`` int32. The windows of each text are in random order. The texts are interleaved so that
        every prefix mixes them in their overall proportion; the held-out prefix is therefore representative.

    Raises:
        ConversionError: a text cannot be read, there is too little text, or the model has no chat template.
    """
    length = min(length, context_length(source.config))
    names, weights = zip(*map(parse_weighted, origins), strict=True)
    counts = [int(tokens * weight / sum(weights)) // length for weight in weights]
    if not all(counts) or sum(counts) < LEAST:
        needed = max(LEAST * length, math.ceil(length * sum(weights) / min(weights)))
        raise ConversionError(
            f"--tokens is {tokens}, but must be at least {needed}, because windows have {length} tokens."
        )
    texts = read_texts(source, names)
    generator = torch.Generator().manual_seed(seed)
    of_each = [
        text.windows(count, length, seed, progress)
        if isinstance(text, Documents)
        else _cut(text, count, length, generator).int()
        if isinstance(text, torch.Tensor)
        else _written(source, text, count, length, generator, progress, device).int()
        for text, count in zip(texts, counts, strict=True)
    ]
    windows = torch.cat([of_one[torch.randperm(len(of_one), generator=generator)] for of_one in of_each])
    if len(windows) < LEAST:
        raise ConversionError(
            f"--text gives {len(windows)} windows of {length} tokens, but {LEAST} are needed: give more text, or a "
            "smaller --length."
        )
    along = torch.cat([(torch.arange(len(of_one)) + 0.5) / len(of_one) for of_one in of_each if len(of_one)])
    return windows[along.argsort(stable=True)]


def hold_out(windows: Windows) -> tuple[Windows, Windows]:
    """Divide windows: those to train on, and one in :data:`HELD_OUT` to measure the result.

    Of few windows, up to :data:`FEW_HELD_OUT` are held out, and of many at most :data:`MOST_HELD_OUT`.
    """
    few = min(FEW_HELD_OUT, len(windows) // SHARE)
    count = min(max(-(-len(windows) // HELD_OUT), few), MOST_HELD_OUT)
    return windows[count:], windows[:count]


def divided(windows: torch.Tensor, length: int) -> torch.Tensor:
    """Cut windows ``[windows, tokens]`` into shorter ones of one size: ``length`` tokens or a few more."""
    pieces = max(1, windows.shape[1] // length)
    length = windows.shape[1] // pieces
    return windows[:, : pieces * length].reshape(-1, length)


def _written(
    source: Source,
    template: ChatTemplate | None,
    count: int,
    length: int,
    generator: torch.Generator,
    progress: Progress,
    device: str,
) -> torch.Tensor:
    written = LENGTH if template else WRITTEN_LENGTH
    return written_windows(source, template, count, length, 0, generator, progress, device, written)[0]


def _cut(ids: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[torch.randperm(len(windows), generator=generator)[:count]]
