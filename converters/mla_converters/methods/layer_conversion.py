"""What a conversion method is to the loop over layers, and what that loop reports of each layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from mla_converters.latent.maps import LatentMap, mla_weights
from mla_converters.resume.layer_pass import Streams
from mla_converters.streaming.layers import Attention, SourceLayer

ERROR_WINDOWS = 1  # on how many a converted layer's error is measured


@dataclass(frozen=True)
class Measured:
    """What a converted layer keeps.

    Attributes:
        energy_kept: share of the mean square of keys and values that a linear map could recover from what is cached.
        output_error: squared error of the attention's output on calibration text, relative to the source's.
    """

    energy_kept: float
    output_error: float


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer's result.

    Attributes:
        weights: its projections, named as below ``self_attn.``.
        measured: None for a method without calibration.
    """

    weights: dict[str, torch.Tensor]
    measured: Measured | None = None


@dataclass(frozen=True)
class LayerConversion:
    """A method, ready to convert one layer after another.

    Attributes:
        start: makes what passes through the layers, as it enters the first.
        convert: converts a layer and lets the streams pass through it, in place.
    """

    start: Callable[[], Streams]
    convert: Callable[[SourceLayer, Streams], ConvertedLayer]


def map_error(error_of: Callable[[Attention], float], layer: SourceLayer, maps: LatentMap) -> float:
    """What ``error_of`` (:meth:`SourceLayer.comparison`) says of the layer's attention with ``maps``."""
    return error_of(layer.converted(mla_weights(layer.attention_weights, maps)))


def map_errors(layer: SourceLayer, hidden: torch.Tensor, maps: Iterable[LatentMap]) -> list[float]:
    """Relative squared errors of the attention's output with each map, on inputs ``[windows, tokens, D]``."""
    error_of = layer.comparison(hidden)
    return [map_error(error_of, layer, candidate) for candidate in maps]


def measure(
    layer: SourceLayer, hidden: torch.Tensor, maps: LatentMap, moments: torch.Tensor, attention: Attention
) -> Measured:
    """Measure a converted layer.

    Args:
        layer: of the source.
        hidden: ``[windows, tokens, D]``, its inputs.
        maps: the layer's map.
        moments: ``[2 * g * d, 2 * g * d]``, second moments of ``[k; v]`` on these.
        attention: the converted one.
    """
    error = layer.comparison(hidden[:ERROR_WINDOWS])(attention)
    return Measured(energy_kept(maps, moments), error)


def energy_kept(maps: LatentMap, moments: torch.Tensor) -> float:
    """``tr(C Aᵀ (A C Aᵀ)⁺ A C) / tr C`` for second moments ``C`` and the map ``A`` to what is cached: the share that
    least squares recover."""
    rope = torch.nn.functional.pad(maps.key_to_rope, (0, maps.kv_to_latent.shape[1] - maps.key_to_rope.shape[1]))
    cached = torch.cat((maps.kv_to_latent, rope)).to(moments)
    seen = cached @ moments
    recovered = torch.linalg.pinv(seen @ cached.mT, hermitian=True) @ seen
    energy = moments.trace()
    return ((seen * recovered).sum() / energy).item() if energy else 1.0
