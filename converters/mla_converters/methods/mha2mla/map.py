"""Method ``mha2mla`` (MHA2MLA, arXiv 2502.14837): partial RoPE, and an SVD of the weights of what lost it.

Every KV head keeps RoPE on whole pairs of its own, cached side by side in the shared rotary key. The
rest of the keys loses RoPE without any correction and shares a latent with the values.
"""

import torch

from mla_converters.errors import ConversionError
from mla_converters.latent.maps import LatentMap
from mla_converters.options import Keep, Svd

# Directions of the values in which the latent is weaker than this get no bias: it would have to be large.
WEAKEST = 0.1


class PairNorms:
    """Running mean norms of the pairs of queries and keys, for :attr:`Keep.TWO_NORM` (appendix A)."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        self._q = torch.zeros(heads, head_dim // 2, dtype=torch.float64)
        self._k = torch.zeros(kv_heads, head_dim // 2, dtype=torch.float64)
        self._tokens = 0

    def add(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Take in some tokens.

        Args:
            q, k: ``[windows, H, tokens, d]`` and ``[windows, g, tokens, d]``, any float dtype;
                RoPE before or after makes no difference.
        """
        for total, x in ((self._q, q), (self._k, k)):
            norms = x.float().unflatten(-1, (2, -1)).norm(dim=-2)  # [windows, heads, tokens, d / 2]
            total += norms.sum((0, 2)).to("cpu", torch.float64)
        self._tokens += q.shape[0] * q.shape[2]

    def contributions(self) -> torch.Tensor:
        """``[g, d / 2]`` float64: mean norm of the pair in the keys, times that in the queries that read them.

        The product of the means is the mean, over all queries and keys, of the bound ``|q_p| |k_p|``
        on what the pair adds to a score.
        """
        queries = self._q.unflatten(0, (len(self._k), -1)).mean(1)
        return queries * self._k / self._tokens**2


