"""The search for a packed cache of a given size: how wide the rotary key is, and how many bits each component has.

The wider the rotary key, the less of RoPE is lost, and the fewer bits are left for each number. Three regimes meet
here: above about 28% of the source's 16-bit bytes, keeping all of RoPE is best; below, some of the rotation is worth
less than the bits that it takes; and far below, most of it.
"""

from collections.abc import Callable, Sequence

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
from mla_converters.methods.attention_aware.noise import costs
from mla_converters.methods.layer_conversion import map_errors
from mla_converters.methods.search import sampled_layers, search
from mla_converters.resume.layer_pass import Streams
from mla_converters.resume.work_folder import Work
from mla_converters.streaming.layers import SourceLayer, embed
from mla_converters.text.calibration import Calibration
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.layouts import WIDEST_PACKED_LATENT

LAYERS = 8  # layers that are searched, evenly spread over the model
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
    windows, weighing = calibration.some(ATTENTION_WINDOWS).windows, first_weighing(settings.without)
    formats = _promising(source, windows, ropes, format_for, settings, device, progress, work)
    if len(formats) < 2:
        return dict.fromkeys(formats, 0.0)

    def errors(layer: SourceLayer, hidden: torch.Tensor) -> list[float]:
        model = layer_model(layer, hidden[:-1], hidden[-1:], settings.without)
        packed = ((layer_map(layer, model, CacheBudget(*f.sizes), weighing, packed=True), f) for f in formats)
        return map_errors(layer, hidden[:ERROR_WINDOWS], packed)

    layers = sampled_layers(source, LAYERS)
    return search(
        source, windows, formats, errors, device, progress, "Comparing formats", work.record("formats"), layers
    )


def _promising(
    source: Source,
    windows: torch.Tensor,
    ropes: Sequence[int],
    format_for: FormatFor,
    settings: Settings,
    device: str,
    progress: Progress,
    work: Work,
) -> list[CacheFormat]:
    """The :data:`MEASURED` formats with the least predicted error, best first.

    The error is the one by lost rotations, measured with nothing else lost, and the predicted one by rounding.
    """
    cached, weighing = 2 * source.config.num_key_value_heads * source.head_dim, first_weighing(settings.without)
    widest = {rope: min(cached - rope, WIDEST_PACKED_LATENT) for rope in ropes}
    layers = sampled_layers(source, LAYERS)

    def start() -> Streams:
        zeros = {
            f"{name} {rope}": torch.zeros(size, dtype=torch.float64)
            for rope in ropes
            for name, size in (("latent", widest[rope]), ("pairs", rope // 2), ("lost", 1))
        }
        return zeros | {"hidden": embed(source, windows)}

    record = work.record("profile")
    streams = record.begin(start)
    hidden = streams["hidden"]
    for layer in record.layers(source, device, progress, "Searching the format"):
        if layer.index in layers:
            model = layer_model(layer, hidden[:-1], hidden[-1:], settings.without)
            size = _output_size(layer, hidden[:ERROR_WINDOWS])
            for rope in ropes:
                maps = layer_map(layer, model, CacheBudget(widest[rope], rope), weighing)
                found = costs(maps, model)
                streams[f"latent {rope}"] += found.latent.sort(descending=True).values.cpu() / size / len(layers)
                streams[f"pairs {rope}"] += found.rope.sort(descending=True).values.cpu() / size / len(layers)
                (error,) = map_errors(layer, hidden[:ERROR_WINDOWS], [(maps, None)])
                streams[f"lost {rope}"] += error / len(layers)
        layer.advance(hidden, layer.attend)
    predicted: dict[CacheFormat, float] = {}
    for rope in ropes:
        suited = format_for(rope, streams[f"latent {rope}"].tolist(), streams[f"pairs {rope}"].tolist())
        if suited is not None:
            predicted[suited[0]] = streams[f"lost {rope}"].item() + ROUNDING * suited[1]
    return sorted(predicted, key=lambda format: predicted[format])[:MEASURED]


def _output_size(layer: SourceLayer, hidden: torch.Tensor) -> float:
    """Mean squared size of the source's attention output, over the inputs ``[windows, tokens, D]``."""
    with torch.inference_mode():
        size = layer.attend(layer.normed(hidden)).float().square().sum(-1).mean().item()
    return max(size, torch.finfo(torch.float32).tiny)
