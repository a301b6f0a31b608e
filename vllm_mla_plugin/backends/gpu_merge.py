# ruff: noqa: N803 - the constants of a Triton kernel are written in capitals
"""Merging the parts into which decode kernels cut contexts, alone or together with the product with W_UV.

Alone, merging is one launch, and vLLM multiplies the merged latents by W_UV in another: each head's latent becomes the
head's output. At small batches launches cost more than what they compute, so there :meth:`Parts.project` does both.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv

PARTS_TILE, VALUES_TILE = 16, 128  # parts and values that one step of merging alone takes
MERGED_NUMBERS, WEIGHT_NUMBERS = 8192, 16384
"""Numbers of parts and of W_UV that one step of merging with the product takes: 32 and 64 registers of each thread."""
MAX_SLICES = 4
"""Programs that share a head's output. Each of them merges the whole latent, which costs more the more there are."""
MOST_WEIGHT_BYTES = 16 << 20
"""Bytes of W_UV up to which merging and the product are one launch. Chosen by reasoning; no GPU has measured it yet.

Every query then reads all of W_UV from the L2 cache, while one product for all queries would read it once. The L2 cache
of an H200 gives about 5.5 TB/s, so these bytes take 3 µs; a launch with its gap and a small product take about 4 µs.
For 32 heads, a latent of 512 and values of 128 the bound is 4 queries; for 8 heads it is 16.
``python -m benchmarks.gpu_kernels`` measures both ways on both sides of it.
"""


