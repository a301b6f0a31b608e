"""Predictions of a teacher that were written down beforehand: its likeliest tokens, and a remainder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mla_converters.errors import ConversionError
from mla_converters.reports.logits import WRITER, LogitsReport
from mla_converters.support.json_files import read_json_object

DESCRIPTION = "logits.json"
NOTHING = 1e-5  # a probability that rounding may leave
COLUMNS = {"input_ids": np.int32, "top_ids": np.int32, "top_logprobs": np.float16}
"""The arrays of a folder: tokens ``[windows, tokens]``; the likeliest tokens that follow each of them, and the natural
logarithms of their probabilities, ``[windows, tokens, k]``."""


class Examples(Sequence[dict[str, torch.Tensor]]):
    """Windows as arguments of :meth:`mla_converters.training.distillation.Distillation.forward`.

    Args:
        columns: an argument's values for all windows, ``[windows, ...]``.
    """

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(**{name: values[index] for name, values in self.columns.items()})
        return {name: values[index] for name, values in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class TopTokens:
    """A teacher's likeliest tokens; all others count as one.

    The divergence is then at most that over the whole vocabulary, and the same where the remainder is nothing.

    Attributes:
        ids, logprobs: ``[positions, k]``, the likeliest tokens first.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor

    def divergence(self, logits: torch.Tensor, first: int, temperature: float) -> torch.Tensor:
        """See :class:`mla_converters.training.losses.Teaching`; ``temperature`` is 1, because the others are lost."""
        some = slice(first, first + len(logits))
        ids, expected = self.ids[some].long(), self.logprobs[some].float()
        rest = 1 - expected.exp().sum(-1)
        total = logits.logsumexp(-1, keepdim=True)
        predicted = logits.gather(-1, ids) - total
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - total.squeeze(-1)
        kept = (expected.exp() * (expected - predicted)).sum(-1)
        # Where nothing but rounding remains, a logarithm would be that of zero.
        lost = torch.where(rest > NOTHING, rest * (rest.clamp(min=NOTHING).log() - others), 0)
        return (kept + lost).sum()


def is_stored(folder: Path) -> bool:
    """Whether a folder holds predictions."""
    return (folder / DESCRIPTION).is_file()


def read_description(folder: Path) -> LogitsReport:
    """What a folder says of its predictions.

    Raises:
        ConversionError: it is broken.
    """
    path = folder / DESCRIPTION
    return LogitsReport.parse(read_json_object(path), str(path), WRITER)


def read_stored(folder: Path) -> Examples:
    """The predictions in a folder; they stay on disk until they are needed.

    Raises:
        ConversionError: they are broken.
    """
    report = read_description(folder)
    shape = (report.windows, report.length)
    columns = {}
    for name, dtype in COLUMNS.items():
        path = folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="c")
        except (OSError, ValueError) as error:
            raise ConversionError(f"{path} cannot be read ({error}): write it again with {WRITER}.") from error
        if array.shape != (shape if name == "input_ids" else (*shape, report.top_k)) or array.dtype != dtype:
            raise ConversionError(f"{path} holds {array.dtype} {array.shape}: write it again with {WRITER}.")
        columns[name] = torch.from_numpy(array)
    return Examples(**columns)
