"""Scores from the vLLM engine, which computes them as it does for a served model."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mla_converters.checkpoints.models import Model
from mla_converters.errors import ConversionError
from mla_converters.evaluation.scores import TokenScores

WORKER = "mla_converters.engines.scoring_worker"


def vllm_scores(
    models: list[Model],
    reference: Model | None,
    ids: torch.Tensor,
    dtype: str,
    advance: Callable[[int], None],
) -> Iterator[tuple[TokenScores, TokenScores | None]]:
    """Score one model after the other. Each model gets its own engine in its own process.

    The process is needed because an engine never frees all of its memory, and because it prints to the standard output.
    There is no KL divergence, because the engine gives the likeliest tokens, not all logits.

    Args:
        models: the models to score, in order.
        reference: the model to compare with, or None; it is scored once.
        ids: ``[windows, length]`` int64.
        dtype: dtype of weights and cache, as vLLM calls it.
        advance: called with the number of windows that were just scored.

    Yields:
        For each model, its scores and those of the reference.

    Raises:
        ConversionError: an engine fails.
    """
    reference_scores = None if reference is None else _score(reference, ids, dtype)
    for model in models:
        scores = _score(model, ids, dtype)
        advance(len(ids))
        yield scores, reference_scores


def _score(model: Model, ids: torch.Tensor, dtype: str) -> TokenScores:
    job = {"model": model.path, "dtype": dtype, "windows": ids.tolist()}
    environment = {
        # A window may fill the whole context, but vLLM also needs room for the one token that it generates. That
        # token is never fed back, so no position beyond the context is computed.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        # On a CPU, vLLM would take most of the memory for its cache, but one window at a time needs little.
        "VLLM_CPU_KVCACHE_SPACE": "4",
        # The worker is already a separate process, so two more would only cost start-up time and memory.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **os.environ,
    }
    with tempfile.TemporaryDirectory(prefix="vllm-mla-eval-") as folder:
        answer = Path(folder, "scores.json")
        process = subprocess.run(
            [sys.executable, "-m", WORKER, str(answer)],
            input=json.dumps(job),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            check=False,
        )
        # The answer decides, not the exit code, because an engine can crash in its shutdown, after all is computed.
        if not answer.exists():
            raise ConversionError(
                f"vLLM died of signal or exit code {process.returncode} while it scored {model.name}: "
                "it may have run out of memory; try --engine hf, or shorter windows with --length."
            )
        scores = json.loads(answer.read_text())
    if "error" in scores:
        raise ConversionError(f"vLLM cannot score {model.name} in {dtype}: {scores['error']}")
    return TokenScores(torch.tensor(scores["losses"]), torch.tensor(scores["top1"]))
