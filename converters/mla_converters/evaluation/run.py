"""The evaluation from start to end. :func:`evaluate` is the Python API behind ``vllm-mla eval``."""

import hashlib
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import torch
import transformers
from rich.progress import Progress

from mla_converters.checkpoints.models import Model, find_model, find_models
from mla_converters.errors import ConversionError
from mla_converters.evaluation.hf_engine import hf_scores
from mla_converters.evaluation.scores import TokenScores, comparison, measures
from mla_converters.evaluation.vllm_engine import vllm_scores
from mla_converters.options import Engine, EvalOptions, TextProtocol
from mla_converters.reports.evaluation import AskedTasks, EvaluationReport, ModelScores, ScoredText, TaskScore
from mla_converters.support.devices import usable_device
from mla_converters.support.dtypes import DTYPES
from mla_converters.support.memory import peak_rss_bytes
from mla_converters.support.packages import require
from mla_converters.support.progress import progress_bars
from mla_converters.text.read import Text, read_text
from mla_converters.text.scoring import DEFAULTS, Windows, shared_windows

# The perplexity of a larger loss would overflow. A loss of NaN fails the comparison with this number too.
LARGEST_LOSS = math.log(sys.float_info.max)


def evaluate(names: list[str], options: EvalOptions, *, quiet: bool = False) -> EvaluationReport:
    """Score models on the same windows of tokens, on the same tasks, or on both.

    Args:
        names: folders, hub ids or ``.gguf`` files of converted checkpoints or any causal models.
        options: text, protocol, engine, tasks, reference.
        quiet: whether to show no progress.

    Returns:
        The report. A measure is None if the engine or the tokenizer cannot give it.

    Raises:
        ConversionError: the input cannot be evaluated.
    """
    started = time.monotonic()
    _check_options(options)
    with ExitStack() as stack:
        models = find_models(names, stack, options.trust_remote_code)
        beside = None if options.reference is None else find_model(options.reference, stack, options.trust_remote_code)
        if beside is not None:
            _check_vocabularies(models, beside)
        everyone = [beside, *models] if beside else models
        scored = _scored_text(everyone, options)
        progress = stack.enter_context(progress_bars(quiet))
        tasks = _tasks(models, beside, options, progress)
        rows, reference_row = [_bare(model) for model in models], None if beside is None else _bare(beside)
        if scored is not None:
            ids = scored[1].ids
            bar = progress.add_task("Scoring", total=len(models) * len(ids))
            scores = _run(models, beside, ids, options, lambda done: progress.advance(bar, done))
            rows, reference_row = _rows(models, beside, scores, scored[1].bytes)
        rows, reference_row = _with_tasks(rows, reference_row, tasks)
    return EvaluationReport(
        text=None if scored is None else _describe(*scored, options.protocol),
        tasks=AskedTasks(names=list(options.tasks), limit=options.limit, chat=options.chat) if options.tasks else None,
        engine=None if scored is None else options.engine.value,
        dtype=options.dtype,
        device=None if scored is None or options.engine == Engine.VLLM else options.device or "cpu",
        reference=reference_row,
        models=rows,
        versions=_versions(options),
        seconds=round(time.monotonic() - started, 1),
        peak_rss_bytes=_peak_rss_bytes(),
    )


def compare(model: Model, reference: Model | None, ids: torch.Tensor) -> ModelScores:
    """Score one model on ids, in float32 on the CPU.

    Args:
        model: to score.
        reference: what to compare it with, or None.
        ids: ``[windows, length]`` int64, of both vocabularies.

    Returns:
        The model's scores, as in the report of :func:`evaluate`.

    Raises:
        ConversionError: the models cannot be loaded, or have vocabularies of different sizes.
    """
    if reference is not None:
        _check_vocabularies([model], reference)
    scores = hf_scores([model], reference, ids, torch.float32, "cpu", lambda _: None)
    ((row,), _) = _rows([model], reference, scores, None)
    return row


