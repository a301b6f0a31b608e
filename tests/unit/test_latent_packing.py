"""Packing in torch: read bit by bit, compared with the best uniform quantiser, trained through."""

import math

import pytest
import torch
from support.packed import SPECS

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, Piece
from vllm_mla_plugin.hf.attention import apply_rope
from vllm_mla_plugin.latent_packing import dequantise, mean_at, quantise, round_trip, take_mean_out


def tokens(count: int, width: int) -> torch.Tensor:
    """Some of them are outliers, some tiny, one is nothing but zeros; some numbers of a token stand out."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(count, width, generator=generator) + 0.5
    numbers[:, ::17] *= 6
    numbers *= torch.logspace(-2, 1.5, count)[:, None]
    numbers[3] = 0
    return numbers


def read(row: list[int], piece: Piece, number: int) -> float:
    """One number of a row as the format's documentation says, in Python's own numbers."""
    segment = piece.segment
    code = sum(
        (row[plane.offset + number % plane.stride] >> plane.bits * (number // plane.stride) & 2**plane.bits - 1)
        << plane.shift
        for plane in piece.planes
    )
    group = number // segment.group
    scale = row[piece.scales + group]
    if segment.scaling == "compact":
        scale, zero = scale >> 3, scale & 7
        return (1 + (scale & 1) / 2) * 2.0 ** ((scale >> 1) - 9) * (code - (zero + 0.5) * 2 ** (segment.bits - 3))
    if segment.scaling == "symmetric":
        zero = (2**segment.bits - 1) / 2
    else:
        zero = row[piece.zeros + group] * 2.0 ** (segment.bits - 8)
    return (1 + (scale & 7) / 8) * 2.0 ** ((scale >> 3) - 20) * (code - zero)


@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_as_documented(spec: str) -> None:
    format = CacheFormat.parse(spec)
    numbers = tokens(20, 192)
    rows = quantise(numbers, format)
    assert rows.shape == (20, format.bytes_per_token) and rows.dtype == torch.uint8
    assert torch.equal(rows, quantise(numbers[None], format)[0])
    got = dequantise(rows, format)
    for piece in format.pieces:
        own = slice(piece.first, piece.first + piece.segment.size)
        if piece.segment.bits == 16:
            torch.testing.assert_close(got[:, own], numbers[:, own], rtol=2**-11, atol=2**-25)
            continue
        expected = [[read(row, piece, i) for i in range(piece.segment.size)] for row in rows.tolist()]
        torch.testing.assert_close(got[:, own].double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "bits", "reaching"),
    [
        ("", 8, 1.25),
        ("", 6, 1.02),
        ("", 5, 0.98),
        ("", 4, 0.93),
        ("", 3, 0.83),
        ("", 2, 0.65),
        ("s", 8, 1.2),
        ("s", 4, 0.97),
        ("s", 3, 0.85),
        ("s", 2, 0.57),
        ("c", 4, 1.42),
        ("c", 3, 1.12),
        ("c", 2, 0.7),
    ],
)
def test_squared_errors(scaling: str, bits: int, reaching: float) -> None:
    """Against exact scales that reach all of a group, and need two or four times as many bytes."""
    format = CacheFormat.parse(f"192x{bits}g32{scaling}/32x16/nomean")
    numbers = torch.randn(400, 224, generator=torch.Generator().manual_seed(0))
    groups = numbers[:, :192].double().unflatten(-1, (6, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if scaling == "s":
        high = torch.maximum(high, -low)
        low = -high
    step = (high - low) / (2**bits - 1)
    uniform = ((groups - low) / step).round() * step + low
    got = dequantise(quantise(numbers, format), format)[:, :192].unflatten(-1, (6, 32))
    assert (got - groups).square().sum() < reaching * (uniform - groups).square().sum()


def test_a_second_trip_loses_little() -> None:
    """Nothing packs a token twice; where something did, it would lose a fraction of the first loss."""
    for spec in SPECS:
        format, numbers = CacheFormat.parse(spec), tokens(50, 192)
        once = dequantise(quantise(numbers, format), format)
        twice = dequantise(quantise(once, format), format)
        assert (twice - once).square().sum() < 0.25 * (once - numbers).square().sum() + 1e-9, spec


def test_numbers_beyond_all_scales_stay_finite() -> None:
    for spec in SPECS:
        format = CacheFormat.parse(spec)
        numbers = torch.tensor([[1e30] * 192, [-1e30] * 192, [1e-30] * 192])
        got = dequantise(quantise(numbers, format), format)
        assert got.isfinite().all(), spec
        assert (got[0] > 50).all() and (got[1] < -50).all() and (got[2].abs() < 0.01).all(), spec


def test_gradient_passes_straight_through() -> None:
    format, numbers = CacheFormat.parse(SPECS[2]), tokens(5, 192).requires_grad_()
    got = round_trip(numbers, format)
    assert torch.equal(got, dequantise(quantise(numbers, format), format))
    weights = torch.randn(5, 192)
    (got * weights).sum().backward()
    assert torch.equal(numbers.grad, weights)


def test_means() -> None:
    """What is taken out before RoPE is what is added after it; the first token has a mean of its own."""
    mean, freqs = torch.randn(2, 24), torch.rand(4)
    positions = torch.tensor([[0, 1, 2, 700], [5, 0, 3, 4]])
    cached = torch.randn(2, 4, 24)
    latent, k_rope = take_mean_out(cached, mean, positions).split([16, 8], dim=-1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return apply_rope(x[:, None].double(), freqs.double(), positions)[:, 0]

    got = torch.cat((latent, turned(k_rope)), dim=-1) + mean_at(mean, freqs, positions)
    expected = torch.cat((cached[..., :16], turned(cached[..., 16:])), dim=-1)
    torch.testing.assert_close(got.float(), expected.float(), rtol=1e-4, atol=1e-4)
    assert math.isclose(mean_at(mean, freqs, torch.tensor(0))[0], mean[0, 0])
