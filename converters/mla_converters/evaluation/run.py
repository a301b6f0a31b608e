"""The evaluation, start to end. :func:`evaluate` is the Python API behind ``vllm-mla eval``."""

import hashlib
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from mla_converters.checkpoints.models import Model, find_model, find_models
from mla_converters.errors import ConversionError
from mla_converters.evaluation.hf_engine import hf_scores
from mla_converters.evaluation.scores import TokenScores, comparison, measures
from mla_converters.evaluation.vllm_engine import vllm_scores
from mla_converters.options import DTYPES
from mla_converters.support.memory import peak_rss_bytes
from mla_converters.support.packages import require
from mla_converters.text.read import Text, TextProtocol, read_text
from mla_converters.text.scoring import DEFAULTS, Windows, shared_windows

LARGEST_LOSS = math.log(sys.float_info.max)  # whose perplexity is a number; NaN is not below it


class Engine(StrEnum):
    """What runs the models."""

    HF = "hf"
    VLLM = "vllm"


@dataclass(frozen=True)
class EvalOptions:
    """What an evaluation is asked to do; the defaults are those of the command line.

    Attributes:
        text: UTF-8 text file to score; this or ``dataset``.
        dataset: ``ID[:CONFIG[:SPLIT[:COLUMN]]]`` on the hub.
        protocol: how text becomes windows.
        windows: how many windows; None for the protocol's number.
        length: tokens in a window; None for the protocol's.
        engine: what runs the models.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: where transformers runs the models; None for the CPU, or with vLLM, which chooses itself.
        trust_remote_code: whether code that models bring may run.
    """

    text: Path | None = None
    dataset: str | None = None
    protocol: TextProtocol = TextProtocol.STREAM
    windows: int | None = None
    length: int | None = None
    engine: Engine = Engine.HF
    dtype: str = "float32"
    device: str | None = None
    trust_remote_code: bool = False


def evaluate(
    names: list[str], options: EvalOptions, *, reference: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Score models on the same windows of tokens.

    Args:
        names: folders, hub ids or ``.gguf`` files; converted checkpoints or any causal model.
        options: text, protocol, engine.
        reference: model to compare all others with; usually the source of the conversions.
        quiet: no progress bar.

    Returns:
        The report: ``text``, ``reference`` and ``models`` with their measures, versions, seconds, peak memory.
        A measure that the engine or the tokenizer cannot give is None.

    Raises:
        ConversionError: the input cannot be evaluated.
    """
    started = time.monotonic()
    _check_options(options)
    with ExitStack() as stack:
        models = find_models(names, stack, options.trust_remote_code)
        beside = None if reference is None else find_model(reference, stack, options.trust_remote_code)
        if beside is not None:
            _check_vocabularies(models, beside)
        text = read_text(options.text, options.dataset, options.protocol)
        windows = _windows(text, [beside, *models] if beside else models, options)
        progress = stack.enter_context(Progress(console=Console(stderr=True), disable=quiet))
        task = progress.add_task("Scoring", total=len(models) * len(windows.ids))
        scores = _run(models, beside, windows.ids, options, lambda done: progress.advance(task, done))
        rows, reference_row = _rows(models, beside, scores, windows.bytes)
    return {
        "text": _describe(text, windows, options.protocol),
        "engine": str(options.engine),
        "dtype": options.dtype,
        "device": None if options.engine == Engine.VLLM else options.device or "cpu",
        "reference": reference_row,
        "models": rows,
        "versions": _versions(options.engine),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def compare(model: Model, reference: Model | None, ids: torch.Tensor) -> dict[str, Any]:
    """Score one model on ids, in float32 on the CPU.

    Args:
        model: to score.
        reference: what to compare it with, or None.
        ids: ``[windows, length]`` int64, of both vocabularies.

    Returns:
        The model's part of the report of :func:`evaluate`.

    Raises:
        ConversionError: the models cannot be loaded, or have vocabularies of different sizes.
    """
    if reference is not None:
        _check_vocabularies([model], reference)
    scores = hf_scores([model], reference, ids, torch.float32, "cpu", lambda _: None)
    ((row,), _) = _rows([model], reference, scores, None)
    return row


def _check_options(options: EvalOptions) -> None:
    """What can be refused before anything is loaded."""
    if options.dtype not in DTYPES:
        raise ConversionError(f"--dtype is {options.dtype!r}; choose one of {', '.join(DTYPES)}.")
    if options.engine == Engine.VLLM:
        if options.device is not None:
            raise ConversionError("--device is for --engine hf; vLLM runs where it was built for: leave it out.")
        require("vllm", "--engine vllm", "install vLLM (extra cuda or cpu of this package), or use --engine hf")
        return
    try:
        torch.empty(0, device=options.device or "cpu")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ConversionError(f"--device is {options.device!r}, which this torch cannot use: {reason}") from error


def _check_vocabularies(models: list[Model], reference: Model) -> None:
    for model in models:
        if model.vocab_size != reference.vocab_size:
            raise ConversionError(
                f"{model.name} has a vocabulary of {model.vocab_size} tokens and the reference {reference.name} one of "
                f"{reference.vocab_size}: give the model's own source as --reference, or leave it out."
            )


def _windows(text: Text, models: list[Model], options: EvalOptions) -> Windows:
    count, length = DEFAULTS[options.protocol]
    if options.windows is not None:
        count = options.windows
    return shared_windows(text, models, count, length if options.length is None else options.length)


def _run(
    models: list[Model],
    reference: Model | None,
    ids: torch.Tensor,
    options: EvalOptions,
    advance: Callable[[int], None],
) -> Iterator[tuple[TokenScores, TokenScores | None]]:
    if options.engine == Engine.VLLM:
        return vllm_scores(models, reference, ids, options.dtype, advance)
    return hf_scores(models, reference, ids, DTYPES[options.dtype], options.device or "cpu", advance)


def _rows(
    models: list[Model],
    reference: Model | None,
    scores: Iterator[tuple[TokenScores, TokenScores | None]],
    scored_bytes: int | None,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The models' part of the report, and the reference's."""
    rows, reference_row = [], None
    for model, (own, theirs) in zip(models, scores, strict=True):
        row = _row(model, own, scored_bytes)
        if reference is not None and theirs is not None:
            row |= comparison(own, theirs)
            reference_row = _row(reference, theirs, scored_bytes)
        rows.append(row)
    return rows, reference_row


def _row(model: Model, scores: TokenScores, scored_bytes: int | None) -> dict[str, Any]:
    if not scores.loss < LARGEST_LOSS:
        raise ConversionError(
            f"{model.name} gives losses that are not numbers: its weights are broken, or overflow in this --dtype."
        )
    size = {"name": model.name, "cached_per_token_and_layer": model.cached_numbers}
    return size | measures(scores, scored_bytes)


def _describe(text: Text, windows: Windows, protocol: TextProtocol) -> dict[str, Any]:
    count, length = windows.ids.shape
    return {
        "name": text.name,
        "sha256": hashlib.sha256(text.content.encode()).hexdigest(),
        "protocol": str(protocol),
        "windows": count,
        "length": length,
        "tokens_scored": count * (length - 1),
        "bytes_scored": windows.bytes,
    }


def _versions(engine: Engine) -> dict[str, str]:
    versions = {
        "vllm-mla-plugin": version("vllm-mla-plugin"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return versions | ({"vllm": version("vllm")} if engine == Engine.VLLM else {})


def _peak_rss_bytes() -> int:
    """Of this process or the largest one that it started."""
    return max(peak_rss_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
