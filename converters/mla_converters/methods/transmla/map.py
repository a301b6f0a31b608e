"""Method ``transmla`` (arXiv 2502.07864): RoRoPE, FreqFold and Balanced-KV joint PCA.

Maps are computed from second moments of keys and values, so no activations are stored.
"""

from dataclasses import dataclass

import torch

from mla_converters.errors import ConversionError
from mla_converters.latent.maps import LatentMap
from mla_converters.latent.moments import LayerMoments

# TransMLA's own code adds this share of the mean variance to the diagonal before each PCA.
DAMPING = 0.01


def principal_axes(moments: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of ``[n, n]`` second moments as columns, largest eigenvalue first.

    The moments are damped as in TransMLA's own code.
    """
    damping = DAMPING * moments.diagonal().mean()
    return torch.linalg.eigh(moments + damping * torch.eye(len(moments)).to(moments)).eigenvectors.flip(-1)


def fits_freqfold(freqfold: int, rope_dim: int, head_dim: int) -> bool:
    """Whether groups of ``freqfold`` frequencies can each keep the same number of components."""
    return (head_dim // 2) % freqfold == 0 and rope_dim * freqfold % head_dim == 0


def freqfold_candidates(head_dim: int, rope_dim: int) -> list[int]:
    """The powers of two that are possible values of FreqFold for these sizes.

    Raises:
        ConversionError: there is none.
    """
    folds = [2**i for i in range((head_dim // 2).bit_length()) if fits_freqfold(2**i, rope_dim, head_dim)]
    if not folds:
        raise ConversionError(
            f"--qk-rope-head-dim {rope_dim} cannot be spread over the source's {head_dim // 2} frequencies with "
            f"any FreqFold: choose a multiple or a power-of-two fraction of the head size {head_dim}."
        )
    return folds


@dataclass(frozen=True)
class KeyRotation:
    """A rotation of the keys after which few components carry the rotary part.

    Attributes:
        matrix: orthogonal ``[g * d, g * d]`` float64; its first ``r`` rows are the kept components, the first halves of
            all pairs before the second halves.
        frequency: ``[r / 2]`` index of each kept component's frequency among those of the source.
    """

    matrix: torch.Tensor
    frequency: torch.Tensor


def rotate_keys(moments: LayerMoments, rope_dim: int, freqfold: int) -> KeyRotation:
    """RoRoPE with FreqFold (sections 4.2 and 4.3): concentrate the keys in few rotary components.

    A group of ``freqfold`` neighbouring frequencies is treated as one frequency. Within a group, the components of all
    KV heads are turned to their principal axes. Both halves of the pairs get the same rotation, because such a rotation
    commutes with RoPE as far as the frequencies of the group agree. The leading components of each group keep RoPE.

    Args:
        moments: second moments of the layer's keys.
        rope_dim: dimensions ``r`` that keep RoPE; must satisfy :func:`fits_freqfold`.
        freqfold: number of frequencies in a group.
    """
    kv_heads, head_dim = moments.kv_heads, moments.head_dim
    width = kv_heads * head_dim
    keys = moments.kv[:width, :width]
    groups = head_dim // 2 // freqfold
    keep = rope_dim * freqfold // head_dim  # components that each group keeps
    # The index of each key dimension, by (half of pair, group, KV head and place in group).
    dims = torch.arange(width).view(kv_heads, 2, groups, freqfold).permute(1, 2, 0, 3).flatten(2)
    rotation = keys.new_zeros(width, 2, groups, kv_heads * freqfold)
    for group in range(groups):
        real, imaginary = dims[0, group], dims[1, group]
        axes = principal_axes(keys[real][:, real] + keys[imaginary][:, imaginary])
        rotation[real, 0, group] = axes
        rotation[imaginary, 1, group] = axes
    kept, lost = rotation.split([keep, kv_heads * freqfold - keep], dim=-1)
    # As in TransMLA's own code, the kept components of a group get frequencies of the group in even steps.
    places = torch.arange(keep) * freqfold // keep if keep <= freqfold else torch.arange(keep) % freqfold
    frequency = (torch.arange(groups)[:, None] * freqfold + places).flatten()
    return KeyRotation(torch.cat((kept.flatten(1), lost.flatten(1)), dim=1).mT.contiguous(), frequency)


def joint_map(
    moments: LayerMoments,
    freqs: torch.Tensor,
    rotation: KeyRotation,
    kv_lora_rank: int,
    balance_kv_ratio: float = 1.0,
) -> LatentMap:
    """Joint PCA of the keys without RoPE and the values, with Balanced-KV (section 4.4).

    Args:
        moments: second moments of the layer's keys and values.
        freqs: ``[d / 2]`` RoPE frequencies of the source.
        rotation: the rotation of the keys.
        kv_lora_rank: rank ``R`` of the latent.
        balance_kv_ratio: how large keys are compared with values after scaling for the PCA, as a ratio of the mean root
            mean square.

    Returns:
        A map with ``n = d``.
    """
    kv_heads, head_dim = moments.kv_heads, moments.head_dim
    width, rope_dim = kv_heads * head_dim, 2 * len(rotation.frequency)
    rope, nope = rotation.matrix[:rope_dim], rotation.matrix[rope_dim:]
    remaining = torch.block_diag(nope, torch.eye(width).to(nope))  # [2gd - r, 2gd]
    joint = remaining @ moments.kv @ remaining.mT
    rms = joint.diagonal().clamp(min=0).sqrt()  # rounding can make a zero slightly negative
    keys = width - rope_dim
    scale = rms[:keys].mean() / (rms[keys:].mean() * balance_kv_ratio)
    if not (scale > 0 and scale.isfinite()):  # no keys are left, or all of them or all values are zero
        scale = joint.new_tensor(1.0)
    shrink = torch.cat((joint.new_full((keys,), 1.0) / scale, joint.new_ones(width)))
    basis = principal_axes(shrink[:, None] * joint * shrink)[:, :kv_lora_rank]  # [2gd - r, R]
    return LatentMap(
        rope_freqs=freqs.float()[rotation.frequency.to(freqs.device)],
        key_to_rope=rope,
        query_to_rope=rope.view(rope_dim, kv_heads, head_dim).transpose(0, 1).contiguous(),
        query_to_nope=torch.eye(head_dim).to(nope).expand(kv_heads, -1, -1),
        kv_to_latent=basis.mT @ (shrink[:, None] * remaining),
        latent_to_key=(nope.mT @ (scale * basis[:keys])).view(kv_heads, head_dim, -1),
        latent_to_value=basis[keys:].view(kv_heads, head_dim, -1),
    )


def transmla_map(
    moments: LayerMoments, freqs: torch.Tensor, kv_lora_rank: int, rope_dim: int, freqfold: int
) -> LatentMap:
    """:func:`rotate_keys` and :func:`joint_map` on the same moments."""
    return joint_map(moments, freqs, rotate_keys(moments, rope_dim, freqfold), kv_lora_rank)
