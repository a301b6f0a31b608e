"""Choosing one setting for the whole model by the error of every layer's attention."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from rich.progress import Progress

from mla_converters.layers import SourceLayer, embed, source_layers
from mla_converters.source import Source

Candidate = TypeVar("Candidate")


def search(
    source: Source,
    windows: torch.Tensor,
    candidates: Sequence[Candidate],
    layer_errors: Callable[[SourceLayer, torch.Tensor], list[float]],
    device: str,
    progress: Progress,
    description: str,
) -> tuple[Candidate, dict[Candidate, float]]:
    """The candidate with the smallest error, summed over layers.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` token ids.
        candidates: what to choose from.
        layer_errors: from a layer and its inputs ``[windows, tokens, D]`` to each candidate's relative squared error.
        device: where layers run.
        progress, description: for the bar.

    Returns:
        The winner, and every candidate's mean error.
    """
    errors = dict.fromkeys(candidates, 0.0)
    count = source.config.num_hidden_layers
    hidden = embed(source, windows)
    for layer in progress.track(source_layers(source, device), total=count, description=description):
        for candidate, error in zip(candidates, layer_errors(layer, hidden), strict=True):
            errors[candidate] += error / count
        layer.advance(hidden, layer.attend)
    return min(errors, key=errors.__getitem__), errors
