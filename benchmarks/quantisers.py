"""Quantisers of keys and values, as caches of few bits apply them: each maps numbers to what is read back.

All take ``[..., tokens, head_dim]`` float32 and return the same shape. What vLLM rotates with, and its tables of
levels, come from vLLM itself.
"""

import math
from collections.abc import Callable

import torch
from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.v1.attention.ops.int4_per_token_head import fast_hadamard_transform, single_rht

Quantiser = Callable[[torch.Tensor], torch.Tensor]
SMALLEST_SCALE = 1e-6  # vLLM's, of a vector that is constant


def unchanged(x: torch.Tensor) -> torch.Tensor:
    """Numbers as they are."""
    return x


def fp8(x: torch.Tensor) -> torch.Tensor:
    """e4m3 with a scale of 1, saturated."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-limit, limit).to(torch.float8_e4m3fn).to(x.dtype)


def uniform(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Evenly spaced levels from the minimum to the maximum of each ``group`` of neighbours of the last dimension.

    The minimum and the step are kept in float16. The last group may be smaller.
    """
    return torch.cat([_uniform(part, bits) for part in x.split(group, dim=-1)], dim=-1)


def _uniform(x: torch.Tensor, bits: int) -> torch.Tensor:
    low, high = x.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)
    codes = _rounded((x - low) / step).clamp(0, 2**bits - 1)
    return codes * step.half().float() + low.half().float()


def by_channel(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """:func:`uniform` with groups of neighbouring tokens of one channel, as KIVI (Liu et al. 2024) treats keys."""
    return uniform(x.transpose(-1, -2), bits, group).transpose(-1, -2)


def hadamard_uniform(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """:func:`uniform` of vectors that a randomised Hadamard transform rotates."""
    return _rotated_back(uniform(single_rht(x), bits, group))


def per_token_head(x: torch.Tensor, bits: int) -> torch.Tensor:
    """One scale and zero for each token and head, after a randomised Hadamard transform: vLLM's
    ``int4_per_token_head`` with any number of bits up to 4.

    The zero is a code. It takes the place of the last four bits of the float32 scale.
    """
    rotated, most = single_rht(x), 2**bits - 1
    low, high = rotated.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / most).clamp(min=SMALLEST_SCALE)
    zero = _rounded(-low / scale).clamp(0, most)
    codes = _rounded(rotated / scale + zero).clamp(0, most)
    return _rotated_back((codes - zero) * (scale.view(torch.int32) & -16).view(torch.float32))


def lloyd_max(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels that are best for normally distributed numbers, after a Hadamard transform: the keys of vLLM's
    ``turboquant_*_nc``.

    A vector's norm is kept in float16. Its direction is rounded to levels and then scaled to length 1 again.
    """
    levels = get_centroids(x.shape[-1], bits)
    norm = x.norm(dim=-1, keepdim=True)
    direction = _orthogonal(x / (norm + 1e-8))
    codes = torch.bucketize(direction, (levels[1:] + levels[:-1]) / 2, right=True)
    direction = levels[codes]
    return _orthogonal(direction / direction.norm(dim=-1, keepdim=True)) * norm.half().float()


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest whole number, halves upwards; :func:`torch.round` takes halves to even numbers."""
    return (x + 0.5).floor()


def _rotated_back(x: torch.Tensor) -> torch.Tensor:
    """The inverse of vLLM's transform, which stretches vectors by the root of a head size that is a power of two."""
    return single_rht(x, inverse=True) / x.shape[-1]


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The Hadamard transform that keeps lengths; it is its own inverse."""
    return fast_hadamard_transform(x) / math.sqrt(x.shape[-1])
