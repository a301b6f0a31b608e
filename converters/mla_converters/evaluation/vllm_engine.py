"""Scores from the vLLM engine: what a served model computes."""

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
    """Score one model after the other, each in an engine and a process of its own.

    An engine never gives back everything it took, and prints to the standard output; its process ends both.
    There is no KL: the engine gives the likeliest tokens, not all logits.

    Args:
        models: to score, in order.
        reference: what to compare with, or None; scored once.
        ids: ``[windows, length]`` int64.
        dtype: of weights and cache, as vLLM calls it.
        advance: called with the number of windows just done.

    Yields:
        For each model its scores, and the reference's.

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
        # A window may fill the whole context, but vLLM wants room for the one token that it generates. That
        # token is never fed back, so no position beyond the context is computed.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        # On a CPU, vLLM would take most of the memory for its cache; a window at a time needs little.
        "VLLM_CPU_KVCACHE_SPACE": "4",
        # The worker is a process of its own already: two more only cost start-up time and memory.
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
        # Judged by its answer: an engine can crash in its shutdown, when everything is computed.
        if not answer.exists():
            raise ConversionError(
                f"vLLM died of signal or exit code {process.returncode} while it scored {model.name}: "
                "it may have run out of memory; try --engine hf, or shorter windows with --length."
            )
        scores = json.loads(answer.read_text())
    if "error" in scores:
        raise ConversionError(f"vLLM cannot score {model.name} in {dtype}: {scores['error']}")
    return TokenScores(torch.tensor(scores["losses"]), torch.tensor(scores["top1"]))
