# ruff: noqa: N803, N806 - the constants of a Triton kernel are written in capitals
# ruff: noqa: RUF005 - Triton joins tuples, but does not unpack them
# mypy: disable-error-code="assignment"
"""MLA decode in Triton from packed rows: each row is read once for all heads, and widened in registers.

As :mod:`vllm_mla_plugin.backends.gpu_decode`, but the latent is a tuple of chunks
(:mod:`vllm_mla_plugin.backends.gpu_rows`), and the mean that rows lack is never added to a row:

- The latent's mean is a constant. Its share of all scores is a product with the query, computed once. Its share of the
  result is itself, because weights add up to 1.
- The rotary key's mean is turned by the token's position. The query is turned back by the position of the tile's first
  token instead, and multiplied by the mean turned by ``0 ... tile - 1`` positions, which is the same in all tiles.
- The first token's mean differs. By how much is multiplied by its own weight when parts are merged.
"""

import math

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv

from vllm_mla_plugin.backends.gpu_means import Means
from vllm_mla_plugin.backends.gpu_merge import Parts, part_length, row_length
from vllm_mla_plugin.backends.gpu_rows import fine_means, turned_mean, widen_chunk
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.layouts import PackedTiles
from vllm_mla_plugin.checkpoint.row_chunks import chunks_of

EXTRA = 2
"""Numbers of a part's result after its values: log-sum-exp, and in the first part the score of the first token."""


