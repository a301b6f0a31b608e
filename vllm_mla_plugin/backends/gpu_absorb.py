# ruff: noqa: N803, N806 - the constants of a Triton kernel are written in capitals
"""Absorbed and rotated queries in one launch: each head's query times one matrix, and RoPE on the rotary part.

Without this kernel, decoding would launch a product and a rotation, which write and read the rotary queries once more.
"""

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv

TILE_LATENT, TILE_PAIRS = 64, 32
"""Columns of one program: of the latent, or pairs of the rotary query, for each of which it makes two columns."""
TILES_ROWS = (16, 32, 64)


@triton.jit(do_not_specialize=["rows"])
def _absorb(
    Queries,
    Weight,
    Positions,
    Turns,
    Out,
    rows,
    query_stride,
    query_head_stride,
    weight_head_stride,
    weight_row_stride,
    OWN: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OWN: tl.constexpr,
    TILE_LATENT: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(2) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    there = row < rows
    own = tl.arange(0, TILE_OWN)
    known = own < OWN
    queries = Queries + row.to(tl.int64)[:, None] * query_stride + head * query_head_stride
    q = tl.load(queries + own[None, :], mask=there[:, None] & known[None, :], other=0.0)
    weight = Weight + head * weight_head_stride + own[:, None] * weight_row_stride
    out = Out + (row.to(tl.int64) * tl.num_programs(0) + head)[:, None] * (LATENT + ROPE)

    LATENTS: tl.constexpr = (LATENT + TILE_LATENT - 1) // TILE_LATENT
    if tl.program_id(1) < LATENTS:
        columns = tl.program_id(1) * TILE_LATENT + tl.arange(0, TILE_LATENT)
        inside = (columns < LATENT)[None, :]
        w = tl.load(weight + columns[None, :], mask=known[:, None] & inside, other=0.0)
        tl.store(out + columns[None, :], tl.dot(q, w).to(Out.dtype.element_ty), mask=there[:, None] & inside)
    else:
        HALF: tl.constexpr = ROPE // 2
        pairs = (tl.program_id(1) - LATENTS) * TILE_PAIRS + tl.arange(0, TILE_PAIRS)
        paired = (pairs < HALF)[None, :]
        rotary = weight + LATENT + pairs[None, :]
        first = tl.dot(q, tl.load(rotary, mask=known[:, None] & paired, other=0.0))
        second = tl.dot(q, tl.load(rotary + HALF, mask=known[:, None] & paired, other=0.0))
        turned = there[:, None] & paired
        turns = Turns + tl.load(Positions + row, mask=there, other=0)[:, None] * ROPE + pairs[None, :]
        cos = tl.load(turns, mask=turned, other=0.0).to(tl.float32)
        sin = tl.load(turns + HALF, mask=turned, other=0.0).to(tl.float32)
        places = out + LATENT + pairs[None, :]
        tl.store(places, (first * cos - second * sin).to(Out.dtype.element_ty), mask=turned)
        tl.store(places + HALF, (second * cos + first * sin).to(Out.dtype.element_ty), mask=turned)


def absorb(q: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Multiply each head's query by a matrix of its own, and rotate the last numbers of the result.

    Args:
        q: ``[rows, heads, own]``, 16-bit; its last dimension is contiguous.
        weight: ``[heads, own, latent + rope]``, in the dtype of ``q``; its last dimension is contiguous.
        positions: ``[rows]`` int64.
        turns: ``[positions, rope]``, the cosines of each position and then its sines.

    Returns:
        ``[rows, heads, latent + rope]``, contiguous, in the dtype of ``q``.
    """
    rows, heads, own = q.shape
    width, rope = weight.shape[-1], turns.shape[-1]
    out = torch.empty(rows, heads, width, dtype=q.dtype, device=q.device)
    if not rows:
        return out
    tile_rows = next((size for size in TILES_ROWS if size >= rows), TILES_ROWS[-1])
    columns = cdiv(width - rope, TILE_LATENT) + cdiv(rope // 2, TILE_PAIRS)
    _absorb[(heads, columns, cdiv(rows, tile_rows))](
        q,
        weight,
        positions,
        turns,
        out,
        rows,
        q.stride(0),
        q.stride(1),
        weight.stride(0),
        weight.stride(1),
        OWN=own,
        LATENT=width - rope,
        ROPE=rope,
        TILE_ROWS=tile_rows,
        TILE_OWN=max(16, triton.next_power_of_2(own)),
        TILE_LATENT=TILE_LATENT,
        TILE_PAIRS=TILE_PAIRS,
        num_warps=4,
    )
    return out
