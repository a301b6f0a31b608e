"""The tokens on which a conversion is calibrated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress

from mla_converters.checkpoints.rope_scaling import context_length
from mla_converters.checkpoints.source import Source
from mla_converters.options import WINDOW
from mla_converters.text.documents import Documents
from mla_converters.text.held_out import LENGTH, WINDOWS, held_out_windows
from mla_converters.text.origins import long_enough, random_tokens, read_texts, written_windows

READ = 16  # times as many tokens of documents are read as are cut out of them, so that windows seldom overlap


@dataclass(frozen=True)
class Calibration:
    """Windows to calibrate on.

    Attributes:
        text: ``[windows, tokens]`` token ids.
        random: ``[1, tokens]`` token ids drawn at random, because text alone leaves out some directions of a layer.
    """

    text: torch.Tensor
    random: torch.Tensor

    @property
    def windows(self) -> torch.Tensor:
        """All windows ``[windows + 1, tokens]``; the last one is the random window."""
        return torch.cat((self.text, self.random))

    def some(self, count: int) -> "Calibration":
        """At most ``count`` windows of text, and the random window."""
        return Calibration(self.text[:count], self.random)


def calibrate(text: torch.Tensor, source: Source, seed: int) -> Calibration:
    """Add a random window to windows of text ``[windows, tokens]``.

    Raises:
        ConversionError: the tokenizer has special tokens only.
    """
    generator = torch.Generator().manual_seed(seed)
    return Calibration(text, random_tokens(source, (1, text.shape[1]), generator))


def calibration_texts(
    source: Source,
    origins: Sequence[str],
    tokens: int,
    seed: int,
    progress: Progress,
    length: int = WINDOW,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Token ids to calibrate on, and others of the same texts to measure the loss on.

    What the model writes is written at once, because single texts would take almost as long as many.

    Args:
        source: the model.
        origins: UTF-8 text files, documents (see :mod:`mla_converters.text.documents`), ``self`` or ``chat``; each
            gives the same number of windows.
        tokens: number of tokens in total, rounded down to whole windows of each origin; at least ``WINDOW`` per origin.
        seed: decides where files are cut, and which text is sampled.
        length: tokens in a window; less if an origin's share or the model's context is less. If a file is shorter,
            windows have ``WINDOW`` tokens.
        device: where the model writes text.

    Returns:
        ``used``, ``[windows, length]`` int64. The origins take turns, so that the first windows have text of each.
        ``held_out``, as :func:`mla_converters.text.held_out.held_out_windows` says.

    Raises:
        ConversionError: a text cannot be read or is too short, or the model has no chat template.
    """
    share, context = tokens // len(origins), context_length(source.config)
    texts = [
        _read(text, share, seed, progress) if isinstance(text, Documents) else text
        for text in read_texts(source, origins)
    ]
    length = max(WINDOW, min(length, share, context))
    if any(isinstance(text, torch.Tensor) and len(text) <= length for text in texts):
        length = WINDOW
    count, short = share // length, min(LENGTH, length, context)
    generator = torch.Generator().manual_seed(seed)
    used, others = [], []
    for text in texts:
        if isinstance(text, torch.Tensor):
            used.append(_cut(text, count, length, generator))
            others.append(text)
        else:
            windows, written = written_windows(source, text, count, length, WINDOWS, generator, progress, device)
            used.append(windows)
            others.append(written[:, :short].flatten())
    windows = torch.stack(used, dim=1).flatten(0, 1)
    return {"used": windows, "held_out": held_out_windows(others, windows, short, seed)}


def _read(documents: Documents, share: int, seed: int, progress: Progress) -> torch.Tensor:
    """Token ids ``[tokens]`` of documents, of which ``share`` tokens are to be cut out."""
    return long_enough(documents.windows(READ * share, 1, seed, progress).flatten().long(), documents.origin)


def _cut(ids: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(ids) - length, (count,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])
