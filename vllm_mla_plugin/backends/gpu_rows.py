# ruff: noqa: N803, N806 - the constants of a Triton kernel are written in capitals
"""Packed rows of the cache in Triton: what every kernel that reads them shares, and a kernel that widens tokens.

Rows are read chunk by chunk (:mod:`vllm_mla_plugin.checkpoint.row_chunks`, which lists the fields of a chunk).
"""

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv

from vllm_mla_plugin.backends.gpu_means import Means
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.row_chunks import chunks_of

WIDENED_TOKENS = 16
"""Tokens of one program of :func:`widen`."""


@triton.jit
def plane_bits(rows, index, mask, CHUNKS: tl.constexpr, n: tl.constexpr, p: tl.constexpr):
    """What a plane knows of the codes of a chunk, as int32."""
    SIZE: tl.constexpr = CHUNKS[n][2]
    START: tl.constexpr = CHUNKS[n][3]
    BITS: tl.constexpr = CHUNKS[n][11 + 4 * p]
    SHIFT: tl.constexpr = CHUNKS[n][12 + 4 * p]
    OFFSET: tl.constexpr = CHUNKS[n][13 + 4 * p]
    STRIDE: tl.constexpr = CHUNKS[n][14 + 4 * p]
    SLICE: tl.constexpr = START // STRIDE
    if SLICE == (START + SIZE - 1) // STRIDE:  # all lie in one slice, so all are shifted by the same number of bits
        held = tl.load(rows + (OFFSET - SLICE * STRIDE + index), mask=mask, other=0).to(tl.int32) >> (SLICE * BITS)
    else:
        held = tl.load(rows + (OFFSET + index % STRIDE), mask=mask, other=0).to(tl.int32) >> (index // STRIDE * BITS)
    return (held & ((1 << BITS) - 1)) << SHIFT


@triton.jit
def read_scale(codes, zeros, BITS: tl.constexpr, SCALING: tl.constexpr):
    """Scales and zeros as float32, from their codes (int32; of compact ones, ``codes`` holds both)."""
    if SCALING == 2:
        scale = (((codes >> 3) << 22) + (118 << 23)).to(tl.float32, bitcast=True)
        zero = ((codes & 7).to(tl.float32) + 0.5) * (2.0 ** (BITS - 3))
    else:
        scale = ((codes << 20) + (107 << 23)).to(tl.float32, bitcast=True)
        if SCALING == 1:
            zero = zeros.to(tl.float32) * (2.0 ** (BITS - 8))
        else:
            zero = tl.full(scale.shape, (2.0**BITS - 1.0) / 2.0, tl.float32)
    return scale, zero


@triton.jit
def widen_chunk(rows, there, CHUNKS: tl.constexpr, n: tl.constexpr):
    """The numbers of a chunk, without their mean.

    Args:
        rows: ``[tokens]`` pointers to the rows' first bytes.
        there: ``[tokens]``, which of them are read. The other numbers are finite and of no meaning.

    Returns:
        ``[tokens, width]`` float32. Beyond the chunk's own size, the numbers are finite and of no meaning.
    """
    WIDTH: tl.constexpr = CHUNKS[n][1]
    SIZE: tl.constexpr = CHUNKS[n][2]
    START: tl.constexpr = CHUNKS[n][3]
    RUN: tl.constexpr = CHUNKS[n][4]
    BITS: tl.constexpr = CHUNKS[n][5]
    SCALING: tl.constexpr = CHUNKS[n][6]
    GROUP: tl.constexpr = CHUNKS[n][7]
    SCALES: tl.constexpr = CHUNKS[n][8]
    ZEROS: tl.constexpr = CHUNKS[n][9]
    RUNS: tl.constexpr = WIDTH // RUN
    # [tokens, runs, numbers of a run]: the numbers of a run have one scale.
    run = (tl.arange(0, RUNS) * RUN)[:, None]
    index = (START + run + tl.arange(0, RUN)[None, :])[None, :, :]
    rows = rows[:, None, None]
    mask = there[:, None, None]
    if SIZE < WIDTH:
        mask = mask & (index < START + SIZE)
    if BITS == 16:
        OFFSET: tl.constexpr = CHUNKS[n][13]
        halves = (rows + OFFSET).to(tl.pointer_type(tl.float16), bitcast=True)
        numbers = tl.load(halves + index, mask=mask, other=0.0).to(tl.float32)
    else:
        codes = plane_bits(rows, index, mask, CHUNKS, n, 0)
        PLANES: tl.constexpr = CHUNKS[n][10]
        if PLANES == 2:
            codes |= plane_bits(rows, index, mask, CHUNKS, n, 1)
        group = ((START + run) // GROUP)[None, :, :]
        known = there[:, None, None]
        if SIZE < WIDTH:
            known = known & (START + run < START + SIZE)[None, :, :]
        scales = tl.load(rows + SCALES + group, mask=known, other=0).to(tl.int32)
        zeros = scales
        if SCALING == 1:
            zeros = tl.load(rows + ZEROS + group, mask=known, other=0).to(tl.int32)
        scale, zero = read_scale(scales, zeros, BITS, SCALING)
        numbers = codes.to(tl.float32) * scale - zero * scale  # both products are exact
    return tl.reshape(numbers, [numbers.shape[0], WIDTH])


@triton.jit
def fine_means(Fine, tokens, ROPE: tl.constexpr, CHUNKS: tl.constexpr, n: tl.constexpr):
    """A chunk of the rotary key's mean at some positions below the step, and what turns with it.

    Args:
        tokens: ``[tokens]``, the positions.

    Returns:
        Two tensors ``[tokens, width]`` float32, which :func:`turned_mean` takes.
    """
    FIRST: tl.constexpr = CHUNKS[n][0]
    WIDTH: tl.constexpr = CHUNKS[n][1]
    SIZE: tl.constexpr = CHUNKS[n][2]
    HALF: tl.constexpr = ROPE // 2
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    known = columns < FIRST + SIZE
    fine = Fine + tokens[:, None] * ROPE
    own = tl.load(fine + columns, mask=known, other=0.0)
    other = tl.load(fine + (columns + HALF) % ROPE, mask=known, other=0.0)
    return own, tl.where(columns < HALF, -other, other)


@triton.jit
def turned_mean(own, other, Coarse, steps, ROPE: tl.constexpr, CHUNKS: tl.constexpr, n: tl.constexpr):
    """The mean of :func:`fine_means`, turned by ``[tokens]`` or ``[1]`` coarse steps."""
    FIRST: tl.constexpr = CHUNKS[n][0]
    WIDTH: tl.constexpr = CHUNKS[n][1]
    SIZE: tl.constexpr = CHUNKS[n][2]
    HALF: tl.constexpr = ROPE // 2
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    coarse = Coarse + steps[:, None] * ROPE + columns % HALF
    cos = tl.load(coarse, mask=columns < FIRST + SIZE, other=0.0)
    sin = tl.load(coarse + HALF, mask=columns < FIRST + SIZE, other=0.0)
    return own * cos + other * sin


@triton.jit
def _widen_part(
    rows,
    there,
    positions,
    Out,
    Shares,
    Fine,
    Coarse,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BEFORE: tl.constexpr,
    STEP: tl.constexpr,
    CHUNKS: tl.constexpr,
    n: tl.constexpr,
):
    """Widen one chunk of the latent (``BEFORE`` is 0) or of the rotary key (``BEFORE`` is ``LATENT``)."""
    FIRST: tl.constexpr = CHUNKS[n][0]
    WIDTH: tl.constexpr = CHUNKS[n][1]
    SIZE: tl.constexpr = CHUNKS[n][2]
    numbers = widen_chunk(rows, there, CHUNKS, n)
    columns = FIRST + tl.arange(0, WIDTH)
    known = columns < FIRST + SIZE
    if Shares is not None:
        more = tl.load(Shares + LATENT + ROPE + BEFORE + columns, mask=known, other=0.0)
        numbers += tl.where((positions == 0)[:, None], more[None, :], 0.0)
        if BEFORE == 0:
            numbers += tl.load(Shares + columns, mask=known, other=0.0)[None, :]
        else:
            own, other = fine_means(Fine, positions % STEP, ROPE, CHUNKS, n)
            numbers += turned_mean(own, other, Coarse, positions // STEP, ROPE, CHUNKS, n)
    out = Out + BEFORE + columns[None, :]
    tl.store(out, numbers.to(Out.dtype.element_ty), mask=there[:, None] & known[None, :])


@triton.jit(do_not_specialize=["count"])
def _widen(
    Rows,
    Slots,
    Positions,
    Out,
    Shares,
    Fine,
    Coarse,
    count,
    page_stride,
    token_stride,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    STEP: tl.constexpr,
    LATENT_CHUNKS: tl.constexpr,
    ROPE_CHUNKS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    there = tokens < count
    slots = tl.load(Slots + tokens, mask=there, other=0).to(tl.int64)
    positions = tl.load(Positions + tokens, mask=there, other=0).to(tl.int32)
    rows = Rows + (slots // PAGE) * page_stride + slots % PAGE * token_stride
    out = Out + tokens.to(tl.int64)[:, None] * (LATENT + ROPE)
    LATENTS: tl.constexpr = len(LATENT_CHUNKS)
    for n in tl.static_range(LATENTS):
        if tl.program_id(1) == n:
            _widen_part(rows, there, positions, out, Shares, Fine, Coarse, LATENT, ROPE, 0, STEP, LATENT_CHUNKS, n)
    ROPES: tl.constexpr = len(ROPE_CHUNKS)
    for n in tl.static_range(ROPES):
        if tl.program_id(1) == LATENTS + n:
            _widen_part(rows, there, positions, out, Shares, Fine, Coarse, LATENT, ROPE, LATENT, STEP, ROPE_CHUNKS, n)


def widen(
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    format: CacheFormat,
    means: Means | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Read packed tokens with their mean.

    Args:
        cache: ``[blocks, block_size, bytes]`` uint8.
        slots: ``[tokens]``, where they lie, counted in tokens.
        positions: ``[tokens]`` in their sequences.
        format: of the rows.
        means: what the rows lack, or None.
        dtype: of the result.

    Returns:
        ``[tokens, latent + rope]``.
    """
    count, (latent, rope) = len(slots), format.sizes
    out = torch.empty(count, latent + rope, dtype=dtype, device=cache.device)
    if not count:
        return out
    chunks = chunks_of(format)
    shares, fine, coarse = (None, None, None) if means is None else means
    _widen[(cdiv(count, WIDENED_TOKENS), sum(map(len, chunks)))](
        cache,
        slots,
        positions,
        out,
        shares,
        fine,
        coarse,
        count,
        cache.stride(0),
        cache.stride(1),
        LATENT=latent,
        ROPE=rope,
        PAGE=cache.shape[1],
        STEP=1 if means is None else means.step,
        LATENT_CHUNKS=chunks[0],
        ROPE_CHUNKS=chunks[1],
        TILE_TOKENS=WIDENED_TOKENS,
        num_warps=4,
    )
    return out
