"""The functions with which a method converts one layer after another, and the measurements of each layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from mla_converters.latent.maps import LatentMap, mla_weights
from mla_converters.latent.module import LatentAttention
from mla_converters.resume.layer_pass import Streams
from mla_converters.streaming.layers import Attention, SourceLayer
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

ERROR_WINDOWS = 1  # windows on which a converted layer's error is measured


@dataclass(frozen=True)
class Measured:
    """Measurements of a converted layer.

    Attributes:
        energy_kept: share of the mean square of keys and values that a linear map could recover from the cache.
        output_error: squared error of the attention's output on calibration text, divided by the squared output of the
            source.
    """

    energy_kept: float
    output_error: float


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer's result.

    Attributes:
        weights: its projections, under their names below ``self_attn.``.
        measured: its measurements; None for a method without calibration.
    """

    weights: dict[str, torch.Tensor]
    measured: Measured | None = None


@dataclass(frozen=True)
class LayerConversion:
    """A method, ready to convert one layer after another.

    Attributes:
        start: makes the streams that pass through the layers: the input of the first layer.
        convert: converts a layer, and replaces the streams by the layer's output in place.
    """

    start: Callable[[], Streams]
    convert: Callable[[SourceLayer, Streams], ConvertedLayer]


def map_errors(
    layer: SourceLayer, hidden: torch.Tensor, candidates: Iterable[tuple[LatentMap, CacheFormat | None]]
) -> list[float]:
    """Relative squared errors of the attention's output, on inputs ``[windows, tokens, D]``.

    Args:
        layer: the source's layer.
        hidden: the inputs.
        candidates: maps, each with the packed format of its cache; None where nothing is rounded.
    """
    error_of = layer.comparison(hidden)
    return [
        error_of(layer.converted(mla_weights(layer.attention_weights, maps), format, hidden))
        for maps, format in candidates
    ]


def measure(
    layer: SourceLayer, hidden: torch.Tensor, maps: LatentMap, moments: torch.Tensor, attention: Attention
) -> Measured:
    """Measure a converted layer.

    Args:
        layer: the source's layer.
        hidden: ``[windows, tokens, D]``, its inputs.
        maps: the layer's map.
        moments: ``[2 * g * d, 2 * g * d]``, second moments of ``[k; v]`` on these inputs.
        attention: the converted attention.
    """
    error = layer.comparison(hidden[:ERROR_WINDOWS])(attention)
    return Measured(energy_kept(maps, moments), error)


MEAN_WINDOWS = 8  # windows on which the mean is measured that packing takes out


def with_mean(
    layer: SourceLayer, weights: dict[str, torch.Tensor], format: CacheFormat | None, hidden: torch.Tensor
) -> tuple[dict[str, torch.Tensor], LatentAttention]:
    """A layer's projections with the mean that its cache format takes out, and the attention that they make.

    Args:
        layer: the source's layer.
        weights: the converted projections.
        format: of the cache; None if it is not packed.
        hidden: ``[windows, tokens, D]``, inputs of the layer.
    """
    attention = layer.converted(weights, format, hidden[:MEAN_WINDOWS])
    mean = {} if attention.cache_mean is None else {"cache_mean": attention.cache_mean.cpu()}
    return weights | mean, attention


def energy_kept(maps: LatentMap, moments: torch.Tensor) -> float:
    """The share of the energy of keys and values that least squares recover from the cached numbers.

    With second moments ``C`` and the map ``A`` to the cached numbers it is ``tr(C Aᵀ (A C Aᵀ)⁺ A C) / tr C``.
    """
    rope = torch.nn.functional.pad(maps.key_to_rope, (0, maps.kv_to_latent.shape[1] - maps.key_to_rope.shape[1]))
    cached = torch.cat((maps.kv_to_latent, rope)).to(moments)
    seen = cached @ moments
    recovered = torch.linalg.pinv(seen @ cached.mT, hermitian=True) @ seen
    energy = moments.trace()
    return ((seen * recovered).sum() / energy).item() if energy else 1.0
