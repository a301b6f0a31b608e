"""How much rounding each cached number costs, and the scaling of the cache that makes rounding cost least.

A group of numbers that are rounded with one scale gets noise of one size, and this size follows from the spread of the
whole group. Let a component have the cost ``c`` if noise is as large as its own spread. With factors ``s`` on the
components, the noise of a group costs ``sum(s²) * sum(c / s²)``, up to a constant. By the inequality of Cauchy and
Schwarz this is least for ``s² = sqrt(c)``: important components are made larger, but only by half as much as it would
take to give all of them noise of the same cost.
"""

from dataclasses import dataclass, replace

import torch

from mla_converters.latent.maps import LatentMap
from mla_converters.methods.attention_aware.map import ScoreModel

LEAST = 1e-9  # least spread and least cost, relative to the largest, so that dead components do not blow up


@dataclass(frozen=True)
class Components:
    """A number for each cached component.

    :func:`costs` gives the cost of noise as large as the component's spread, in the layer's squared output.

    Attributes:
        latent: ``[R]``.
        rope: ``[r / 2]``, of each half of a rotary pair.
    """

    latent: torch.Tensor
    rope: torch.Tensor


def spreads(maps: LatentMap, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard deviations of the latent ``[R]`` and of the rotary pairs ``[r / 2]`` around their means.

    Args:
        maps: a layer's conversion.
        covariance: ``[2 * g * d, 2 * g * d]``, of ``[k; v]``.
    """
    width = maps.key_to_rope.shape[1]
    latent = _variances(maps.kv_to_latent, covariance)
    rope = _variances(maps.key_to_rope, covariance[:width, :width]).view(2, -1).mean(0)
    return tuple(x.clamp(min=LEAST**2 * x.max().clamp(min=LEAST)).sqrt() for x in (latent, rope))  # type: ignore[return-value]


def costs(maps: LatentMap, model: ScoreModel) -> Components:
    """What noise in the cached components costs a layer's output."""
    (latent, rope), heads = spreads(maps, model.covariance), len(model.query)
    queries = maps.query_to_rope.repeat_interleave(heads // len(maps.query_to_rope), dim=0)
    of_scores = _read(queries.mT, model.query).view(2, -1).mean(0)
    of_latent = _read(maps.latent_to_key, model.key_metric) + _read(maps.latent_to_value, model.value_metric)
    return Components(of_latent * latent**2, of_scores * rope**2)


def suited_to_packing(maps: LatentMap, model: ScoreModel) -> LatentMap:
    """The same function with its cached components sorted by cost, the dearest first, and scaled as the module says.

    Sorted, so that a format can give the first components more bits, and that neighbours, which share a scale, cost
    about the same.
    """
    latent, rope = spreads(maps, model.covariance)
    found = costs(maps, model)
    scales = Components(_factor(found.latent) / latent, _factor(found.rope) / rope)
    return arranged(maps, scales, *(cost.argsort(descending=True, stable=True) for cost in (found.latent, found.rope)))


def arranged(maps: LatentMap, scales: Components, order: torch.Tensor, pairs: torch.Tensor) -> LatentMap:
    """The same function with its cached components multiplied by ``scales``, and then in another order.

    Args:
        maps: a layer's conversion.
        scales: of each component of the latent, and of each rotary pair.
        order: ``[R]``, which component comes where.
        pairs: ``[r / 2]``, likewise of the rotary pairs.
    """
    rows = torch.cat((pairs, pairs + len(pairs)))
    scale_latent, scale_rope = scales.latent[order], scales.rope.repeat(2)[rows]
    return replace(
        maps,
        rope_freqs=maps.rope_freqs[pairs],
        key_to_rope=maps.key_to_rope[rows] * scale_rope[:, None],
        query_to_rope=maps.query_to_rope[:, rows] / scale_rope[:, None],
        kv_to_latent=maps.kv_to_latent[order] * scale_latent[:, None],
        latent_to_key=maps.latent_to_key[..., order] / scale_latent,
        latent_to_value=maps.latent_to_value[..., order] / scale_latent,
    )


def _factor(cost: torch.Tensor) -> torch.Tensor:
    """``s``, with a mean of about one."""
    relative = cost / cost.mean() if cost.any() else torch.ones_like(cost)
    return relative.clamp(min=LEAST) ** 0.25


def _variances(rows: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    return ((rows @ covariance) * rows).sum(-1).clamp(min=0)


def _read(columns: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """``xᵀ M x`` of each column ``x`` of ``[heads, n, columns]``, summed over heads; metrics are ``[heads, n, n]``."""
    return ((metric @ columns) * columns).sum((0, 1))
