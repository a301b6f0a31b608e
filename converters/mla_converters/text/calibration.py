"""Calibration tokens: cut from a text file, sampled from the model itself, or random."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.text.chat import ChatTemplate, chat_template
from mla_converters.text.sampling import LENGTH, sampled_texts

SELF = "self"
"""Instead of a text file: text that the model writes itself."""
CHAT = "chat"
"""Instead of a text file: conversations of which the model writes both sides."""
WRITTEN = (SELF, CHAT)
WINDOW = 512
"""Tokens in the shortest calibration window."""
Text: TypeAlias = torch.Tensor | ChatTemplate | None
"""Token ids ``[tokens]`` of a file, or what a conversation is written into; None for what the model writes freely."""


def calibration_windows(
    source: Source, origins: Sequence[str], tokens: int, seed: int, progress: Progress, length: int = WINDOW
) -> torch.Tensor:
    """Token ids to calibrate on.

    Args:
        source: the model.
        origins: UTF-8 text files, ``SELF`` or ``CHAT``; each gives as many windows as every other.
        tokens: how many tokens of all together, rounded down to whole windows of each.
        seed: where to cut, or what to sample.
        length: tokens in a window; less if an origin has not as many, down to ``WINDOW``.

    Returns:
        ``[windows, length]`` int64, the origins in turn: who takes only the first windows has some of each.

    Raises:
        ConversionError: a text cannot be read or is too short, or the model has no chat template.
    """
    share = tokens // len(origins)
    if share < WINDOW:
        each = f" of {WINDOW} for each of {len(origins)} --calibration texts" if len(origins) > 1 else ""
        raise ConversionError(
            f"--calibration-tokens is {tokens}, but must be at least {WINDOW * len(origins)} (one window{each})."
        )
    texts = read_texts(source, origins)
    length = max(WINDOW, min(length, share, source.config.max_position_embeddings))
    if any(isinstance(text, torch.Tensor) and len(text) <= length for text in texts):
        length = WINDOW
    generator = torch.Generator().manual_seed(seed)
    count = share // length
    windows = text_windows(source, texts, count, length, _cut, generator, progress)
    return torch.stack(windows, dim=1).flatten(0, 1)


def read_texts(source: Source, origins: Sequence[str]) -> list[Text]:
    """What is needed of each origin before anything is sampled.

    Raises:
        ConversionError: a text cannot be read or is too short, or the model has no chat template.
    """
    return [_read_text(source, origin) for origin in origins]


def _read_text(source: Source, origin: str) -> Text:
    if origin == CHAT:
        return chat_template(source.tokenizer, LENGTH)
    return None if origin == SELF else _token_ids(source, Path(origin))


def text_windows(
    source: Source,
    texts: list[Text],
    count: int,
    length: int,
    cut: Callable[[torch.Tensor, int, int, torch.Generator], torch.Tensor],
    generator: torch.Generator,
    progress: Progress,
    written: int = LENGTH,
) -> list[torch.Tensor]:
    """Windows ``[count, length]`` of each text.

    Args:
        source: the model.
        texts: of :func:`read_texts`.
        count: windows of each.
        length: tokens in a window.
        cut: from token ids, count, length and generator to windows, fewer if there are not so many.
        generator: for cutting and sampling.
        progress: for the bar.
        written: tokens of a text that the model writes, if a window has room for more than one; conversations have
            ``LENGTH``.
    """
    return [
        cut(text, count, length, generator)
        if isinstance(text, torch.Tensor)
        else _sample(source, count, length, generator, progress, text, LENGTH if text else written)
        for text in texts
    ]


def _token_ids(source: Source, path: Path) -> torch.Tensor:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"Text {path} cannot be read: {error}") from error
    if not text.strip():
        raise ConversionError(f"Text {path} is empty.")
    ids = source.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) <= WINDOW:
        raise ConversionError(f"Text {path} is too short: {len(ids)} tokens, where more than {WINDOW} are needed.")
    if int(ids.max()) >= source.config.vocab_size:
        raise ConversionError(f"The tokenizer in {source.name} has ids beyond the model's vocabulary.")
    return ids


def _cut(ids: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(ids) - length, (count,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def random_tokens(source: Source, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Ids ``shape`` drawn alike from all of the tokenizer's that are not special.

    Raises:
        ConversionError: all are special.
    """
    allowed = torch.ones(source.config.vocab_size)
    allowed[len(source.tokenizer) :] = 0  # rows of the embedding that only pad it
    allowed[_special_ids(source)] = 0
    if not allowed.any():
        raise ConversionError(f"The tokenizer in {source.name} has no tokens but special ones: it is broken.")
    return torch.multinomial(allowed, shape[0] * shape[1], replacement=True, generator=generator).view(shape)


def _special_ids(source: Source) -> torch.Tensor:
    special = [i for i in source.tokenizer.all_special_ids if i < source.config.vocab_size]
    return torch.tensor(special, dtype=torch.long)


def _sample(
    source: Source,
    count: int,
    length: int,
    generator: torch.Generator,
    progress: Progress,
    template: ChatTemplate | None,
    written: int,
) -> torch.Tensor:
    """Windows ``[count, length]`` of what the model writes, each of as many texts of ``written`` tokens as fit."""
    per_window = max(1, length // written)
    if template:
        first, never = torch.full((count * per_window,), template.opening[0]), torch.empty(0, dtype=torch.long)
    else:
        first = random_tokens(source, (1, count * per_window), generator)[0]
        never = _special_ids(source)  # the end of a text ends nothing: padding after it would calibrate for padding
    texts = sampled_texts(source, first, never, -(-length // per_window), generator, progress, template)
    return texts.view(count, -1)[:, :length]
