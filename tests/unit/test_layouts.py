"""Candidate layouts and the one that ``vllm-mla plan`` recommends, by the GPUs that serve them."""

import pytest

from mla_converters.planning.layouts import candidates, recommend
from mla_converters.planning.serving import serving_backends
from vllm_mla_plugin.checkpoint.layouts import A100, BLACKWELL, GPUS, HOPPER, PLUGIN_BACKEND


def options(kv_heads: int, head_dim: int) -> dict[int, tuple[str, ...]]:
    """The options of each candidate, by its width."""
    return {candidate.layout.width: candidate.options for candidate in candidates(kv_heads, head_dim)}


def test_options_keep_what_gpus_serve() -> None:
    """``convert --cache-ratio`` may find a wider rotary part than prefill takes on GPUs, so the sizes are given."""
    assert options(8, 128)[1024] == ("--kv-lora-rank", "896", "--qk-rope-head-dim", "128")
    # Whatever the split, a head's 64 numbers and the rotary part are at most 256.
    assert options(2, 64)[128] == ("--cache-ratio", "0.5")
    # No GPU serves rows of 4,096 numbers, however they are split.
    assert options(32, 128)[4096] == ("--cache-ratio", "0.5")


@pytest.mark.parametrize(
    ("kv_heads", "sizes", "own_kernels"),
    [(8, (512, 64), True), (4, (512, 64), True), (3, (256, 64), True), (2, (192, 64), False)],
)
def test_recommendation(kv_heads: int, sizes: tuple[int, int], own_kernels: bool) -> None:
    """512 + 64 if it saves enough, else 256 + 64, else half, which GPUs serve by this plugin's backend."""
    chosen, reason = recommend(kv_heads, 128, "bfloat16")  # caches 2,048, 1,024, 768 and 512 numbers
    assert (chosen.layout.kv_lora_rank, chosen.layout.qk_rope_head_dim) == sizes
    backends = serving_backends(chosen.layout, 128, "bfloat16")
    assert all((backends[gpu] != [PLUGIN_BACKEND]) == own_kernels for gpu in GPUS)
    assert (PLUGIN_BACKEND in reason) != own_kernels


def test_half_is_too_wide_for_gpus() -> None:
    """The largest share that they serve, if it keeps enough; else half, and what to take on GPUs."""
    third, reason = recommend(18, 128, "bfloat16")
    assert third.layout.width == round(0.33 * 2 * 18 * 128)
    assert list(serving_backends(third.layout, 128, "bfloat16")) == ["CPU", HOPPER, BLACKWELL, A100]
    assert "No GPU serves half the cache: rows of 2,304 numbers are too wide" in reason
    half, reason = recommend(64, 128, "bfloat16")
    assert half.options == ("--cache-ratio", "0.5")
    assert "rows of 8,192 numbers are too wide for GPU kernels. On GPUs take 1920 + 128 and train afterwards" in reason


def test_heads_too_large_for_gpus() -> None:
    """Prefill on GPUs takes heads of 256 numbers, so that heads of 256 have no room for a rotary part."""
    for candidate in candidates(8, 256):
        assert list(serving_backends(candidate.layout, 256, "bfloat16")) == ["CPU"]
    _, reason = recommend(8, 256, "bfloat16")
    assert "no GPU serves it: prefill on GPUs takes heads of at most 256 numbers" in reason


def test_float32() -> None:
    """No GPU takes it, so no GPU's limits count."""
    half, reason = recommend(8, 128, "float32")
    assert half.options == ("--cache-ratio", "0.5") and "In float32 only the CPU" in reason