@triton.jit
def _load_query(queries, head_stride, heads, known, CHUNKS: tl.constexpr, n: tl.constexpr):
    """``[heads, width]``, zeros beyond the chunk."""
    FIRST: tl.constexpr = CHUNKS[n][0]
    WIDTH: tl.constexpr = CHUNKS[n][1]
    SIZE: tl.constexpr = CHUNKS[n][2]
    columns = tl.arange(0, WIDTH)
    q = queries + heads[:, None] * head_stride + (FIRST + columns)[None, :]
    return tl.load(q, mask=known[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def _zeros(TILE_HEADS: tl.constexpr, CHUNKS: tl.constexpr, n: tl.constexpr):
    WIDTH: tl.constexpr = CHUNKS[n][1]
    return tl.zeros([TILE_HEADS, WIDTH], tl.float32)


@triton.jit
def _mean_share(q, shares, CHUNKS: tl.constexpr, n: tl.constexpr):
    """A mean's product with the query, ``[heads]``."""
    FIRST: tl.constexpr = CHUNKS[n][0]
    WIDTH: tl.constexpr = CHUNKS[n][1]
    SIZE: tl.constexpr = CHUNKS[n][2]
    columns = tl.arange(0, WIDTH)
    mean = tl.load(shares + FIRST + columns, mask=columns < SIZE, other=0.0)
    return tl.sum(q.to(tl.float32) * mean[None, :], 1)


@triton.jit
def _store_values(results, values, known, CHUNKS: tl.constexpr, n: tl.constexpr):
    FIRST: tl.constexpr = CHUNKS[n][0]
    WIDTH: tl.constexpr = CHUNKS[n][1]
    SIZE: tl.constexpr = CHUNKS[n][2]
    columns = tl.arange(0, WIDTH)
    mask = known[:, None] & (columns < SIZE)[None, :]
    tl.store(results[:, None] + FIRST + columns[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["parts", "queries", "lag"])
def _attend_part(
    Latents,
    Ropes,
    Rows,
    Table,
    Lengths,
    Parts,
    Shares,
    Fine,
    Coarse,
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
    LATENT_CHUNKS: tl.constexpr,
    ROPE_CHUNKS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    EXTRA: tl.constexpr,
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

    LATENTS: tl.constexpr = len(LATENT_CHUNKS)
    ROPES: tl.constexpr = len(ROPE_CHUNKS)
    known = heads < HEADS
    latents = Latents + row.to(tl.int64) * latent_stride
    ropes = Ropes + row.to(tl.int64) * rope_stride
    results = Parts + ((row.to(tl.int64) * HEADS + heads) * parts + part) * (LATENT + EXTRA)
    q = ()
    values = ()
    for n in tl.static_range(LATENTS):
        q = q + (_load_query(latents, latent_head_stride, heads, known, LATENT_CHUNKS, n),)
        values = values + (_zeros(TILE_HEADS, LATENT_CHUNKS, n),)
    q_rope = ()
    for n in tl.static_range(ROPES):
        q_rope = q_rope + (_load_query(ropes, rope_head_stride, heads, known, ROPE_CHUNKS, n),)

    if Shares is not None:
        share = tl.zeros([TILE_HEADS], tl.float32)
        more = tl.zeros([TILE_HEADS], tl.float32)  # of the first token
        for n in tl.static_range(LATENTS):
            share += _mean_share(q[n], Shares, LATENT_CHUNKS, n)
            more += _mean_share(q[n], Shares + LATENT + ROPE, LATENT_CHUNKS, n)
        for n in tl.static_range(ROPES):
            more += _mean_share(q_rope[n], Shares + LATENT + ROPE + LATENT, ROPE_CHUNKS, n)
        fine = ()
        for n in tl.static_range(ROPES):
            fine = fine + fine_means(Fine, tl.arange(0, TILE_TOKENS), ROPE, ROPE_CHUNKS, n)
        first_scores = tl.zeros([TILE_HEADS, TILE_TOKENS], tl.float32)

    top = tl.full([TILE_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_HEADS], tl.float32)
    for start in tl.range(first, last, TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        there = tokens < last
        pages = tl.load(Table + (row // queries) * table_stride + tokens // PAGE, mask=there, other=0).to(tl.int64)
        rows = Rows + pages * page_stride + tokens % PAGE * token_stride
        scores = tl.zeros([TILE_HEADS, TILE_TOKENS], tl.float32)
        latent = ()
        for n in tl.static_range(LATENTS):
            latent = latent + (widen_chunk(rows, there, LATENT_CHUNKS, n).to(Latents.dtype.element_ty),)
            scores = tl.dot(q[n], tl.trans(latent[n]), scores)
        for n in tl.static_range(ROPES):
            rope = widen_chunk(rows, there, ROPE_CHUNKS, n)
            if Shares is not None:
                steps = start // TILE_TOKENS + tl.arange(0, 1)
                rope += turned_mean(fine[2 * n], fine[2 * n + 1], Coarse, steps, ROPE, ROPE_CHUNKS, n)
            rope = rope.to(Latents.dtype.element_ty)
            scores = tl.dot(q_rope[n], tl.trans(rope), scores)
        if Shares is not None:
            scores += tl.where((tokens == 0)[None, :], (share + more)[:, None], share[:, None])
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        if Shares is not None:
            first_scores = tl.where(start == 0, scores, first_scores)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(Latents.dtype.element_ty)
        new_values = ()
        for n in tl.static_range(LATENTS):
            new_values = new_values + (tl.dot(weights, latent[n], values[n] * shrink[:, None]),)
        values = new_values
        top = new_top

    for n in tl.static_range(LATENTS):
        _store_values(results, values[n] / total[:, None], known, LATENT_CHUNKS, n)
    if Shares is not None:
        own = tl.where((tl.arange(0, TILE_TOKENS) == 0)[None, :], first_scores, 0.0)
        tl.store(results + (LATENT + 1), tl.sum(own, 1), mask=known)
    tl.store(results + LATENT, top + tl.log2(total), mask=known)


def decode_packed(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scratch: torch.Tensor,
    format: CacheFormat,
    means: Means | None,
    *,
    scale: float,
    causal: bool,
    tiles: PackedTiles,
) -> Parts:
    """Attention of each query to its request's cached tokens.

    Args:
        q_latent, q_rope, table, lengths, scale, causal: as for :func:`vllm_mla_plugin.backends.gpu_decode.decode`.
        cache: ``[pages, tokens of a page, bytes]`` uint8.
        scratch: ``[rows, heads, parts, latent + EXTRA]`` float32;
            :func:`vllm_mla_plugin.backends.gpu_decode.suited_parts` tells how many parts.
        format: of the rows.
        means: what the rows lack, or None. Its step is ``tiles.tokens``.
        tiles: from :func:`vllm_mla_plugin.checkpoint.layouts.packed_tiles`.

    Returns:
        As :func:`vllm_mla_plugin.backends.gpu_decode.decode`.
    """
    assert means is None or means.step == tiles.tokens
    rows, heads, latent = q_latent.shape
    latent_chunks, rope_chunks = chunks_of(format)
    shares, fine, coarse = (None, None, None) if means is None else means
    parts, queries, lag = scratch.shape[2], rows // max(1, len(lengths)), int(causal)
    _attend_part[(cdiv(heads, tiles.heads), rows, parts)](
        q_latent,
        q_rope,
        cache,
        table,
        lengths,
        scratch,
        shares,
        fine,
        coarse,
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
        LATENT_CHUNKS=latent_chunks,
        ROPE_CHUNKS=rope_chunks,
        TILE_TOKENS=tiles.tokens,
        TILE_HEADS=tiles.heads,
        EXTRA=EXTRA,
        # With one stage, Triton 3.6 overwrites tiles that Hopper's matrix instructions still read.
        num_stages=2,
        num_warps=tiles.warps,
    )
    return Parts(scratch, lengths, latent, q_latent.dtype, tiles.tokens, lag, shares)
