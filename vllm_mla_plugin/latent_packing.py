"""Packing what a layer caches into rows of bytes, and reading it back, in torch.

The reference for every kernel: transformers caches these rows, and vLLM's are the same. Numbers are packed without the
layer's mean, if the format says so (:attr:`vllm_mla_plugin.checkpoint.cache_formats.CacheFormat.mean`):
:func:`take_mean_out` comes before RoPE and :func:`quantise`, :func:`mean_at` gives what is to be added to what
:func:`dequantise` returns. Everything is computed in float32; deterministic; on any device.
"""

import torch

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, Piece, Segment

E5M3, E4M1 = (3, 107), (1, 118)
"""Floats without a sign: bits of the mantissa, and what is added to the exponent's bits to make them float32's.

So e5m3 goes from ``2**-20`` to 3,840 and e4m1 from ``2**-9`` to 96, whatever the bits of a number.
"""
FINER = {2: range(0, 8, 2), 3: range(3), 4: range(2), 5: range(2), 6: range(2), 8: range(1)}
"""By bits of a number: the scales that are tried, in steps of e5m3 below the one that reaches all of a group."""
FINER_COMPACT = {2: range(3), 3: range(2), 4: range(2)}
"""Likewise, in steps of e4m1."""
LARGEST = 2.0**20
"""More than any scale reaches, and few enough that squares stay finite."""
PLACES = (0.5, 0.0, 1.0)
"""Where codes lie that do not reach all of a group: in its middle, at its least number, at its largest."""


def quantise(cached: torch.Tensor, format: CacheFormat) -> torch.Tensor:
    """Pack tokens.

    Each group gets the scale and zero with the least squared error among a few (with the first of equal ones): to cut
    off a group's outermost numbers a little makes all others finer. Against scales that reach all numbers, this takes
    a tenth of the squared error away at 4 bits, a fifth at 3, 40% at 2.

    Args:
        cached: ``[..., latent + rope]``; the rotary key is rotated, the mean is taken out of both.
        format: with segments for as many numbers.

    Returns:
        ``[..., format.bytes_per_token]`` uint8.
    """
    cached = cached.float().clamp(-LARGEST, LARGEST)
    rows = cached.new_zeros(*cached.shape[:-1], format.bytes_per_token, dtype=torch.uint8)
    for piece in format.pieces:
        segment, numbers = piece.segment, cached[..., piece.first : piece.first + piece.segment.size]
        if segment.bits == 16:
            most = torch.finfo(torch.float16).max
            halves = numbers.clamp(-most, most).to(torch.float16).contiguous().view(torch.uint8)
            rows[..., piece.planes[0].offset : piece.planes[0].offset + piece.planes[0].stride] = halves
            continue
        scales, zeros = _best_scales(_groups(numbers, segment), segment)
        codes = _codes(_groups(numbers, segment)[0], *_read_scales(scales, zeros, segment), segment)
        _put_codes(rows, codes.flatten(-2)[..., : segment.size].to(torch.uint8), piece)
        if segment.scaling == "compact":
            scales = scales << 3 | zeros
        rows[..., piece.scales : piece.scales + segment.groups] = scales[..., 0].to(torch.uint8)
        if segment.scaling == "asymmetric":
            rows[..., piece.zeros : piece.zeros + segment.groups] = zeros[..., 0].to(torch.uint8)
    return rows


def dequantise(rows: torch.Tensor, format: CacheFormat) -> torch.Tensor:
    """Read packed tokens.

    Args:
        rows: ``[..., format.bytes_per_token]`` uint8.
        format: that they were packed with.

    Returns:
        ``[..., latent + rope]`` float32, without the mean.
    """
    parts = []
    for piece in format.pieces:
        segment = piece.segment
        if segment.bits == 16:
            (plane,) = piece.planes
            halves = rows[..., plane.offset : plane.offset + plane.stride].contiguous().view(torch.float16)
            parts.append(halves.float())
            continue
        scales = rows[..., piece.scales : piece.scales + segment.groups, None].int()
        zeros = torch.zeros_like(scales)
        if segment.scaling == "asymmetric":
            zeros = rows[..., piece.zeros : piece.zeros + segment.groups, None].int()
        elif segment.scaling == "compact":
            scales, zeros = scales >> 3, scales & 7
        scale, zero = _read_scales(scales, zeros, segment)
        codes = _take_codes(rows, piece).float()
        padded = torch.nn.functional.pad(codes, (0, segment.groups * segment.group - segment.size))
        numbers = padded.unflatten(-1, (segment.groups, segment.group)) * scale - zero * scale
        parts.append(numbers.flatten(-2)[..., : segment.size])
    return torch.cat(parts, dim=-1)


class _RoundTrip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, cached: torch.Tensor, format: CacheFormat) -> torch.Tensor:
        return dequantise(quantise(cached, format), format)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


def round_trip(cached: torch.Tensor, format: CacheFormat) -> torch.Tensor:
    """Tokens as attention reads them from the cache: :func:`quantise`, then :func:`dequantise`.

    Can be trained through: the gradient passes as if nothing were rounded (straight-through estimator, Bengio et al.
    2013).

    Args:
        cached: ``[..., latent + rope]``, without the mean.

    Returns:
        The same shape, float32.
    """
    return _RoundTrip.apply(cached.float(), format)