def kept_pairs(
    keep: Keep, pairs: int, kv_heads: int, head_dim: int, contributions: torch.Tensor | None = None
) -> torch.Tensor:
    """Which pairs keep RoPE (section 3.1).

    Every KV head keeps the same number, as in the paper. What is left over goes to the largest
    contributions of any head with ``2-norm``, and otherwise one pair each to the first heads.

    Args:
        keep: the choice.
        pairs: of all KV heads together; 1 to ``g * d / 2``.
        kv_heads, head_dim: ``g`` and ``d`` of the source.
        contributions: ``[g, d / 2]``, see :meth:`PairNorms.contributions`; only ``2-norm`` reads it.

    Returns:
        ``[g, d / 2]`` bool.

    Raises:
        ValueError: ``2-norm`` without contributions.
    """
    each, left = divmod(pairs, kv_heads)
    if keep != Keep.TWO_NORM:
        kept = torch.zeros(kv_heads, head_dim // 2, dtype=torch.bool)
        for head in range(kv_heads):
            kept[head, _fixed_choice(keep, each + (head < left), head_dim // 2)] = True
        return kept
    if contributions is None:
        raise ValueError("the choice 2-norm needs contributions")
    kept = torch.zeros_like(contributions, dtype=torch.bool)
    order = contributions.argsort(dim=-1, descending=True, stable=True)
    kept.scatter_(1, order[:, :each], True)
    others = contributions.masked_fill(kept, float("-inf")).flatten()
    kept.view(-1)[others.argsort(descending=True, stable=True)[:left]] = True
    return kept


def _fixed_choice(keep: Keep, count: int, half: int) -> list[int]:
    """``count`` of ``half`` frequencies, the fastest of which comes first."""
    if keep == Keep.UNIFORM:
        return [index * half // count for index in range(count)]
    return list(range(count) if keep == Keep.HIGH else range(half - count, half))


def check_sizes(kv_heads: int, head_dim: int, rope_dim: int, kv_lora_rank: int, svd: Svd) -> None:
    """Refuse sizes that the method cannot fill.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source.
        rope_dim, kv_lora_rank: ``r`` and ``R``.
        svd: how the latent is shared.

    Raises:
        ConversionError: ``r`` or ``R`` is out of range, or ``R`` leaves ``split`` nothing for the keys.
    """
    width = kv_heads * head_dim
    if rope_dim % 2 or not 2 <= rope_dim <= width:
        raise ConversionError(f"--qk-rope-head-dim is {rope_dim}, but must be even, at least 2 and at most {width}.")
    if not 1 <= kv_lora_rank <= 2 * width - rope_dim:
        raise ConversionError(f"--kv-lora-rank is {kv_lora_rank}, but must be 1 to {2 * width - rope_dim}.")
    if svd == Svd.SPLIT and kv_lora_rank == 1 and rope_dim < width:
        raise ConversionError(
            "--svd split gives keys and values a latent each, so --kv-lora-rank must be at least 2: raise it, or "
            "use --svd joint."
        )


def mha2mla_map(
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    freqs: torch.Tensor,
    kept: torch.Tensor,
    kv_lora_rank: int,
    svd: Svd,
) -> LatentMap:
    """Partial RoPE, and the best approximation of rank ``R`` of the other weights (sections 3.1 and 3.2).

    The latent is free up to an invertible map: the paper spreads the singular values over both
    projections, here the up-projection has orthonormal columns.

    Args:
        k_weight, v_weight: ``[g * d, D]``, any float dtype.
        freqs: ``[d / 2]`` RoPE frequencies of the source, fastest first.
        kept: ``[g, d / 2]`` bool, the pairs that keep RoPE; see :func:`kept_pairs`.
        kv_lora_rank: rank ``R`` of the latent.
        svd: ``joint`` for one SVD of keys and values; ``split`` for one each, with half the rank each; what
            the keys cannot fill, the values get.

    Returns:
        A map with ``n = d`` and ``r`` twice the pairs kept.

    Raises:
        ConversionError: see :func:`check_sizes`.
    """
    kv_heads, half = kept.shape
    head_dim = 2 * half
    check_sizes(kv_heads, head_dim, 2 * int(kept.sum()), kv_lora_rank, svd)
    eye = torch.eye(kv_heads * head_dim, dtype=torch.float64)
    head, frequency = kept.nonzero(as_tuple=True)
    first = head * head_dim + frequency  # source order is (head, half, frequency)
    rope = eye[torch.cat((first, first + half))]  # [r, g * d]
    nope = eye[~kept[:, None].expand(-1, 2, -1).flatten()]  # [g * d - r, g * d]
    basis = _basis(nope @ k_weight.double().cpu(), v_weight.double().cpu(), kv_lora_rank, svd)
    return LatentMap(
        rope_freqs=freqs.float().cpu()[frequency],
        key_to_rope=rope,
        query_to_rope=rope.view(-1, kv_heads, head_dim).transpose(0, 1).contiguous(),
        query_to_nope=torch.eye(head_dim, dtype=torch.float64).expand(kv_heads, -1, -1),
        kv_to_latent=basis.mT @ torch.block_diag(nope, eye),
        # Zero for the pairs that keep RoPE, so the queries need no mask.
        latent_to_key=(nope.mT @ basis[: len(nope)]).view(kv_heads, head_dim, -1),
        latent_to_value=basis[len(nope) :].view(kv_heads, head_dim, -1),
    )


def _basis(keys: torch.Tensor, values: torch.Tensor, rank: int, svd: Svd) -> torch.Tensor:
    """Leading left singular vectors ``[keys + values, R]`` of weights ``[keys, D]`` and ``[values, D]``."""
    if svd == Svd.JOINT:
        return _left_singular_vectors(torch.cat((keys, values)))[:, :rank]
    key_rank = min(rank // 2, len(keys))
    parts = ((keys, key_rank), (values, rank - key_rank))
    return torch.block_diag(*(_left_singular_vectors(weight)[:, :count] for weight, count in parts))


def _left_singular_vectors(weight: torch.Tensor) -> torch.Tensor:
    """All ``[m, m]`` of ``[m, D]``, largest singular value first; complete also where ``D`` is smaller than ``m``."""
    return torch.linalg.eigh(weight @ weight.mT).eigenvectors.flip(-1)


def latent_bias(maps: LatentMap, v_bias: torch.Tensor) -> torch.Tensor:
    """What to add to the latent so that the values get their bias.

    The SVD knows nothing of biases, and projecting them with the weights would let those of the keys,
    which can be a hundred times larger, leak into the values. Without RoPE, a bias of the keys moves
    all scores of a query alike, which changes nothing: so only the values have a say.

    Args:
        maps: the layer's conversion.
        v_bias: ``[g * d]``, any float dtype.

    Returns:
        ``[R]`` float64, the smallest that comes closest.
    """
    return torch.linalg.pinv(maps.latent_to_value.flatten(0, 1), rtol=WEAKEST) @ v_bias.double()
