"""The search for a packed cache of a given size: how wide the rotary key is, and how many bits each component has.

The wider the rotary key, the less of RoPE is lost, and the fewer bits are left for each number. Three regimes meet
here: above about 28% of the source's 16-bit bytes, keeping all of RoPE is best; below, some of the rotation is worth
less than the bits that it takes; and far below, most of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.attention_aware.layer import (
    ATTENTION_WINDOWS,
    ERROR_WINDOWS,
    Settings,
    first_weighing,
    layer_map,
    layer_model,
)
from mla_converters.methods.attention_aware.map import ScoreModel
from mla_converters.methods.attention_aware.noise import costs
from mla_converters.methods.layer_conversion import map_errors
from mla_converters.methods.search import sampled_layers
from mla_converters.resume.layer_pass import Record, Streams
from mla_converters.resume.work_folder import Work
from mla_converters.streaming.layers import SourceLayer, embed
from mla_converters.text.calibration import Calibration
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.layouts import WIDEST_PACKED_LATENT

MEASURED = 4  # formats that promise the least error and whose error is measured
ROUNDING = 0.35  # error of the attention outputs by rounding, relative to its predicted cost; measured on SmolLM2

FormatFor = Callable[[int, Sequence[float], Sequence[float]], tuple[CacheFormat, float] | None]
"""The best format for a width of the rotary key, and the predicted cost of rounding; None if none fits.

It is given the costs of the latent's components and of the rotary key's pairs, see
:func:`~mla_converters.methods.attention_aware.noise.costs`.
"""


def search_format(
    source: Source,
    calibration: Calibration,
    ropes: Sequence[int],
    format_for: FormatFor,
    settings: Settings,
    device: str,
    progress: Progress,
    work: Work,
) -> dict[CacheFormat, float]:
    """The mean error of the attention outputs for each of the formats that promise the least.

    Args:
        source: the model.
        calibration: text and random tokens.
        ropes: widths of the rotary key to compare.
        format_for: see :data:`FormatFor`.
        settings: the method's settings; its format has no meaning here.
        device: the device on which layers run.
        progress: shows the progress.
        work: keeps the state of the search, so that an interrupted run can go on.

    Returns:
        Nothing if no format fits.
    """
    windows = calibration.some(ATTENTION_WINDOWS).windows
    profile = _profile(source, windows, ropes, settings, device, progress, work.record("profile"))
    formats = _promising(profile, ropes, format_for)
    if len(formats) < 2:
        return dict.fromkeys(formats, 0.0)
    layers, weighing = sampled_layers(source), first_weighing(settings.without)
    record = work.record("formats")
    errors = record.begin(lambda: {"errors": torch.zeros(len(formats), dtype=torch.float64)})["errors"]
    for layer in record.layers(source, device, progress, "Comparing formats"):
        if layer.index in layers:
            model, hidden = _kept(profile, layer.index, device)
            packed = ((layer_map(layer, model, CacheBudget(*f.sizes), weighing, packed=True), f) for f in formats)
            errors += torch.tensor(map_errors(layer, hidden, packed), dtype=torch.float64) / len(layers)
    return dict(zip(formats, errors.tolist(), strict=True))


def _profile(
    source: Source,
    windows: torch.Tensor,
    ropes: Sequence[int],
    settings: Settings,
    device: str,
    progress: Progress,
    record: Record,
) -> Streams:
    """What a pass over the layers says of each width of the rotary key.

    Returns:
        For each width, means over the sampled layers: ``latent`` and ``pairs``, the costs of the components, largest
        first, and ``lost``, the error by lost rotations with nothing else lost. For each sampled layer, its statistics
        and the input on which formats are compared, so that this needs no second pass.
    """
    cached, weighing = 2 * source.config.num_key_value_heads * source.head_dim, first_weighing(settings.without)
    widest = {rope: min(cached - rope, WIDEST_PACKED_LATENT) for rope in ropes}
    layers = sampled_layers(source)

    def start() -> Streams:
        zeros = {
            f"{name} {rope}": torch.zeros(size, dtype=torch.float64)
            for rope in ropes
            for name, size in (("latent", widest[rope]), ("pairs", rope // 2), ("lost", 1))
        }
        return zeros | {"hidden": embed(source, windows)}

    streams = record.begin(start)
    hidden = streams["hidden"]
    for layer in record.layers(source, device, progress, "Searching the format"):
        if layer.index in layers:
            model = layer_model(layer, hidden[:-1], hidden[-1:], settings.without)
            compared = hidden[:ERROR_WINDOWS]
            _keep(streams, layer.index, model, compared)
            size = _output_size(layer, compared)
            for rope in ropes:
                maps = layer_map(layer, model, CacheBudget(widest[rope], rope), weighing)
                found = costs(maps, model)
                streams[f"latent {rope}"] += found.latent.sort(descending=True).values.cpu() / size / len(layers)
                streams[f"pairs {rope}"] += found.rope.sort(descending=True).values.cpu() / size / len(layers)
                (error,) = map_errors(layer, compared, [(maps, None)])
                streams[f"lost {rope}"] += error / len(layers)
        if layer.index < layers[-1]:
            layer.advance(hidden, layer.attend)
    return streams


def _keep(streams: Streams, index: int, model: ScoreModel, hidden: torch.Tensor) -> None:
    """Keep a layer's statistics, complex ones as real pairs, because a record cannot hold them otherwise."""
    streams[f"input {index}"] = hidden.clone()
    for field in fields(model):
        tensor = getattr(model, field.name).cpu()
        streams[f"{field.name} {index}"] = torch.view_as_real(tensor).clone() if tensor.is_complex() else tensor


def _kept(streams: Streams, index: int, device: str) -> tuple[ScoreModel, torch.Tensor]:
    """A layer's statistics on the device, and its input ``[windows, tokens, D]``."""
    tensors = {field.name: streams[f"{field.name} {index}"].to(device) for field in fields(ScoreModel)}
    tensors["phase"] = torch.view_as_complex(tensors["phase"])
    return ScoreModel(**tensors), streams[f"input {index}"]


def _promising(profile: Streams, ropes: Sequence[int], format_for: FormatFor) -> list[CacheFormat]:
    """The :data:`MEASURED` formats with the least predicted error, by lost rotations and by rounding, best first."""
    predicted: dict[CacheFormat, float] = {}
    for rope in ropes:
        suited = format_for(rope, profile[f"latent {rope}"].tolist(), profile[f"pairs {rope}"].tolist())
        if suited is not None:
            predicted[suited[0]] = profile[f"lost {rope}"].item() + ROUNDING * suited[1]
    return sorted(predicted, key=lambda format: predicted[format])[:MEASURED]


def _output_size(layer: SourceLayer, hidden: torch.Tensor) -> float:
    """Mean squared size of the source's attention output, over the inputs ``[windows, tokens, D]``."""
    with torch.inference_mode():
        size = layer.attend(layer.normed(hidden)).float().square().sum(-1).mean().item()
    return max(size, torch.finfo(torch.float32).tiny)
