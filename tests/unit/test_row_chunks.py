"""Packed rows in chunks, and the tiles that GPUs get for them."""

import pytest
from support.packed import SPECS

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.layouts import (
    A100,
    BLACKWELL,
    GPUS,
    HOPPER,
    PLUGIN_BACKEND,
    gpu_backends,
    packed_tiles,
)
from vllm_mla_plugin.checkpoint.row_chunks import CHUNK, MIN_CHUNK, chunks_of, padded_width

MORE = ("448x4g64/64x8g64s", "208x6g13/56x5g7", "512x3g64c/64x2g16c", "300x2g100s/48x4g24", "17x8g64s/2x2g2")


@pytest.mark.parametrize("spec", SPECS + MORE)
def test_chunks(spec: str) -> None:
    """Each number lies in one chunk; tiles are powers of 2; each run has one scale; planes are those of the format."""
    format = CacheFormat.parse(spec)
    widths = 0
    parts = zip(chunks_of(format), (format.latent, format.rope), (0, format.sizes[0]), format.sizes, strict=True)
    for part, segments, before, size in parts:
        covered = [number for first, _, used, *_ in part for number in range(first, first + used)]
        assert covered == list(range(size))
        for first, width, used, start, run, bits, _, group, scales, zeros, planes, *fields in part:
            assert MIN_CHUNK <= width <= CHUNK and width & (width - 1) == 0 and 0 < used <= width
            assert width % run == 0 and run & (run - 1) == 0
            if bits != 16:
                for lot in range(start, start + used, run):
                    assert lot // group == (min(lot + run, start + used) - 1) // group
            piece = next(piece for piece in format.pieces if piece.first == before + first - start)
            assert (piece.scales, piece.zeros) == (scales, zeros)
            assert piece.segment in segments and piece.segment.bits == bits
            assert len(fields) == 4 * planes == 4 * len(piece.planes)
            expected = [(plane.bits, plane.shift, plane.offset, plane.stride) for plane in piece.planes]
            assert [tuple(fields[i : i + 4]) for i in range(0, len(fields), 4)] == expected
            widths += width
    assert widths == padded_width(format)


@pytest.mark.parametrize(
    ("spec", "starts", "run"),
    [
        ("512x4g64/64x8g64s", [0, 256], 64),
        ("512x6g64/64x8g64s", [0, 128, 256, 384], 64),
        ("512x8g512/64x8g64s", [0, 256], 256),
        ("448x4g32/64x8g64s", [0, 224], 32),
        ("37x4g16/6x6g6", [0, 32], 16),
    ],
)
def test_chunks_are_slices(spec: str, starts: list[int], run: int) -> None:
    """Chunks end where a plane's slice does, so that all of their numbers are shifted by as many bits."""
    latent, _ = chunks_of(CacheFormat.parse(spec))
    assert [chunk[3] for chunk in latent] == starts
    assert latent[0][4] == run


@pytest.mark.parametrize("spec", [*SPECS, "512x4g64/64x8g64s", "960x4g64/64x8g64s"])
@pytest.mark.parametrize("kib", [99, 163, 227])
def test_tiles_fit(spec: str, kib: int) -> None:
    tiles = packed_tiles(CacheFormat.parse(spec), kib << 10)
    assert tiles.shared_bytes <= kib << 10
    assert all(size >= 16 and size & (size - 1) == 0 for size in (tiles.tokens, tiles.heads))


def test_plan_of_packed_rows() -> None:
    """This plugin's backend serves packed rows of every layout, vLLM's own too, where they fit; float32 on no GPU."""
    small, wide = CacheFormat.parse("512x4g64/64x8g64s"), CacheFormat.parse("1600x4g64/64x8g64s")
    for gpu in GPUS:
        assert gpu_backends((512, 64), 128, "bfloat16", gpu, small) == [PLUGIN_BACKEND]
        assert gpu_backends((512, 64), 128, "float32", gpu, small) == []
        assert gpu_backends((512, 64), 256, "bfloat16", gpu, small) == [], "heads of 256 + 64 are too large for prefill"
    served = {gpu for gpu in GPUS if gpu_backends((1600, 64), 128, "bfloat16", gpu, wide)}
    assert served == {HOPPER, BLACKWELL, A100}
    with pytest.raises(ValueError, match=r"packed cache of 1600 \+ 64 .* smaller --kv-lora-rank"):
        packed_tiles(wide, 99 << 10)