def take_mean_out(cached: torch.Tensor, mean: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What a layer caches without its mean.

    Args:
        cached: ``[..., latent + rope]``, before RoPE.
        mean: ``[2, latent + rope]`` float32: of tokens at position 0, and of all others.
        positions: ``[...]``, whole numbers.

    Returns:
        Shape and dtype of ``cached``.
    """
    return (cached - mean[(positions > 0).long()]).to(cached.dtype)


def mean_at(mean: torch.Tensor, freqs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What :func:`take_mean_out` took out, as it would be after RoPE.

    Angles are computed in float64, so that kernels which get them in another way have the same numbers.

    Args:
        mean: ``[2, latent + rope]``: of tokens at position 0, and of all others.
        freqs: ``[rope / 2]``, radians per position, of the pairs ``(i, i + rope / 2)`` of the rotary key.
        positions: any shape, whole numbers.

    Returns:
        ``[*positions.shape, latent + rope]`` float32.
    """
    rope = 2 * len(freqs)
    own = mean[(positions > 0).long()]
    latent, rotary = own.split([own.shape[-1] - rope, rope], dim=-1)
    angles = positions[..., None].double() * freqs.double()
    cos, sin = angles.cos(), angles.sin()
    first, second = rotary.double().chunk(2, dim=-1)
    return torch.cat((latent, (first * cos - second * sin).float(), (second * cos + first * sin).float()), dim=-1)


def tried_scales(segment: Segment) -> range:
    """How far below the scale that reaches all of a group others are tried."""
    return (FINER_COMPACT if segment.scaling == "compact" else FINER)[segment.bits]


def _groups(numbers: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., groups, group]``, and which of them are there: the last group may be smaller."""
    missing = segment.groups * segment.group - segment.size
    # Filled up with its own first number, a small group keeps its least and its largest.
    filler = numbers[..., (segment.groups - 1) * segment.group, None].expand(*numbers.shape[:-1], missing)
    there = torch.arange(segment.groups * segment.group, device=numbers.device) < segment.size
    shape = (segment.groups, segment.group)
    return torch.cat((numbers, filler), dim=-1).unflatten(-1, shape), there.view(shape)


def _kind(segment: Segment) -> tuple[int, int]:
    return E4M1 if segment.scaling == "compact" else E5M3


def _read_scales(scales: torch.Tensor, zeros: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros as numbers, from their codes (int32)."""
    mantissa, exponent = _kind(segment)
    scale = ((scales << 23 - mantissa) + (exponent << 23)).view(torch.float32)
    if segment.scaling == "symmetric":
        return scale, torch.full_like(scale, (2**segment.bits - 1) / 2)
    if segment.scaling == "asymmetric":
        return scale, zeros.float() * 2.0 ** (segment.bits - 8)
    return scale, (zeros.float() + 0.5) * 2.0 ** (segment.bits - 3)


def _codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Whole numbers as float32, ``[..., groups, group]``."""
    return (groups * scale.reciprocal() + zero).round().clamp(0, 2**segment.bits - 1)


@torch.no_grad()
def _best_scales(groups: tuple[torch.Tensor, torch.Tensor], segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the scales and zeros with the least squared errors, ``[..., groups, 1]`` int32."""
    numbers, there = groups
    mantissa, exponent = _kind(segment)
    largest = 31 if segment.scaling == "compact" else 255
    top = 2**segment.bits - 1
    if segment.scaling == "symmetric":
        high = numbers.abs().amax(-1, keepdim=True)
        low = -high
    else:  # codes reach 0 too
        low, high = numbers.amin(-1, keepdim=True).clamp(max=0), numbers.amax(-1, keepdim=True).clamp(min=0)
    # Rounded up: the least scale that reaches all numbers.
    bits = ((high - low) * (1 / top)).contiguous().view(torch.int32) - (exponent << 23)
    reaching = (bits + (1 << 23 - mantissa) - 1 >> 23 - mantissa).clamp(0, largest)
    best_scales, best_zeros, least = reaching, torch.zeros_like(reaching), torch.full_like(low, torch.inf)
    for below in tried_scales(segment):
        scales = (reaching - below).clamp(min=0)
        inverse = _read_scales(scales, scales, segment)[0].reciprocal()
        for place in PLACES if segment.scaling != "symmetric" else (0.5,):
            wanted = place * (top - high * inverse) - (1 - place) * (low * inverse)
            if segment.scaling == "asymmetric":
                zeros = (wanted * 2.0 ** (8 - segment.bits)).round().clamp(0, 255).int()
            else:
                zeros = (wanted * 2.0 ** (3 - segment.bits) - 0.5).round().clamp(0, 7).int()
            scale, zero = _read_scales(scales, zeros, segment)
            errors = ((_codes(numbers, scale, zero, segment) - zero) * scale - numbers).square() * there
            error = errors.sum(-1, keepdim=True)
            better = error < least
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
            least = torch.where(better, error, least)
    return best_scales, best_zeros


def _put_codes(rows: torch.Tensor, codes: torch.Tensor, piece: Piece) -> None:
    """Write codes ``[..., size]`` uint8 into rows."""
    for plane in piece.planes:
        each = 8 // plane.bits
        wanted = codes >> plane.shift & 2**plane.bits - 1
        padded = torch.nn.functional.pad(wanted, (0, each * plane.stride - wanted.shape[-1]))
        shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=codes.device)
        parts = padded.unflatten(-1, (each, plane.stride)) << shifts[:, None]
        rows[..., plane.offset : plane.offset + plane.stride] = parts.sum(-2, dtype=torch.uint8)


def _take_codes(rows: torch.Tensor, piece: Piece) -> torch.Tensor:
    """``[..., size]`` uint8."""
    size = piece.segment.size
    codes = rows.new_zeros(*rows.shape[:-1], size)
    for plane in piece.planes:
        shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=rows.device)
        held = rows[..., None, plane.offset : plane.offset + plane.stride]
        parts = held >> shifts[:, None] & 2**plane.bits - 1
        codes |= parts.flatten(-2)[..., :size] << plane.shift
    return codes
