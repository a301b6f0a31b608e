"""Documents to train on: JSON lines, Parquet files and data sets, read as a stream and packed into windows."""

import json
import random
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from mla_converters.errors import ConversionError
from mla_converters.options.text import HUB
from mla_converters.support.packages import require
from mla_converters.text.chat import TODAY

JSON_LINES, PARQUET = ".jsonl", ".parquet"
COLUMNS = ("text", "messages")  # the first of them that a row has is read
SHUFFLED = 10_000  # documents that are in memory, of which one is drawn at random
TOGETHER = 256  # documents that are tokenised together


def has_documents(origin: str) -> bool:
    """Whether an origin of text is made of documents: JSON lines, a Parquet file, or a data set on the hub."""
    return origin.startswith(HUB) or Path(origin).suffix in (JSON_LINES, PARQUET)


class Documents:
    """Documents of one origin, of which the first has been read.

    Args:
        origin: a ``.jsonl`` or ``.parquet`` file, or ``hub:ID[:CONFIG[:SPLIT[:COLUMN]]]``. A row has a ``text``, or
            ``messages`` that the tokenizer's chat template lays out.
        tokenizer: of the model.
        vocabulary: number of ids that the model knows.

    Raises:
        ConversionError: there are no such documents.
    """

    def __init__(self, origin: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self.origin = origin
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        rows = self._rows()
        first = next(rows, None)
        if first is None:
            raise ConversionError(f"Text {origin} has no rows.")
        self._ids([self._text(first)])
        self._all = chain([first], rows)

    def windows(self, count: int, length: int, seed: int, progress: Progress) -> torch.Tensor:
        """At most ``count`` windows ``[windows, length]`` int32 of documents one after another.

        Documents are shuffled within a buffer, and the tokenizer's end of text stands between them. Reading ends when
        there are enough tokens, and may happen once.
        """
        task = progress.add_task(f"Reading {self.origin}", total=count)
        packed, filled = np.empty(count * length, dtype=np.int32), 0
        rows = _shuffled(self._all, seed)
        while some := list(islice(rows, TOGETHER)):
            for ids in self._ids([self._text(row) for row in some]):
                taken = ids[: len(packed) - filled]
                packed[filled : filled + len(taken)] = taken
                filled += len(taken)
            progress.update(task, completed=filled // length)
            if filled == len(packed):
                break
        return torch.from_numpy(packed[: filled // length * length]).view(-1, length)

    def _ids(self, texts: list[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of texts; a text that a chat template laid out has its special tokens already."""
        plain, laid_out = ([text for text, chat in texts if chat == kind] for kind in (False, True))
        tokenised = []
        for some, special in ((plain, True), (laid_out, False)):
            if some:
                tokenised += self._tokenizer(some, add_special_tokens=special, verbose=False).input_ids
        end = self._tokenizer.eos_token_id
        documents = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in tokenised]
        if max(map(max, filter(None, documents)), default=0) >= self._vocabulary:
            raise ConversionError(f"The tokenizer gives ids for {self.origin} that are beyond the model's vocabulary.")
        return documents

    def _text(self, row: Any) -> tuple[str, bool]:
        """A row's text, and whether a chat template laid it out."""
        text, messages = (row.get(name) if isinstance(row, dict) else None for name in COLUMNS)
        if isinstance(text, str):
            return text, False
        if messages is None:
            raise ConversionError(f"Text {self.origin} has a row with neither text nor messages.")
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=TODAY.strftime), True
        except Exception as error:  # the template is a program, so it may fail in any way
            reason = str(error).strip().split("\n")[0]
            raise ConversionError(
                f"The source's chat template cannot lay out the messages of {self.origin}: {reason}"
            ) from error

    def _rows(self) -> Iterator[Any]:
        if not self.origin.startswith(HUB) and Path(self.origin).suffix == JSON_LINES:
            return _json_lines(Path(self.origin))
        return _data_set(self.origin)


def _json_lines(path: Path) -> Iterator[Any]:
    # Not through `datasets`, because that wants the same fields in all rows.
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ConversionError(f"Line {number} of text {path} is not JSON: {error}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"Text {path} cannot be read: {error}") from error


def _data_set(origin: str) -> Iterator[Any]:
    require("datasets", f"Text {origin}", "run pip install datasets, or give a .jsonl or text file")
    from datasets import load_dataset

    name, *more = origin.removeprefix(HUB).split(":")
    config, split, column = [*more, "", "", ""][:3]
    try:
        if origin.startswith(HUB):
            rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        else:
            rows = load_dataset("parquet", data_files=origin, split="train", streaming=True)
        for row in rows:
            yield {"text": row.get(column)} if column else row
    except Exception as error:  # the hub, the network or the files may fail in any way
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(f"Text {origin} cannot be read: {reason}") from error


def _shuffled(rows: Iterable[Any], seed: int) -> Iterator[Any]:
    """The rows in random order, as far as a buffer reaches."""
    generator, rows = random.Random(seed), iter(rows)
    buffer = list(islice(rows, SHUFFLED))
    for row in rows:
        index = generator.randrange(len(buffer))
        yield buffer[index]
        buffer[index] = row
    generator.shuffle(buffer)
    yield from buffer
