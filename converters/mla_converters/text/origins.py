"""Tokens of texts that are read from files, and of texts that the model writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.options import CHAT, SELF, WINDOW
from mla_converters.text.chat import ChatTemplate, chat_template
from mla_converters.text.documents import Documents, has_documents
from mla_converters.text.sampling import LENGTH, sampled_texts

Text: TypeAlias = torch.Tensor | Documents | ChatTemplate | None
"""Token ids ``[tokens]`` of a file; or documents; or the template of conversations; or None for text that the model
writes freely."""


def read_texts(source: Source, origins: Sequence[str]) -> list[Text]:
    """Read each origin, so that errors in files and templates come before the model samples any text.

    Raises:
        ConversionError: a text cannot be read or is too short, or the model has no chat template.
    """
    return [_read_text(source, origin) for origin in origins]


def _read_text(source: Source, origin: str) -> Text:
    if origin == CHAT:
        return chat_template(source.tokenizer, LENGTH)
    if has_documents(origin):
        return Documents(origin, source.tokenizer, source.config.vocab_size)
    return None if origin == SELF else _token_ids(source, Path(origin))


def _token_ids(source: Source, path: Path) -> torch.Tensor:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"Text {path} cannot be read: {error}") from error
    if not text.strip():
        raise ConversionError(f"Text {path} is empty.")
    ids = source.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    long_enough(ids, str(path))
    if int(ids.max()) >= source.config.vocab_size:
        raise ConversionError(f"The tokenizer in {source.name} has ids beyond the model's vocabulary.")
    return ids


def long_enough(ids: torch.Tensor, origin: str) -> torch.Tensor:
    """The token ids ``[tokens]`` of a text, if a window can be cut out of them.

    Raises:
        ConversionError: the text is too short.
    """
    if len(ids) <= WINDOW:
        raise ConversionError(
            f"Text {origin} is too short: it has {len(ids)} tokens, and more than {WINDOW} are needed."
        )
    return ids


def random_tokens(source: Source, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Token ids of this shape, drawn with equal chances from the tokenizer's ids that are not special.

    Raises:
        ConversionError: all ids are special.
    """
    allowed = torch.ones(source.config.vocab_size)
    allowed[len(source.tokenizer) :] = 0  # these rows of the embedding are only padding
    allowed[_special_ids(source)] = 0
    if not allowed.any():
        raise ConversionError(f"The tokenizer in {source.name} has no tokens but special ones: it is broken.")
    return torch.multinomial(allowed, shape[0] * shape[1], replacement=True, generator=generator).view(shape)


def _special_ids(source: Source) -> torch.Tensor:
    special = [i for i in source.tokenizer.all_special_ids if i < source.config.vocab_size]
    return torch.tensor(special, dtype=torch.long)


def written_windows(
    source: Source,
    template: ChatTemplate | None,
    count: int,
    length: int,
    more: int,
    generator: torch.Generator,
    progress: Progress,
    device: str,
    written: int = LENGTH,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of text that the model writes.

    Args:
        source: the model.
        template: of conversations; None for text that the model writes freely.
        count: windows.
        length: tokens in a window.
        more: further texts.
        generator: decides what is sampled.
        progress: shows the progress.
        device: where the model writes.
        written: tokens of a text, if a window has room for more than one.

    Returns:
        The windows ``[count, length]``, each filled with texts, and the further texts ``[more, tokens]``.

    Raises:
        ConversionError: the tokenizer has special tokens only, or the model's logits are not numbers.
    """
    per_window = max(1, length // written)
    number = count * per_window + more
    if template:
        first, never = torch.full((number,), template.opening[0]), torch.empty(0, dtype=torch.long)
    else:
        first = random_tokens(source, (1, number), generator)[0]
        never = _special_ids(source)  # otherwise padding after an end of text would be part of the calibration
    texts = sampled_texts(source, first, never, -(-length // per_window), generator, progress, device, template)
    windows, others = texts[: len(texts) - more], texts[len(texts) - more :]
    return windows.reshape(count, -1)[:, :length], others
