"""The map of method ``attention-aware``: it chooses rotary components and latent by the loss of the attention.

Keys are seen as complex numbers: the two dimensions that RoPE turns with one frequency are one complex component.
Multiplying a component by a complex constant commutes with RoPE. Mixing the components that the KV heads have at the
same frequency commutes with RoPE too.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import torch

from mla_converters.latent.maps import LatentMap
from mla_converters.methods.attention_aware.statistics import AttentionStatistics

# Least eigenvalue of a metric, relative to the largest, so that directions without weight do not blow up.
DAMPING = 1e-4
# Added variance, relative to the mean variance, so that a latent of full width also spans directions that no token has.
RIDGE = 1e-6


@dataclass(frozen=True)
class Weighing:
    """Weights of the kinds of error against each other. A search chooses them for each layer.

    Attributes:
        values: weight of errors in values; errors in scores have weight 1.
        energy: weight of a component's energy, because the latent has to carry the component if it loses RoPE; the
            error from its lost rotation has weight 1.
    """

    values: float = 0.3
    energy: float = 0.3


@dataclass(frozen=True)
class ScoreModel:
    """The statistics from which a map is computed; float64 and complex128.

    Attributes:
        key_value: ``[2 * g * d, 2 * g * d]`` second moments of ``[k; v]``.
        query: ``[H, d, d]`` second moments of the queries, in units of the layer's output.
        phase: ``[H, d / 2]`` complex, the constant that replaces the rotation of a component that loses RoPE.
        loss: ``[H, d / 2]``, mean square error of that replacement, per unit of score energy.
        key_metric: ``[g, d, d]``, the quadratic form that measures errors of keys without RoPE.
        value_metric: ``[g, d, d]``, the quadratic form that measures errors of values.
        covariance: ``[2 * g * d, 2 * g * d]`` of ``[k; v]`` without each window's first token, where all tokens count
            the same.
    """

    key_value: torch.Tensor
    query: torch.Tensor
    phase: torch.Tensor
    loss: torch.Tensor
    key_metric: torch.Tensor
    value_metric: torch.Tensor
    covariance: torch.Tensor

    @cached_property
    def roots(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Damped ``[d, d]`` square roots of the ``2 * g`` metrics, keys first, each with its inverse."""
        return [_square_root(metric) for metric in (*self.key_metric, *self.value_metric)]


def score_model(
    statistics: AttentionStatistics,
    plain: torch.Tensor,
    covariance: torch.Tensor,
    kv_heads: int,
    *,
    mean_phase: bool = True,
    attention_weights: bool = True,
    metric: bool = True,
) -> ScoreModel:
    """Prepare the statistics of a layer. Each switch that is off selects the usual alternative.

    Args:
        statistics: statistics weighted by attention.
        plain: ``[2 * g * d, 2 * g * d]`` second moments of ``[k; v]`` in which all tokens count the same.
        covariance: the same around their mean, without each window's first token.
        kv_heads: ``g``.
        mean_phase: replace a lost rotation by its mean; if off, leave it out.
        attention_weights: average ``plain`` with moments that weigh each token by how much it is read; if off, use
            ``plain`` alone, and let all queries count the same.
        metric: measure errors in scores and outputs; if off, measure them in keys and values.
    """
    query, key_value = statistics.query, (plain + statistics.key_value) / 2
    if not attention_weights:
        query = statistics.plain_query * (_trace(statistics.query) / _trace(statistics.plain_query))
        key_value = plain
    phase, loss = statistics.phase, 1 - statistics.phase.abs() ** 2
    if not mean_phase:
        phase, loss = torch.ones_like(phase), 2 - 2 * phase.real
    turn = phase_map(phase)
    key_metric = (turn @ query @ turn.mT).unflatten(0, (kv_heads, -1)).sum(1)
    value_metric = statistics.output.unflatten(0, (kv_heads, -1)).sum(1)
    if not metric:
        key_metric, value_metric = _isotropic(key_metric), _isotropic(value_metric)
    return ScoreModel(key_value, query, phase, loss, key_metric, value_metric, covariance)


