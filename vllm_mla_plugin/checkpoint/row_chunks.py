"""Packed rows in chunks, as GPU kernels read them: tiles of neighbouring numbers of one segment.

A chunk is a tuple of whole numbers, because Triton compiles a kernel for each value of such constants. So one source
serves every :class:`~vllm_mla_plugin.checkpoint.cache_formats.CacheFormat`, and nothing of the format is left to do on
the GPU. The tiles of :mod:`vllm_mla_plugin.checkpoint.layouts` follow from the widths of chunks, so this module imports
neither torch nor vLLM.
"""

from collections.abc import Iterator

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, Piece

SCALINGS = ("symmetric", "asymmetric", "compact")
CHUNK = 256
"""Numbers of a chunk at most: the widest slice of 512 numbers of 4 bits. Fewer and larger tiles are moved less often
between registers and shared memory."""
MIN_CHUNK = 16
"""Triton multiplies no smaller tiles."""
MIN_SLICE = 32
"""Slices of a plane with fewer numbers are not chunks of their own, because tiles would be small or half empty."""

Chunk = tuple[int, ...]
"""In this order:

 0. index of its first number in the latent, or in the rotary key
 1. width of its tile, a power of 2
 2. numbers of the tile that it uses
 3. index of its first number in its segment
 4. run: of so many numbers of the tile, from its start on, each lot lies in one group
 5. bits of a number
 6. index of the scaling in :data:`SCALINGS`
 7. numbers of a group
 8. offset of the segment's scales in the row
 9. offset of its zeros
10. planes of the segment: 1 or 2
11. of the first plane: bits, shift, offset, stride
15. the same of the second plane, if there is one
"""


def chunks_of(format: CacheFormat) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """The chunks of the latent and of the rotary key."""
    latent = format.sizes[0]
    chunks: tuple[list[Chunk], list[Chunk]] = ([], [])
    for piece in format.pieces:
        rotary = piece.first >= latent
        for start, width, size in _cuts(piece):
            chunks[rotary].append(_chunk(piece, start, width, size, piece.first - latent * rotary))
    return tuple(chunks[0]), tuple(chunks[1])


def _cuts(piece: Piece) -> Iterator[tuple[int, int, int]]:
    """Where chunks of a piece begin, counted in the piece; their widths, powers of 2; and how much of it they use.

    They end where a slice of a plane does, because the numbers of a slice are shifted by the same number of bits.
    """
    whole, start = piece.segment.size, 0
    strides = sorted(plane.stride for plane in piece.planes)
    slices = strides[0] if strides[0] >= MIN_SLICE and not strides[-1] % strides[0] else whole
    while start < whole:
        left = min(whole, (start // slices + 1) * slices) - start
        width = min(CHUNK, max(MIN_CHUNK, 1 << (left - 1).bit_length()))
        if width > MIN_CHUNK and left < width * 7 // 8:  # at most an eighth of a tile stays empty
            width //= 2
        size = min(width, left)
        yield start, width, size
        start += size


def _chunk(piece: Piece, start: int, width: int, size: int, first: int) -> Chunk:
    """One chunk of a piece; ``first`` is the index of the piece's first number in the latent, or in the rotary key."""
    segment = piece.segment
    run = width
    if segment.bits != 16 and start // segment.group != (start + size - 1) // segment.group:
        # Of this many numbers from the start on, a power of 2, each lot lies in one group.
        run = min(width, *(number & -number for number in (segment.group, start) if number))
    planes = [number for plane in piece.planes for number in (plane.bits, plane.shift, plane.offset, plane.stride)]
    fields = (first + start, width, size, start, run, segment.bits, SCALINGS.index(segment.scaling), segment.group)
    return *fields, piece.scales, piece.zeros, len(piece.planes), *planes


def padded_width(format: CacheFormat) -> int:
    """How many numbers the tiles of a row have in all."""
    return sum(width for piece in format.pieces for _, width, _ in _cuts(piece))
