"""Scores from the vLLM engine, which will serve the model."""

from collections.abc import Callable, Iterator

import torch

from mla_converters.checkpoints.models import Model
from mla_converters.engines.process import Engine
from mla_converters.evaluation.scores import TokenScores

ENVIRONMENT = {
    # A window may fill the whole context, but vLLM needs room for the one token that it generates. That token is
    # never fed back, so no position beyond the context is computed.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    # GiB. On a CPU, vLLM would take most of the memory for its cache, but one window at a time needs little.
    "VLLM_CPU_KVCACHE_SPACE": "4",
    # The engine's process needs no process beside it, which would only cost start-up time and memory.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def vllm_scores(
    models: list[Model],
    reference: Model | None,
    ids: torch.Tensor,
    dtype: str,
    advance: Callable[[int], None],
) -> Iterator[tuple[TokenScores, TokenScores | None]]:
    """Score one model after the other. Each model gets its own engine.

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
    arguments = {
        "model": model.path,
        "dtype": dtype,
        "max_model_len": ids.shape[1] + 1,  # vLLM always generates one token
        "max_num_seqs": 1,
        "enforce_eager": True,  # compiling takes longer than it saves in so short a run
        "enable_prefix_caching": False,
    }
    advice = "try --engine hf, or shorter windows with --length"
    with Engine(f"score {model.name} in {dtype}", arguments, advice=advice, environment=ENVIRONMENT) as engine:
        scores = engine.score(ids.tolist())
    return TokenScores(torch.tensor(scores["losses"]), torch.tensor(scores["top1"]))
