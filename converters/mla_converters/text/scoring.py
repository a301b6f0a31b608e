"""The tokens to score, cut into windows that are the same for every model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mla_converters.checkpoints.models import Model
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.errors import ConversionError
from mla_converters.options import TextProtocol
from mla_converters.text.read import Text

DEFAULTS: dict[TextProtocol, tuple[int | None, int]] = {
    TextProtocol.STREAM: (8, 1024),
    TextProtocol.WIKITEXT2: (None, 2048),
}
"""Per protocol: the number of windows (None: as many as the text fills), and the tokens in each."""
SHOWN = 6  # ids of a difference that are named


@dataclass(frozen=True)
class Windows:
    """Consecutive windows from the beginning of a text.

    Attributes:
        ids: token ids ``[windows, length]``, int64. All but the first of each window are scored.
        bytes: UTF-8 bytes of the text of the scored tokens; None if the tokenizer cannot tell.
    """

    ids: torch.Tensor
    bytes: int | None


def shared_windows(text: Text, models: list[Model], count: int | None, length: int) -> Windows:
    """Tokenise ``text`` and cut it into windows; the tokenizers of all models must give the same tokens.

    Args:
        text: the text to score.
        models: all models, including the reference.
        count: number of windows; None for as many as the text fills.
        length: tokens in a window.

    Raises:
        ConversionError: a number is out of range, the text is too short, tokenizers disagree, or a token id is beyond a
            model's vocabulary.
    """
    _check_numbers(models, count, length)
    first, *others = models
    windows = _cut(text, load_tokenizer(first.path, first.trust_remote_code), count, length)
    for model in others:
        tokenizer = load_tokenizer(model.path, model.trust_remote_code)
        ids = _cut(text, tokenizer, count, length).ids
        if not torch.equal(ids, windows.ids):
            raise ConversionError(
                f"{model.name} and {first.name} tokenise the text differently ({_first_difference(ids, windows.ids)}), "
                "so that their numbers could not be compared: evaluate models with the same tokenizer together."
            )
    for model in models:
        if int(windows.ids.max()) >= model.vocab_size:
            raise ConversionError(
                f"The tokenizer gives id {int(windows.ids.max())}, beyond the vocabulary of {model.name} "
                f"({model.vocab_size} tokens): evaluate models with the same tokenizer together."
            )
    return windows


def _first_difference(one: torch.Tensor, other: torch.Tensor) -> str:
    if one.shape != other.shape:
        return f"{one.numel()} tokens, and {other.numel()}"
    place = int((one != other).flatten().nonzero()[0])
    ids, others = (each.flatten()[place : place + SHOWN].tolist() for each in (one, other))
    return f"the tokens from number {place} on are {ids}, and {others}"


def _check_numbers(models: list[Model], count: int | None, length: int) -> None:
    if count is not None and count < 1:
        raise ConversionError(f"--windows is {count}, but must be at least 1.")
    if length < 2:
        raise ConversionError(f"--length is {length}, but must be at least 2: the first token is not scored.")
    for model in models:
        if model.context is not None and length > model.context:
            raise ConversionError(
                f"Windows of {length} tokens are longer than the context of {model.name} ({model.context} tokens): "
                f"give --length {model.context} or less."
            )


def _cut(text: Text, tokenizer: PreTrainedTokenizerBase, count: int | None, length: int) -> Windows:
    encoded = tokenizer(text.content, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = torch.tensor(encoded["input_ids"])
    wanted = count or max(1, len(ids) // length)
    if len(ids) < wanted * length:
        raise ConversionError(
            f"The text {text.name} is too short: it has {len(ids)} tokens, but --windows {wanted} of --length {length} "
            f"need {wanted * length}."
        )
    windows = ids[: wanted * length].view(wanted, length)
    if not tokenizer.is_fast:
        return Windows(windows, None)
    spans = torch.tensor(encoded["offset_mapping"])[: wanted * length].view(wanted, length, 2)[:, 1:]
    # The maximum is used instead of the last end, because a special token at the end has the span (0, 0).
    pieces = zip(spans[:, 0, 0].tolist(), spans[:, :, 1].amax(1).tolist(), strict=True)
    return Windows(windows, sum(len(text.content[start:end].encode()) for start, end in pieces))
