"""Candidate cache layouts of a source, and which one to take."""

from dataclasses import dataclass

from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget, resolve_budget
from mla_converters.planning.serving import DEEPSEEK, GPUS, SMALL, serving_backends

RATIOS = (0.75, 0.5, 0.33, 0.25, 0.125)
# A layout with GPU kernels is worth taking from this saving on, and down to the size below which a conversion
# without training loses too much.
WORTHWHILE_RATIO = 0.6
SAFE_RATIO = 0.25


@dataclass(frozen=True)
class Candidate:
    """A layout, and the options that ask ``vllm-mla convert`` for it."""

    layout: CacheBudget
    options: tuple[str, ...]


def candidates(kv_heads: int, head_dim: int) -> list[Candidate]:
    """Layouts smaller than the source's cache: those with GPU kernels, and shares of it; largest first.

    Shares are split between latent and rope as ``convert`` starts; a method may search for a better split.
    """
    cached = 2 * kv_heads * head_dim
    found: dict[CacheBudget, Candidate] = {}
    for layout in (DEEPSEEK, SMALL):
        if layout.width < cached and _fits(kv_heads, head_dim, layout):
            found[layout] = _by_size(layout)
    for ratio in RATIOS:
        try:
            layout = resolve_budget(kv_heads, head_dim, cache_ratio=ratio)
        except ConversionError:  # a tiny source has no room for so little
            continue
        found.setdefault(layout, Candidate(layout, ("--cache-ratio", str(ratio))))
    return sorted(found.values(), key=lambda candidate: -candidate.layout.width)


def recommend(kv_heads: int, head_dim: int, dtype: str) -> tuple[Candidate, str]:
    """The layout to take, and why.

    The largest with GPU kernels that saves enough and keeps enough; if there is none, half the cache.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source.
        dtype: to serve in.

    Raises:
        ConversionError: the source caches too little to be halved.
    """
    cached = 2 * kv_heads * head_dim
    on_gpu = [
        candidate
        for candidate in candidates(kv_heads, head_dim)
        if set(serving_backends(candidate.layout, head_dim, dtype)) & set(GPUS)
    ]
    for candidate in on_gpu:
        ratio = candidate.layout.width / cached
        if SAFE_RATIO <= ratio <= WORTHWHILE_RATIO:
            reason = f"{_name(candidate.layout)} keeps {ratio:.1%} of the cache, and vLLM has GPU kernels for it."
            return candidate, reason
    half = Candidate(resolve_budget(kv_heads, head_dim, cache_ratio=0.5), ("--cache-ratio", "0.5"))
    return half, _why_half(on_gpu, cached, dtype)


def _why_half(on_gpu: list[Candidate], cached: int, dtype: str) -> str:
    if dtype == "float32":
        return "In float32 only the CPU serves MLA, at any size; half the cache is where to start."
    if on_gpu and on_gpu[0].layout.width < SAFE_RATIO * cached:
        layout = on_gpu[0].layout
        return (
            f"Half the cache is where to start, but so far only the CPU serves it. On GPUs take {_name(layout)} and "
            f"train afterwards: it keeps {layout.width / cached:.1%} of the cache, too little without training. "
            "TransMLA (arXiv 2502.07864) cut Llama-2-7B's cache by 93% and restored it with 6 billion tokens."
        )
    return (
        f"The source caches only {cached:,} numbers per token and layer: the sizes that vLLM has GPU kernels for "
        f"({_name(DEEPSEEK)}, {_name(SMALL)}) save little or nothing. Half the cache is where to start, but so far "
        "only the CPU serves it."
    )


def _fits(kv_heads: int, head_dim: int, layout: CacheBudget) -> bool:
    try:
        resolve_budget(kv_heads, head_dim, layout.kv_lora_rank, layout.qk_rope_head_dim)
    except ConversionError:
        return False
    return True


def _by_size(layout: CacheBudget) -> Candidate:
    options = ("--kv-lora-rank", str(layout.kv_lora_rank), "--qk-rope-head-dim", str(layout.qk_rope_head_dim))
    return Candidate(layout, options)


def _name(layout: CacheBudget) -> str:
    return f"{layout.kv_lora_rank} + {layout.qk_rope_head_dim}"
