"""``vllm-mla convert``: the options that size a packed cache, and what is said of wrong ones."""

from pathlib import Path
from typing import Any

import pytest
from support.commands import Refused
from support.models import RandomModel

from mla_converters.checkpoints.shape import Shape
from mla_converters.checkpoints.source import open_source
from mla_converters.errors import OptionError
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.asked_cache import asked_budget, asked_format, row_bytes
from mla_converters.options import AttentionAwareOptions, CacheSizes, ConvertOptions
from mla_converters.options.convert import conversion_flags

EXACT = ("--method", "exact")
TRANSMLA = ("--method", "transmla")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 heads, 3 KV heads of 16: 96 cached numbers, 192 bytes of 16-bit numbers."""
    return RandomModel(heads=6, kv_heads=3, hidden=96).save(tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture(scope="module")
def shape(source: Path) -> Shape:
    with open_source(str(source)) as opened:
        return opened.shape


REFUSED = {
    "bits": (("--latent-bits", 7), "--latent-bits is 7; choose one of auto, 16, 8, 6, 5, 4, 3, 2."),
    "bits-zero": (("--latent-bits", 0), "--latent-bits is 0; choose one of auto, 16, 8,"),
    "bits-word": (("--latent-bits", "few"), "--latent-bits is 'few', but must be a whole number or auto"),
    "ratio": (("--cache-ratio", 0), "--cache-ratio is 0, but must be above 0 and at most 1"),
    "format-and-ratio": (
        ("--latent-cache", "32x4g32/16x4g16", "--cache-ratio", 0.5),
        "--latent-cache sets all of the cache's sizes: leave out --cache-ratio.",
    ),
    "format-and-all": (
        ("--latent-cache", "32x4g32/16x4g16", "--kv-lora-rank", 32, "--qk-rope-head-dim", 16, "--latent-bits", 4),
        "leave out --latent-bits, --kv-lora-rank, --qk-rope-head-dim.",
    ),
    "format": (("--latent-cache", "32x4g32"), "--latent-cache: Cache format '32x4g32' needs two parts"),
    "format-bits": (("--latent-cache", "32x7g32/16x4g16"), "--latent-cache: A segment has 7 bits a number"),
    "format-too-wide": (("--latent-cache", "90x4g30/16x4g16"), "A latent of 90 numbers does not fit"),
    "format-odd-rope": (("--latent-cache", "32x4g32/15x4g15"), "is 15, but must be even"),
    "uniform-too-wide": (
        ("--latent-bits", 4, "--kv-lora-rank", 81, "--qk-rope-head-dim", 16),
        "A latent of 81 numbers does not fit",
    ),
    "measured": (("--layer-sizes", "measured"), "is for numbers of 16 bits: give --latent-bits 16 too"),
    "measured-4": (("--layer-sizes", "measured", "--latent-bits", 4), "give --latent-bits 16 too"),
    "measured-format": (
        ("--layer-sizes", "measured", "--latent-cache", "32x4g32/16x4g16"),
        "give --latent-bits 16 too",
    ),
    "exact-ratio": (
        (*EXACT, "--latent-bits", 4, "--cache-ratio", 0.25),
        "Method exact keeps all of the cache's numbers",
    ),
    "exact-rope": ((*EXACT, "--latent-bits", 4, "--qk-rope-head-dim", 16), "leave out --kv-lora-rank"),
    "exact-format": (
        (*EXACT, "--latent-cache", "48x4g24/40x4g20"),
        "--latent-cache packs 48 + 40 numbers, but method exact caches 48 + 48.",
    ),
    "no-numbers": (
        ("--cache-ratio", 0.001),
        "of them are rotary, which leaves no room for a latent: give a larger --cache-",
    ),
    "format-wide-rope": (
        ("--latent-cache", "8x4g8/64x4g32"),
        "--latent-cache packs sizes that the source cannot have: ",
    ),
    "few-bytes": (("--cache-ratio", 0.02), "A cache of 3 bytes per token and layer has no room for a latent"),
    "few-bytes-uniform": (("--cache-ratio", 0.02, "--latent-bits", 8), "has no room for a latent"),
    "few-bytes-transmla": ((*TRANSMLA, "--cache-ratio", 0.02, "--latent-bits", 2), "has no room for a latent"),
    "rope-takes-all": (
        ("--cache-ratio", 0.06, "--latent-bits", 4, "--qk-rope-head-dim", 22),
        "A cache of 11 bytes per token and layer has no room for a latent: give a larger --cache-ratio.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(refusal: Refused, case: str, source: Path, tmp_path: Path) -> None:
    """One sentence, and nothing is left behind."""
    options, reason = REFUSED[case]
    assert reason in refusal("convert", source, tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


ASKED: dict[str, tuple[dict[str, Any], str | None, tuple[int, int]]] = {
    "by-hand": ({"latent_cache": "30x4g15+10x2g5c/16x6g16/a4"}, "30x4g15+10x2g5c/16x6g16/a4", (40, 16)),
    "numbers": ({"kv_lora_rank": 20, "qk_rope_head_dim": 12}, None, (20, 12)),
    "sixteen": ({"cache_ratio": 0.5, "latent_bits": 16}, None, (32, 16)),
    "packed-numbers": (
        {"kv_lora_rank": 20, "qk_rope_head_dim": 12, "latent_bits": 4},
        "20x4g20/12x4g12/a4",
        (20, 12),
    ),
    "packed-rank": ({"kv_lora_rank": 32, "latent_bits": 8}, "32x8g32s/16x8g16s/a4", (32, 16)),
    "bytes": ({"cache_ratio": 0.25, "latent_bits": 4}, "64x4g32/16x4g16", (64, 16)),
}


@pytest.mark.parametrize("case", ASKED)
def test_asked(case: str, shape: Shape) -> None:
    """The format that the options ask for, and its sizes; a share counts bytes, and numbers if they have 16 bits."""
    options, spec, sizes = ASKED[case]
    asked = CacheSizes(**options)
    format = asked_format(shape, asked)
    assert (None if format is None else format.spec) == spec
    assert asked_budget(shape, asked) == CacheBudget(*sizes)
    if format is not None and "cache_ratio" in options:
        assert format.bytes_per_token <= row_bytes(shape, asked) == options["cache_ratio"] * 192


def test_what_is_left_open() -> None:
    """Bits are searched unless they or a size in numbers is given; a size in numbers alone means 16 bits."""
    assert CacheSizes().searches_bits and CacheSizes(cache_ratio=0.1, qk_rope_head_dim=16).searches_bits
    for given in ({"latent_bits": 4}, {"latent_bits": 16}, {"kv_lora_rank": 8}, {"latent_cache": "8x4g8/8x4g8"}):
        assert not CacheSizes(**given).searches_bits
    assert CacheSizes(kv_lora_rank=8).uniform_bits == 16 and CacheSizes().share == 0.25
    assert CacheSizes(latent_bits="auto") == CacheSizes()
    with pytest.raises(OptionError, match="choose one of auto"):
        CacheSizes(latent_bits=1)


def test_command_repeats_the_sizes() -> None:
    for sizes, words in (
        ({}, []),
        ({"cache_ratio": 0.5, "latent_bits": 16}, ["--cache-ratio", "0.5", "--latent-bits", "16"]),
        ({"latent_cache": "8x4g8/8x4g8/a4"}, ["--latent-cache", "8x4g8/8x4g8/a4"]),
    ):
        assert conversion_flags(ConvertOptions(method=AttentionAwareOptions(), **sizes)) == words
