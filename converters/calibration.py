"""Calibration tokens: cut from a text file, sampled from the model itself, or random."""

from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from mla_converters.errors import ConversionError
from mla_converters.layers import native_bfloat16
from mla_converters.source import Source

WINDOW = 512
"""Tokens in the shortest calibration window."""


def calibration_windows(
    source: Source, origin: str, tokens: int, seed: int, progress: Progress, length: int = WINDOW
) -> torch.Tensor:
    """Token ids to calibrate on.

    Args:
        source: the model.
        origin: a UTF-8 text file, or ``self``.
        tokens: how many tokens, rounded down to whole windows.
        seed: where to cut, or what to sample.
        length: tokens in a window; less if there are not as many, down to ``WINDOW``.

    Returns:
        ``[windows, length]`` int64.

    Raises:
        ConversionError: the text cannot be read or is too short.
    """
    if tokens < WINDOW:
        raise ConversionError(f"--calibration-tokens is {tokens}, but must be at least {WINDOW} (one window).")
    generator = torch.Generator().manual_seed(seed)
    length = max(WINDOW, min(length, tokens, source.config.max_position_embeddings))
    if origin == "self":
        return _sample(source, tokens // length, length, generator, progress)
    return _cut(source, Path(origin), tokens, length, generator)


def _cut(source: Source, path: Path, tokens: int, length: int, generator: torch.Generator) -> torch.Tensor:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"Calibration text {path} cannot be read: {error}") from error
    if not text.strip():
        raise ConversionError(f"Calibration text {path} is empty.")
    ids = source.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) <= WINDOW:
        raise ConversionError(
            f"Calibration text {path} is too short: {len(ids)} tokens, where more than {WINDOW} are needed."
        )
    if int(ids.max()) >= source.config.vocab_size:
        raise ConversionError(f"The tokenizer in {source.folder} has ids beyond the model's vocabulary.")
    if len(ids) <= length:
        length = WINDOW
    starts = torch.randint(0, len(ids) - length, (tokens // length,), generator=generator)
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
        raise ConversionError(f"The tokenizer in {source.folder} has no tokens but special ones: it is broken.")
    return torch.multinomial(allowed, shape[0] * shape[1], replacement=True, generator=generator).view(shape)


def _special_ids(source: Source) -> torch.Tensor:
    special = [i for i in source.tokenizer.all_special_ids if i < source.config.vocab_size]
    return torch.tensor(special, dtype=torch.long)


@torch.inference_mode()
def _sample(source: Source, count: int, length: int, generator: torch.Generator, progress: Progress) -> torch.Tensor:
    """Text of the model's own: a random first token each, then sampled at temperature 1 (as LLM-QAT,
    arXiv 2305.17888, generates its training data)."""
    dtype = torch.bfloat16 if native_bfloat16("cpu") else source.dtype()  # for speed; text is text
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype)
    special = _special_ids(source)
    ids = random_tokens(source, (count, 1), generator)
    windows, cache = [ids], None
    for _ in progress.track(range(length - 1), description="Sampling calibration text"):
        output = model(ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # The end of a text ends nothing here: a window full of padding would calibrate for padding.
        if not torch.isfinite(output.logits[:, -1]).all():
            raise ConversionError(f"The model in {source.folder} gives logits that are not numbers: it is broken.")
        logits = output.logits[:, -1].float().index_fill(1, special, float("-inf"))
        ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        windows.append(ids)
    return torch.cat(windows, dim=1)