def _trace(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum()


def _isotropic(metric: torch.Tensor) -> torch.Tensor:
    """Multiples of the identity with the same trace, ``[g, d, d]``."""
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    return eye.expand_as(metric) * _trace(metric) / _trace(eye.expand_as(metric))


def real_map(matrix: torch.Tensor) -> torch.Tensor:
    """Write a complex-linear map as a real one, in RoPE's order: each head's real parts before its imaginary parts.

    Args:
        matrix: ``[..., rows, m, columns, n]`` complex, from ``columns`` heads of ``n`` pairs to ``rows`` heads of
            ``m`` pairs.

    Returns:
        ``[..., rows * 2 * m, columns * 2 * n]``.
    """
    real = torch.stack((matrix.real, -matrix.imag), dim=-2)
    imaginary = torch.stack((matrix.imag, matrix.real), dim=-2)
    return torch.stack((real, imaginary), dim=-5).flatten(-6, -4).flatten(-3)


def phase_map(phase: torch.Tensor) -> torch.Tensor:
    """``[H, d, d]`` real maps of queries; they have the effect of turning the keys by ``phase`` ``[H, d / 2]``."""
    return real_map(phase.conj().diag_embed()[:, None, :, None])


@dataclass(frozen=True)
class RotaryComponents:
    """The components of a layer that keep RoPE.

    Attributes:
        frequency: ``[r / 2]``, index into the source's frequencies.
        read: ``[r / 2, g]`` complex; a component is ``read @ k``, where ``k`` has the KV heads' key components of its
            frequency.
        back: ``[r / 2, g]`` complex; ``back`` times a component is the part that it contributes to the KV heads' keys.
    """

    frequency: torch.Tensor
    read: torch.Tensor
    back: torch.Tensor


def choose_rotary(model: ScoreModel, rope_dim: int, weighing: Weighing) -> RotaryComponents:
    """Mix the KV heads of each frequency to principal components, and keep those whose loss would cost most.

    If a component with score energy ``e`` loses RoPE, there are two costs: ``e`` times its mean loss, and ``e`` itself,
    because the latent has to carry it.
    """
    kv_heads, head_dim, _ = model.key_metric.shape
    pairs = head_dim // 2
    keys = model.key_value[: kv_heads * head_dim, : kv_heads * head_dim]
    keys = keys.view(kv_heads, 2, pairs, kv_heads, 2, pairs).diagonal(dim1=2, dim2=5)  # [g, 2, g, 2, pairs]
    keys = torch.complex(keys[:, 0, :, 0] + keys[:, 1, :, 1], keys[:, 1, :, 0] - keys[:, 0, :, 1])
    keys = keys.permute(2, 0, 1)  # [pairs, g, g], E k kᴴ
    energy = model.query.diagonal(dim1=1, dim2=2).unflatten(1, (2, pairs)).sum(1)  # [H, pairs]
    by_kv_head = energy.unflatten(0, (kv_heads, -1)).sum(1)  # [g, pairs]
    by_kv_head = torch.where(by_kv_head.any(), by_kv_head, 1.0)  # all queries may be zero
    loss = (energy * model.loss).unflatten(0, (kv_heads, -1)).sum(1) / by_kv_head.clamp(min=1e-300)
    amplitude = by_kv_head.clamp(min=DAMPING**2 * by_kv_head.max()).sqrt().mT  # [pairs, g]
    found, mixing = torch.linalg.eigh(amplitude[:, :, None] * keys * amplitude[:, None, :])
    lost = (mixing.abs() ** 2 * loss.mT[:, :, None]).sum(1)  # [pairs, g]
    cost = found.clamp(min=0) * (lost + weighing.energy)
    kept = cost.flatten().topk(rope_dim // 2).indices.sort().values
    frequency, component = kept // kv_heads, kept % kv_heads
    directions, amplitude = mixing[frequency, :, component], amplitude[frequency]
    return RotaryComponents(frequency, directions.conj() * amplitude, directions / amplitude)


def attention_aware_map(
    model: ScoreModel, freqs: torch.Tensor, rope_dim: int, kv_lora_rank: int, weighing: Weighing
) -> LatentMap:
    """The conversion of a layer, with ``n = d``.

    Args:
        model: the layer's statistics.
        freqs: ``[d / 2]`` RoPE frequencies of the source.
        rope_dim, kv_lora_rank: ``r`` and ``R``.
        weighing: the weights of the errors.
    """
    heads, (kv_heads, head_dim, _) = len(model.query), model.key_metric.shape
    pairs, width = head_dim // 2, kv_heads * head_dim
    rotary = choose_rotary(model, rope_dim, weighing)
    place = torch.nn.functional.one_hot(rotary.frequency, pairs)  # [r / 2, pairs]
    key_to_rope = real_map((rotary.read[:, :, None] * place[:, None])[None])  # [r, g * d]
    back = rotary.back.conj().mT.repeat_interleave(heads // kv_heads, dim=0)  # [H, r / 2]
    query_to_rope = real_map((back[..., None] * place)[:, None, :, None])  # [H, r, d]

    eye = partial(torch.eye, dtype=torch.float64, device=freqs.device)
    rest = eye(kv_heads).to(torch.complex128).repeat(pairs, 1, 1)
    rest.index_add_(0, rotary.frequency, rotary.back[:, :, None] * rotary.read[:, None, :], alpha=-1)
    lifted = rest.new_zeros(kv_heads, pairs, kv_heads, pairs)
    lifted[:, range(pairs), :, range(pairs)] = rest
    remaining = torch.block_diag(real_map(lifted), eye(width))  # [2gd, 2gd]

    weights = torch.tensor([1.0, weighing.values], dtype=torch.float64, device=freqs.device)
    weights = weights.sqrt().repeat_interleave(width)
    roots, inverses = (torch.block_diag(*blocks) for blocks in zip(*model.roots, strict=True))
    root, inverse = weights[:, None] * roots, inverses / weights
    ridge = RIDGE * model.key_value.diagonal().mean() * eye(2 * width)
    weighed = root @ remaining
    basis = torch.linalg.eigh(weighed @ (model.key_value + ridge) @ weighed.mT).eigenvectors.flip(-1)
    basis = basis[:, :kv_lora_rank]
    up = inverse @ basis  # [2gd, R]
    return LatentMap(
        rope_freqs=freqs.float()[rotary.frequency],
        key_to_rope=key_to_rope,
        query_to_rope=query_to_rope,
        query_to_nope=phase_map(model.phase),
        kv_to_latent=basis.mT @ weighed,
        latent_to_key=up[:width].unflatten(0, (kv_heads, head_dim)),
        latent_to_value=up[width:].unflatten(0, (kv_heads, head_dim)),
    )


def _square_root(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Damped ``metric ** 0.5`` and its inverse. A metric of zero, of a head that nothing reads, counts as identity."""
    values, vectors = torch.linalg.eigh(torch.where(metric.any(), metric, torch.eye(len(metric)).to(metric)))
    root = values.clamp(min=DAMPING * values.max()).sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
