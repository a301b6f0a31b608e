# ruff: noqa: N803, N806 - the constants of a Triton kernel are written in capitals
"""Packing tokens into rows in Triton: the same bytes as :func:`vllm_mla_plugin.latent_packing.quantise`.

Sums of squared errors are added in another order than in torch. So of scales that are equally good but for the last
bits of these sums, another may be chosen.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_mla_plugin.backends.gpu_rows import read_scale
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, Piece
from vllm_mla_plugin.checkpoint.row_chunks import SCALINGS
from vllm_mla_plugin.latent_packing import LARGEST, PLACES, tried_scales

PLACED = tl.constexpr(PLACES)
REACH = tl.constexpr(LARGEST)
MOST = tl.constexpr(65504.0)  # of float16


def _tile(size: int) -> int:
    return 1 << (size - 1).bit_length()


def pieces_of(format: CacheFormat) -> tuple[tuple, ...]:
    """The pieces of a format as tuples of numbers, because Triton compiles a kernel for each value of such constants.
    :func:`_pack_piece` reads their fields."""
    latent = format.sizes[0]
    pieces = []
    for piece in format.pieces:
        segment = piece.segment
        rotary = piece.first >= latent
        groups = max(1, segment.groups)
        each = segment.size if segment.bits == 16 else min(segment.group, segment.size)
        pieces.append(
            (
                rotary,
                piece.first - latent * rotary,
                segment.size,
                segment.bits,
                SCALINGS.index(segment.scaling),
                segment.group,
                groups,
                _tile(groups),
                _tile(each),
                piece.scales,
                piece.zeros,
                *_tries(piece),
                len(piece.planes),
                *(
                    number
                    for plane in piece.planes
                    for number in (plane.bits, plane.shift, plane.offset, plane.stride, _tile(plane.stride))
                ),
            )
        )
    return tuple(pieces)


def _tries(piece: Piece) -> tuple[int, int]:
    """How many scales are tried, and how many steps lie between them."""
    if piece.segment.bits == 16:
        return 0, 1
    tried = tried_scales(piece.segment)
    return len(tried), tried.step


@triton.jit
def _round(x, MOST: tl.constexpr):
    """To the nearest whole number of ``0 ... MOST``, of two to the even one."""
    # At this size, floats are whole numbers. Compilers keep both sums, because they may not reorder floats.
    return (tl.minimum(tl.maximum(x, 0.0), MOST * 1.0) + 12582912.0) - 12582912.0


@triton.jit
def _pack_piece(latent, rope, row, PIECES: tl.constexpr, n: tl.constexpr):
    """Pack one piece of a token, given pointers to its latent, its rotary key and its row."""
    ROTARY: tl.constexpr = PIECES[n][0]
    Numbers = rope if ROTARY else latent
    FIRST: tl.constexpr = PIECES[n][1]
    SIZE: tl.constexpr = PIECES[n][2]
    BITS: tl.constexpr = PIECES[n][3]
    GROUP: tl.constexpr = PIECES[n][5]
    GROUPS: tl.constexpr = PIECES[n][6]
    TILE_GROUPS: tl.constexpr = PIECES[n][7]
    TILE_GROUP: tl.constexpr = PIECES[n][8]
    if BITS == 16:
        OFFSET: tl.constexpr = PIECES[n][16]
        columns = tl.arange(0, TILE_GROUP)
        numbers = tl.load(Numbers + FIRST + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
        numbers = tl.minimum(tl.maximum(numbers, -MOST), MOST)
        halves = (row + OFFSET).to(tl.pointer_type(tl.float16), bitcast=True)
        tl.store(halves + columns, numbers.to(tl.float16), mask=columns < SIZE)
    else:
        groups = tl.arange(0, TILE_GROUPS)
        index = groups[:, None] * GROUP + tl.arange(0, TILE_GROUP)[None, :]
        there = (index < SIZE) & (tl.arange(0, TILE_GROUP) < GROUP)[None, :]
        numbers = tl.load(Numbers + FIRST + index, mask=there, other=0.0).to(tl.float32)
        numbers = tl.minimum(tl.maximum(numbers, -REACH), REACH)
        scales, zeros = _best_scales(numbers, there, PIECES, n)
        SCALING: tl.constexpr = PIECES[n][4]
        SCALES: tl.constexpr = PIECES[n][9]
        ZEROS: tl.constexpr = PIECES[n][10]
        tl.store(row + SCALES + groups, scales.to(tl.uint8), mask=groups < GROUPS)
        if SCALING == 1:
            tl.store(row + ZEROS + groups, zeros.to(tl.uint8), mask=groups < GROUPS)
        PLANES: tl.constexpr = PIECES[n][13]
        for p in tl.static_range(PLANES):
            _pack_plane(Numbers, row, scales | (zeros << 8), PIECES, n, p)


@triton.jit
def _best_scales(numbers, there, PIECES: tl.constexpr, n: tl.constexpr):
    """Codes of scales (of compact ones, with their zeros) and zeros with the least squared errors, ``[groups]`` int32.

    The search of :func:`vllm_mla_plugin.latent_packing.quantise`, operation by operation.
    """
    BITS: tl.constexpr = PIECES[n][3]
    SCALING: tl.constexpr = PIECES[n][4]
    TRIES: tl.constexpr = PIECES[n][11]
    STEP: tl.constexpr = PIECES[n][12]
    TOP: tl.constexpr = 2**BITS - 1
    FRACTION: tl.constexpr = 1.0 / TOP
    DROPPED: tl.constexpr = 22 if SCALING == 2 else 20  # bits of float32's mantissa
    EXPONENT: tl.constexpr = (118 if SCALING == 2 else 107) << 23
    LARGEST_CODE: tl.constexpr = 31 if SCALING == 2 else 255
    if SCALING == 0:
        high = tl.max(tl.abs(numbers), 1)
        low = -high
    else:  # codes reach 0 too
        low = tl.minimum(tl.min(numbers, 1), 0.0)
        high = tl.maximum(tl.max(numbers, 1), 0.0)
    # Rounded up: the least scale that reaches all numbers.
    bits = ((high - low) * FRACTION).to(tl.int32, bitcast=True) - EXPONENT
    reaching = (bits + ((1 << DROPPED) - 1)) >> DROPPED
    reaching = tl.minimum(tl.maximum(reaching, 0), LARGEST_CODE)
    best_scales = reaching
    best_zeros = tl.zeros_like(reaching)
    least = tl.full(low.shape, float("inf"), tl.float32)
    PLACES_TRIED: tl.constexpr = 1 if SCALING == 0 else 3
    for i in tl.static_range(TRIES):
        scales = tl.maximum(reaching - i * STEP, 0)
        inverse = tl.div_rn(1.0, ((scales << DROPPED) + EXPONENT).to(tl.float32, bitcast=True))
        for j in tl.static_range(PLACES_TRIED):
            wanted = PLACED[j] * (TOP - high * inverse) - (1.0 - PLACED[j]) * (low * inverse)
            codes, zeros = scales, best_zeros
            if SCALING == 1:
                zeros = _round(wanted * (2.0 ** (8 - BITS)), 255).to(tl.int32)
            elif SCALING == 2:
                codes = (scales << 3) | _round(wanted * (2.0 ** (3 - BITS)) - 0.5, 7).to(tl.int32)
            scale, zero = read_scale(codes, zeros, BITS, SCALING)
            rounded = _round(numbers * inverse[:, None] + zero[:, None], TOP)
            errors = (rounded - zero[:, None]) * scale[:, None] - numbers
            error = tl.sum(tl.where(there, errors * errors, 0.0), 1)
            better = error < least
            best_scales = tl.where(better, codes, best_scales)
            best_zeros = tl.where(better, zeros, best_zeros)
            least = tl.where(better, error, least)
    return best_scales, best_zeros


@triton.jit
def _pack_plane(Numbers, row, codes, PIECES: tl.constexpr, n: tl.constexpr, p: tl.constexpr):
    """Write one plane of a piece.

    Args:
        codes: ``[groups]`` int32: of the scale, and 8 bits higher of the zero.
    """
    FIRST: tl.constexpr = PIECES[n][1]
    SIZE: tl.constexpr = PIECES[n][2]
    BITS: tl.constexpr = PIECES[n][3]
    SCALING: tl.constexpr = PIECES[n][4]
    GROUP: tl.constexpr = PIECES[n][5]
    GROUPS: tl.constexpr = PIECES[n][6]
    PLANE_BITS: tl.constexpr = PIECES[n][14 + 5 * p]
    SHIFT: tl.constexpr = PIECES[n][15 + 5 * p]
    OFFSET: tl.constexpr = PIECES[n][16 + 5 * p]
    STRIDE: tl.constexpr = PIECES[n][17 + 5 * p]
    TILE_BYTES: tl.constexpr = PIECES[n][18 + 5 * p]
    byte = tl.arange(0, TILE_BYTES)
    packed = tl.zeros([TILE_BYTES], tl.int32)
    for k in tl.static_range(8 // PLANE_BITS):
        index = byte + k * STRIDE
        there = (byte < STRIDE) & (index < SIZE)
        numbers = tl.load(Numbers + FIRST + index, mask=there, other=0.0).to(tl.float32)
        numbers = tl.minimum(tl.maximum(numbers, -REACH), REACH)
        own = tl.gather(codes, tl.minimum(index // GROUP, GROUPS - 1), 0)
        scale, zero = read_scale(own & 255, own >> 8, BITS, SCALING)
        code = _round(numbers * tl.div_rn(1.0, scale) + zero, 2**BITS - 1).to(tl.int32)
        wanted = ((code >> SHIFT) & ((1 << PLANE_BITS) - 1)) << (k * PLANE_BITS)
        packed |= tl.where(there, wanted, 0)
    tl.store(row + OFFSET + byte, packed.to(tl.uint8), mask=byte < STRIDE)


@triton.jit
def _pack(
    Latents,
    Ropes,
    Rows,
    Slots,
    latent_stride,
    rope_stride,
    page_stride,
    token_stride,
    PAGE: tl.constexpr,
    PIECES: tl.constexpr,
):
    token = tl.program_id(0)
    slot = tl.load(Slots + token).to(tl.int64)
    if slot < 0:
        return
    row = Rows + (slot // PAGE) * page_stride + slot % PAGE * token_stride
    latent = Latents + token.to(tl.int64) * latent_stride
    rope = Ropes + token.to(tl.int64) * rope_stride
    COUNT: tl.constexpr = len(PIECES)
    for n in tl.static_range(COUNT):
        if tl.program_id(1) == n:
            _pack_piece(latent, rope, row, PIECES, n)


def pack(
    latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, format: CacheFormat
) -> None:
    """Write tokens without their mean. Padding of rows is left as it is.

    Args:
        latent: ``[tokens, latent]``.
        k_rope: ``[tokens, rope]``, rotated.
        cache: ``[blocks, block_size, bytes]`` uint8; written.
        slots: ``[tokens]``, the place of each token, counted in tokens; below 0, it is not written.
        format: of the rows.
    """
    if latent.stride(1) != 1 or k_rope.stride(1) != 1:
        latent, k_rope = latent.contiguous(), k_rope.contiguous()
    if not len(slots):
        return
    pieces = pieces_of(format)
    _pack[(len(slots), len(pieces))](
        latent,
        k_rope,
        cache,
        slots,
        latent.stride(0),
        k_rope.stride(0),
        cache.stride(0),
        cache.stride(1),
        PAGE=cache.shape[1],
        PIECES=pieces,
        num_warps=4,
        # Products are rounded before they are added, as in torch: otherwise other codes come out.
        enable_fp_fusion=False,
    )