@triton.jit
def row_length(Lengths, row, queries, lag):
    """How many tokens a row attends to: all of its request's except those newer than itself."""
    length = tl.load(Lengths + row // queries) - lag * (queries - 1 - row % queries)
    return tl.maximum(length, 0)


@triton.jit
def part_length(length, parts, TILE_TOKENS: tl.constexpr):
    """Tokens of a part: whole tiles, and at least one."""
    return tl.maximum(1, tl.cdiv(tl.cdiv(length, parts), TILE_TOKENS)) * TILE_TOKENS


@triton.jit
def _merge(
    Parts,
    Shares,
    columns,
    length,
    parts,
    LATENT: tl.constexpr,
    EXTRA: tl.constexpr,
    MEAN_WIDTH: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    PARTS_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of a merged row ``[COLUMNS]``, 0 beyond the latent; and the row's log-sum-exp in base 2.

    Args:
        Parts: ``[parts, LATENT + EXTRA]``: values; then their log-sum-exp; then, where there are means, the score of
            the first token in its part.
        Shares: ``[2, MEAN_WIDTH]``, the means that values lack: of all tokens, and what the first has more; or None.
    """
    used = tl.cdiv(length, part_length(length, parts, TILE_TOKENS))
    top = float("-inf")
    total = 0.0
    values = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, used, PARTS_TILE):
        part = first + tl.arange(0, PARTS_TILE)
        source = Parts + part * (LATENT + EXTRA)
        lse = tl.load(source + LATENT, mask=part < used, other=float("-inf"))
        mask = (part < used)[:, None] & (columns < LATENT)[None, :]
        value = tl.load(source[:, None] + columns[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(lse - new_top)
        total = total * shrink + tl.sum(weights, 0)
        values = values * shrink + tl.sum(value * weights[:, None], 0)
        top = new_top
    # Some rows only fill up a CUDA graph: they have no tokens, so their values are zero.
    values = values / tl.maximum(total, 1.0)
    if Shares is not None:  # noqa: SIM102 - known when the kernel is compiled; the next is not
        if used > 0:
            first_weight = tl.exp2(tl.load(Parts + (LATENT + 1)) - top - tl.log2(total))
            mean = tl.load(Shares + columns, mask=columns < LATENT, other=0.0)
            values += mean + first_weight * tl.load(Shares + MEAN_WIDTH + columns, mask=columns < LATENT, other=0.0)
    return values, top + tl.log2(total)


@triton.jit(do_not_specialize=["parts", "queries", "lag"])
def merge_parts(
    Parts,
    Lengths,
    Shares,
    Out,
    Lse,
    parts,
    queries,
    lag,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    EXTRA: tl.constexpr,
    MEAN_WIDTH: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    PARTS_TILE: tl.constexpr,
    VALUES_TILE: tl.constexpr,
):
    """Merge a row's parts for one head. A program writes some of its columns."""
    row = tl.program_id(0)
    result = row.to(tl.int64) * HEADS + tl.program_id(1)
    columns = tl.program_id(2) * VALUES_TILE + tl.arange(0, VALUES_TILE)
    values, lse = _merge(
        Parts + result * parts * (LATENT + EXTRA),
        Shares,
        columns,
        row_length(Lengths, row, queries, lag),
        parts,
        LATENT,
        EXTRA,
        MEAN_WIDTH,
        TILE_TOKENS,
        PARTS_TILE,
        VALUES_TILE,
    )
    tl.store(Out + result * LATENT + columns, values, mask=columns < LATENT)
    if tl.program_id(2) == 0:
        tl.store(Lse + result, lse * 0.6931471805599453)  # log 2


@triton.jit(do_not_specialize=["parts", "queries", "lag"])
def project_parts(
    Parts,
    Lengths,
    Shares,
    Weight,
    Out,
    parts,
    queries,
    lag,
    weight_head_stride,
    weight_latent_stride,
    weight_value_stride,
    out_stride,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    VALUES: tl.constexpr,
    EXTRA: tl.constexpr,
    MEAN_WIDTH: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    PARTS_TILE: tl.constexpr,
    LATENT_TILE: tl.constexpr,
    VALUES_TILE: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Merge a row's parts for one head and multiply by the head's W_UV. A program writes ``SLICE`` values."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, LATENT_TILE)
    merged, _ = _merge(
        Parts + (row.to(tl.int64) * HEADS + head) * parts * (LATENT + EXTRA),
        Shares,
        columns,
        row_length(Lengths, row, queries, lag),
        parts,
        LATENT,
        EXTRA,
        MEAN_WIDTH,
        TILE_TOKENS,
        PARTS_TILE,
        LATENT_TILE,
    )
    weights = Weight + head.to(tl.int64) * weight_head_stride + columns[:, None] * weight_latent_stride
    out = Out + row.to(tl.int64) * out_stride + head * VALUES
    begin = tl.program_id(2) * SLICE
    for first in tl.range(begin, begin + SLICE, VALUES_TILE):
        values = first + tl.arange(0, VALUES_TILE)
        mask = (columns < LATENT)[:, None] & (values < VALUES)[None, :]
        weight = tl.load(weights + values[None, :] * weight_value_stride, mask=mask, other=0.0)
        product = tl.sum(merged[:, None] * weight.to(tl.float32), 0)
        tl.store(out + values, product, mask=values < VALUES)


@dataclass(frozen=True)
class Parts:
    """A batch's attention to parts of contexts, not merged yet.

    Attributes:
        results: scratch of the decode kernel, ``[rows, heads, parts, latent + extra]`` float32, where ``extra`` is one
            number, the log-sum-exp, or more.
        lengths: ``[requests]`` int32, tokens cached.
        latent: ``kv_lora_rank``.
        dtype: of the queries.
        tile_tokens: tokens of a tile of the decode kernel.
        lag: 1 if a request's newest tokens do not attend to those after them, else 0.
        shares: ``[2, latent + rope]`` float32, the means that values lack, or None.
    """

    results: torch.Tensor
    lengths: torch.Tensor
    latent: int
    dtype: torch.dtype
    tile_tokens: int
    lag: int
    shares: torch.Tensor | None = None

    def suits_projection(self, v_head_dim: int) -> bool:
        """Whether :meth:`project` is expected to be faster than :meth:`merge` and a product; known from shapes alone,
        so that it is decided when a CUDA graph is captured."""
        rows, heads = self.results.shape[:2]
        return rows * heads * self.latent * v_head_dim * self.dtype.itemsize <= MOST_WEIGHT_BYTES

    def merge(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[rows, heads, latent]`` in the dtype of the queries, and the log-sum-exp ``[rows, heads]`` float32."""
        rows, heads = self.results.shape[:2]
        device = self.results.device
        out = torch.empty(rows, heads, self.latent, dtype=self.dtype, device=device)
        lse = torch.empty(rows, heads, dtype=torch.float32, device=device)
        merge_parts[(rows, heads, cdiv(self.latent, VALUES_TILE))](
            self.results,
            self.lengths,
            self.shares,
            out,
            lse,
            *self._counts(),
            PARTS_TILE=PARTS_TILE,
            VALUES_TILE=VALUES_TILE,
            **self._sizes(),
        )
        return out, lse

    def project(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Merge, and multiply each head's latent by its W_UV.

        Args:
            weight: ``[heads, latent, v]``.
            out: where to write to, ``[rows, heads * v]``; the numbers of a row lie side by side.
        """
        rows, heads = self.results.shape[:2]
        values = weight.shape[-1]
        latent_tile = max(16, triton.next_power_of_2(self.latent))
        # Half of the GPU's units (SMs) at most: with all of them, the L2 cache is what bounds the kernel.
        slices = min(MAX_SLICES, max(1, current_platform.num_compute_units() // (2 * rows * heads)))
        each = cdiv(values, slices)
        values_tile = min(max(16, triton.next_power_of_2(each)), max(8, WEIGHT_NUMBERS // latent_tile))
        each = cdiv(each, values_tile) * values_tile
        project_parts[(rows, heads, cdiv(values, each))](
            self.results,
            self.lengths,
            self.shares,
            weight,
            out,
            *self._counts(),
            *weight.stride(),
            out.stride(0),
            VALUES=values,
            PARTS_TILE=max(4, MERGED_NUMBERS // latent_tile),
            LATENT_TILE=latent_tile,
            VALUES_TILE=values_tile,
            SLICE=each,
            num_warps=8 if latent_tile >= 512 else 4,
            **self._sizes(),
        )

    def _counts(self) -> tuple[int, int, int]:
        rows, _, parts, _ = self.results.shape
        return parts, rows // max(1, len(self.lengths)), self.lag

    def _sizes(self) -> dict[str, Any]:
        _, heads, _, numbers = self.results.shape
        width = 0 if self.shares is None else self.shares.shape[-1]
        sizes = {"HEADS": heads, "LATENT": self.latent, "EXTRA": numbers - self.latent, "MEAN_WIDTH": width}
        return sizes | {"TILE_TOKENS": self.tile_tokens}
