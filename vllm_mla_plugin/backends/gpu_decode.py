# ruff: noqa: N803, N806 - the constants of a Triton kernel are written in capitals
"""MLA decode in Triton for any ``kv_lora_rank + qk_rope_head_dim``: each cached row is read once for all heads.

Contexts are cut into parts. :mod:`vllm_mla_plugin.backends.gpu_merge` weighs the results of the parts by their sums of
exponentials (Flash-Decoding, arXiv 2307.08691, section 3).

Scores and results are transposed: their rows are tokens and latent. A GPU's matrix instructions take 64 rows or 16 at a
time, and if the rows were the queries of a few heads, most of them would be empty.

Which layouts the kernel serves is decided in :mod:`vllm_mla_plugin.checkpoint.layouts`.
"""

import math

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv

from vllm_mla_plugin.backends.gpu_merge import Parts, part_length, row_length
from vllm_mla_plugin.checkpoint.layouts import PackedTiles, Tiles


def suited_parts(rows: int, heads: int, tiles: Tiles | PackedTiles, units: int) -> int:
    """The number of parts into which contexts are cut, so that every one of the GPU's units is busy.

    It is at most the number of units, because all parts of a long context are written and read again.

    Args:
        rows: queries of the batch, each of one token.
        heads: query heads of each.
        tiles: tiles of the kernel.
        units: the GPU's units (SMs).
    """
    programs = rows * cdiv(heads, tiles.heads)
    return max(1, min(units, tiles.programs_per_unit * units // programs))


@triton.jit(do_not_specialize=["parts", "queries", "lag"])
def _attend_part(
    Latents,
    Ropes,
    Cache,
    Table,
    Lengths,
    Parts,
    cache_scale,
    scale,
    parts,
    queries,
    lag,
    latent_stride,
    latent_head_stride,
    rope_stride,
    rope_head_stride,
    page_stride,
    token_stride,
    table_stride,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE_LATENT: tl.constexpr,
    TILE_ROPE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
):
    heads = tl.program_id(0) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    row = tl.program_id(1)
    part = tl.program_id(2)
    length = row_length(Lengths, row, queries, lag)
    each = part_length(length, parts, TILE_TOKENS)
    first = each * part
    last = tl.minimum(first + each, length)
    if first >= last:
        return

    FIRST: tl.constexpr = LATENT if TILE_ROPE > 0 else LATENT + ROPE
    columns = tl.arange(0, TILE_LATENT)
    known = heads < HEADS
    latents = Latents + row.to(tl.int64) * latent_stride + heads[:, None] * latent_head_stride
    ropes = Ropes + row.to(tl.int64) * rope_stride + heads[:, None] * rope_head_stride
    q = tl.load(latents + columns[None, :], mask=known[:, None] & (columns < LATENT)[None, :], other=0.0)
    if TILE_ROPE > 0:
        rope_columns = tl.arange(0, TILE_ROPE)
        q_rope = tl.load(ropes + rope_columns[None, :], mask=known[:, None] & (rope_columns < ROPE)[None, :], other=0.0)
        q_rope = tl.trans(q_rope)
    elif ROPE > 0:
        rotary = (columns >= LATENT) & (columns < FIRST)
        q += tl.load(ropes + (columns - LATENT)[None, :], mask=known[:, None] & rotary[None, :], other=0.0)
    q = tl.trans(q)

    cached_scale = tl.load(cache_scale)
    top = tl.full([TILE_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_HEADS], tl.float32)
    values = tl.zeros([TILE_LATENT, TILE_HEADS], tl.float32)
    for start in tl.range(first, last, TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        there = tokens < last
        pages = tl.load(Table + (row // queries) * table_stride + tokens // PAGE, mask=there, other=0).to(tl.int64)
        rows = Cache + (pages * page_stride + tokens % PAGE * token_stride)[:, None]
        latent = tl.load(rows + columns[None, :], mask=there[:, None] & (columns < FIRST)[None, :], other=0.0)
        if latent.dtype.is_fp8():
            latent = (latent.to(tl.float32) * cached_scale).to(q.dtype)
        scores = tl.dot(latent, q)
        if TILE_ROPE > 0:
            mask = there[:, None] & (rope_columns < ROPE)[None, :]
            rope = tl.load(rows + LATENT + rope_columns[None, :], mask=mask, other=0.0)
            if rope.dtype.is_fp8():
                rope = (rope.to(tl.float32) * cached_scale).to(q.dtype)
            scores = tl.dot(rope, q_rope, scores)
        scores = tl.where(there[:, None], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[None, :])
        total = total * shrink + tl.sum(weights, 0)
        values = tl.dot(tl.trans(latent), weights.to(latent.dtype), values * shrink[None, :])
        top = new_top

    results = Parts + ((row.to(tl.int64) * HEADS + heads) * parts + part) * (LATENT + 1)
    mask = (columns < LATENT)[:, None] & known[None, :]
    tl.store(results[None, :] + columns[:, None], values / total[None, :], mask=mask)
    tl.store(results + LATENT, top + tl.log2(total), mask=known)


def decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scratch: torch.Tensor,
    cache_scale: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    tiles: Tiles,
) -> Parts:
    """Attention of each query to its request's cached tokens.

    Args:
        q_latent: ``[rows, heads, latent]``, 16-bit. The rows of a request are its newest tokens; every request has the
            same number of rows.
        q_rope: ``[rows, heads, rope]``.
        cache: ``[pages, tokens of a page, latent + rope]``, in the dtype of the queries or fp8.
        table: ``[requests, pages of each]`` int32.
        lengths: ``[requests]`` int32, tokens cached; 0 gives zeros.
        scratch: ``[rows, heads, parts, latent + 1]`` float32; :func:`suited_parts` tells how many parts.
        cache_scale: one float32 number, the scale of fp8 numbers.
        scale: factor on the scores.
        causal: whether a request's newest tokens do not attend to those after them.
        tiles: from :func:`vllm_mla_plugin.checkpoint.layouts.suited_tiles`.

    Returns:
        The results in ``scratch``.
    """
    rows, heads, latent = q_latent.shape
    parts, queries, lag = scratch.shape[2], rows // max(1, len(lengths)), int(causal)
    _attend_part[(cdiv(heads, tiles.heads), rows, parts)](
        q_latent,
        q_rope,
        cache,
        table,
        lengths,
        scratch,
        cache_scale,
        scale * math.log2(math.e),  # exponentials have base 2, because GPUs have an instruction for it
        parts,
        queries,
        lag,
        q_latent.stride(0),
        q_latent.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        cache.stride(0),
        cache.stride(1),
        table.stride(0),
        HEADS=heads,
        LATENT=latent,
        ROPE=q_rope.shape[-1],
        PAGE=cache.shape[1],
        TILE_LATENT=tiles.latent,
        TILE_ROPE=tiles.rope,
        TILE_TOKENS=tiles.tokens,
        TILE_HEADS=tiles.heads,
        # With one stage, Triton 3.6 overwrites tiles that Hopper's matrix instructions still read.
        num_stages=2,
        num_warps=tiles.warps,
    )
    return Parts(scratch, lengths, latent, q_latent.dtype, tiles.tokens, lag)
