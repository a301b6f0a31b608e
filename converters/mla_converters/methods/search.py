"""Comparison of settings that hold for the whole model, by the errors of its layers' attention."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.resume.layer_pass import Record
from mla_converters.streaming.layers import SourceLayer, embed

LAYERS = 8  # on which candidates are compared, because comparing them on all takes three times as long
Candidate = TypeVar("Candidate")


def sampled_layers(source: Source) -> range:
    """At most :data:`LAYERS` layers of a model, evenly spread over it."""
    count = source.config.num_hidden_layers
    step = -(-count // LAYERS)
    return range((count - 1) % step // 2, count, step)


def search(
    source: Source,
    windows: torch.Tensor,
    candidates: Sequence[Candidate],
    layer_errors: Callable[[SourceLayer, torch.Tensor], list[float]],
    device: str,
    progress: Progress,
    description: str,
    record: Record,
    layers: range,
) -> dict[Candidate, float]:
    """The error of each candidate, as the mean over some layers.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` token ids.
        candidates: the settings to compare.
        layer_errors: computes the relative squared error of each candidate from a layer and its inputs
            ``[windows, tokens, D]``.
        device: the device on which layers run.
        progress, description: the progress display, and the name of this task in it.
        record: keeps the state of the search, so that an interrupted run can go on.
        layers: numbers of the layers on which candidates are compared, see :func:`sampled_layers`.
    """
    streams = record.begin(
        lambda: {"hidden": embed(source, windows), "errors": torch.zeros(len(candidates), dtype=torch.float64)}
    )
    for layer in record.layers(source, device, progress, description):
        if layer.index in layers:
            errors = torch.tensor(layer_errors(layer, streams["hidden"]), dtype=torch.float64)
            streams["errors"] += errors / len(layers)
        if layer.index < layers[-1]:
            layer.advance(streams["hidden"], layer.attend)
    return dict(zip(candidates, streams["errors"].tolist(), strict=True))
