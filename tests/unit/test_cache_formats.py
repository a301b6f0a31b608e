"""Packed cache formats: bytes counted by hand, layouts without gaps, and what is refused."""

import json
from typing import Any

import pytest
from support.commands import convert
from support.models import RandomModel
from support.packed import SPECS
from transformers import AutoConfig

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, Segment
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json, parse_latent_cache


@pytest.mark.parametrize("spec", SPECS)
def test_every_way_to_write_a_format(spec: str) -> None:
    format = CacheFormat.parse(spec)
    assert format.spec == spec
    assert parse_latent_cache(latent_cache_json([format] * 3), [format.sizes] * 3) == [format] * 3
    assert format.sizes == (128, 64)


def test_names_tell_formats_apart() -> None:
    names = {CacheFormat.parse(spec).name for spec in SPECS}
    assert len(names) == len(SPECS)
    assert "mla_128x4g32_64x4g32" in names


@pytest.mark.parametrize(
    ("spec", "content", "row"),
    [
        ("512x4g64/64x8g64s", 256 + 64 + 2 * 8 + 1, 352),
        ("512x8g64s/64x8g64s", 512 + 64 + 8 + 1, 592),
        ("208x4g32/56x6g56/a4", 104 + 28 + 14 + 2 * 7 + 2, 164),
        ("64x4g32+72x3g36c+72x2g36c/56x6g56/a8", 32 + 18 + 9 + 18 + 28 + 14 + 2 * 2 + 2 + 2 + 2, 136),
        ("192x16/192x16", 768, 768),
        ("37x2g32s/6x16", 10 + 12 + 2, 32),
    ],
)
def test_bytes(spec: str, content: int, row: int) -> None:
    """Codes, each plane in whole bytes, then scales and zeros, then padding."""
    format = CacheFormat.parse(spec)
    assert (format.content_bytes, format.bytes_per_token) == (content, row)


@pytest.mark.parametrize("spec", SPECS)
def test_pieces_fill_rows(spec: str) -> None:
    """No byte belongs to two pieces, and numbers of 16 bits lie at even bytes."""
    format = CacheFormat.parse(spec)
    taken: list[int] = []
    for piece in format.pieces:
        for plane in piece.planes:
            taken += range(plane.offset, plane.offset + plane.stride)
            assert plane.bits != 16 or plane.offset % 2 == 0
        scaling, groups = piece.segment.scaling, piece.segment.groups
        taken += range(piece.scales, piece.scales + groups)
        taken += range(piece.zeros, piece.zeros + (groups if scaling == "asymmetric" else 0))
    assert len(taken) == len(set(taken))
    assert format.content_bytes - 1 <= len(taken) <= format.content_bytes  # one byte may align 16-bit numbers
    assert max(taken) == format.content_bytes - 1


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("128x4g32", "needs two parts"),
        ("128x4g32/", "Segment '' of cache format"),
        ("128x4/64x4g32", "needs a group, unless it has 16 bits"),
        ("128x16g32/64x4g32", "needs a group, unless it has 16 bits"),
        ("128x7g32/64x4g32", "has 7 bits a number, but can have 2, 3, 4, 5, 6, 8 or 16"),
        ("0x4g32/64x4g32", "size is 0"),
        ("128x4g0/64x4g32", "group is 0"),
        ("128x8g32c/64x4g32", "too coarse for 8 bits"),
        ("128x4g32/64x4g32/a5", "multiples of 5 bytes, but can be to 4, 8, 16"),
        ("128x4g32/64x4g32/fast", "ends in 'fast'"),
        ("128x4g32z/64x4g32", "is not like '64x4g32'"),
    ],
)
def test_refused_texts(spec: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CacheFormat.parse(spec)


(GOOD,) = latent_cache_json([CacheFormat.parse("128x4g32/64x4g32")])["formats"]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([], "must have the fields format_version and formats"),
        ({"formats": [GOOD]}, "must have the fields format_version and formats"),
        ({"format_version": 2, "formats": [GOOD]}, "has format_version 2, but .* reads 1"),
        ({"format_version": 1, "formats": [GOOD] * 3}, "one format, or one for each of the 2 layers"),
        ({"format_version": 1, "formats": [GOOD | {"codec": "zip"}]}, "must be an object with fields latent, rope"),
        ({"format_version": 1, "formats": [GOOD | {"rope": "64x4"}]}, "must be a list of segments"),
        ({"format_version": 1, "formats": [GOOD | {"rope": []}]}, "needs at least one segment for its 'rope' part"),
        ({"format_version": 1, "formats": [GOOD | {"rope": [{"bits": 4}]}]}, "must be an object with fields size"),
        ({"format_version": 1, "formats": [GOOD | {"rope": [{"size": "64"}]}]}, "size is '64'"),
        ({"format_version": 1, "formats": [GOOD | {"mean": 1}]}, "mean is 1, but must be true or false"),
        (
            {"format_version": 1, "formats": [GOOD | {"rope": [{"size": 64, "scaling": "log"}]}]},
            "scaling is 'log', but must be symmetric, asymmetric, compact",
        ),
        (
            latent_cache_json([CacheFormat((Segment(96),), (Segment(64),))]),
            "packs 96 \\+ 64 numbers in layer 0, which caches 128 \\+ 64",
        ),
    ],
)
def test_refused_fields(value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_latent_cache(value, [(128, 64)] * 2)


def test_configuration(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The field survives a round trip through config.json, and its errors appear when a configuration is read."""
    folder = tmp_path_factory.mktemp("packed")
    out = convert(RandomModel().save(folder / "source"), folder / "mla", "--method", "exact")
    config = AutoConfig.from_pretrained(out)
    assert config.latent_cache is None and config.cache_format(1) is None
    formats = [CacheFormat.parse("32x4g32/32x4g32"), CacheFormat.parse("32x2g16c/32x16")]
    config.latent_cache = latent_cache_json(formats)
    config.save_pretrained(out)
    again = AutoConfig.from_pretrained(out)
    assert [again.cache_format(layer) for layer in range(2)] == formats
    fields = json.loads((out / "config.json").read_text()) | {"qk_rope_head_dim": 16}
    (out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"packs 32 \+ 32 numbers in layer 0, which caches 32 \+ 16"):
        AutoConfig.from_pretrained(out)