def _check_options(options: EvalOptions) -> None:
    """Refuse wrong options before anything is loaded."""
    if options.tasks:
        require("vllm", "--tasks", "install vLLM (extra cuda or cpu of this package)")
        for package in ("lm_eval", "datasets"):
            require(package, "--tasks", "run pip install 'vllm-mla-plugin[eval]'")
    if options.engine == Engine.VLLM:
        if options.device is not None:
            raise ConversionError(
                "--device works only with --engine hf, because vLLM runs on the hardware for which it was built: "
                "leave it out."
            )
        require("vllm", "--engine vllm", "install vLLM (extra cuda or cpu of this package), or use --engine hf")
        return
    usable_device(options.device or "cpu")


def _check_vocabularies(models: list[Model], reference: Model) -> None:
    for model in models:
        if model.vocab_size != reference.vocab_size:
            raise ConversionError(
                f"{model.name} has a vocabulary of {model.vocab_size} tokens and the reference {reference.name} one of "
                f"{reference.vocab_size}: give the model's own source as --reference, or leave it out."
            )


def _scored_text(models: list[Model], options: EvalOptions) -> tuple[Text, Windows] | None:
    """The text to score; None if there are only tasks."""
    if options.tasks and options.text is None and options.dataset is None:
        return None
    text = read_text(options.text, options.dataset, options.protocol)
    return text, _windows(text, models, options)


def _tasks(
    models: list[Model], reference: Model | None, options: EvalOptions, progress: Progress
) -> tuple[list[list[TaskScore]], list[TaskScore] | None] | None:
    """The scores on tasks of the models and of the reference; None if there are no tasks."""
    if not options.tasks:
        return None
    # Imported here, not above: only tasks need lm-evaluation-harness.
    from mla_converters.evaluation.tasks.harness import score_tasks

    return score_tasks(models, reference, options, progress)


def _with_tasks(
    rows: list[ModelScores],
    reference: ModelScores | None,
    tasks: tuple[list[list[TaskScore]], list[TaskScore] | None] | None,
) -> tuple[list[ModelScores], ModelScores | None]:
    if tasks is None:
        return rows, reference
    own, theirs = tasks
    rows = [row.model_copy(update={"tasks": scores}) for row, scores in zip(rows, own, strict=True)]
    return rows, None if reference is None else reference.model_copy(update={"tasks": theirs})


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
) -> tuple[list[ModelScores], ModelScores | None]:
    """The rows of the report for the models, and the row for the reference."""
    rows, reference_row = [], None
    for model, (own, theirs) in zip(models, scores, strict=True):
        compared = {} if theirs is None else comparison(own, theirs)
        rows.append(_row(model, own, scored_bytes, compared))
        if reference is not None and theirs is not None:
            reference_row = _row(reference, theirs, scored_bytes, {})
    return rows, reference_row


def _row(model: Model, scores: TokenScores, scored_bytes: int | None, compared: dict[str, Any]) -> ModelScores:
    if not scores.loss < LARGEST_LOSS:
        raise ConversionError(
            f"{model.name} gives losses that are not numbers: its weights are broken, or overflow in this --dtype."
        )
    return _bare(model).model_copy(update=measures(scores, scored_bytes) | compared)


def _bare(model: Model) -> ModelScores:
    return ModelScores(
        name=model.name,
        cached_per_token_and_layer=model.cached_numbers,
        bytes_per_token_and_layer=model.cached_bytes,
    )


def _describe(text: Text, windows: Windows, protocol: TextProtocol) -> ScoredText:
    count, length = windows.ids.shape
    return ScoredText(
        name=text.name,
        sha256=hashlib.sha256(text.content.encode()).hexdigest(),
        protocol=protocol.value,
        windows=count,
        length=length,
        tokens_scored=count * (length - 1),
        bytes_scored=windows.bytes,
    )


def _versions(options: EvalOptions) -> dict[str, str]:
    versions = {
        "vllm-mla-plugin": version("vllm-mla-plugin"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if options.tasks:
        versions["lm-eval"] = version("lm-eval")
    if options.tasks or options.engine == Engine.VLLM:
        versions["vllm"] = version("vllm")
    return versions


def _peak_rss_bytes() -> int:
    """Peak memory of this process, or of the largest process that it started."""
    return max(peak_rss_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
