"""Turn the user's options into the sizes of the cache, ``kv_lora_rank`` and ``qk_rope_head_dim``."""

from dataclasses import dataclass

from mla_converters.errors import ConversionError
from mla_converters.options.convert import DEFAULT_CACHE_RATIO
from vllm_mla_plugin.checkpoint.layouts import MAX_PREFILL_HEAD_SIZE, VLLM_LAYOUTS

SPLITS = (1 / 4, 1 / 3, 5 / 12, 1 / 2, 7 / 12)  # shares of the cache that a search gives to the rotary key


@dataclass(frozen=True)
class CacheBudget:
    """The sizes of one layer's cache: it holds ``kv_lora_rank + qk_rope_head_dim`` numbers per token."""

    kv_lora_rank: int
    qk_rope_head_dim: int

    @property
    def width(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim


def exact_budget(kv_heads: int, head_dim: int) -> CacheBudget:
    """The budget of method ``exact``, which caches as many numbers as GQA."""
    return CacheBudget(kv_heads * head_dim, kv_heads * head_dim)


def resolve_budget(
    kv_heads: int,
    head_dim: int,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    cache_ratio: float | None = None,
) -> CacheBudget:
    """Choose the sizes that the user did not give.

    Without ``kv_lora_rank``, the cache has ``cache_ratio`` times the source's size. Without ``qk_rope_head_dim``, at
    most a third of the cache is rotary: it gets the largest power-of-two fraction of the head size that fits, as in
    TransMLA's code.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source, which caches ``2 * g * d`` numbers.
        kv_lora_rank, qk_rope_head_dim: sizes that the user gave.
        cache_ratio: size of the cache as a share of the source's; given instead of ``kv_lora_rank``.

    Raises:
        ConversionError: the sizes contradict each other or do not fit the source.
    """
    width = kv_heads * head_dim
    if cache_ratio is not None and kv_lora_rank is not None:
        raise ConversionError("--cache-ratio and --kv-lora-rank both set the cache's size: give one of them.")
    if cache_ratio is not None and not 0 < cache_ratio <= 1:
        raise ConversionError(f"--cache-ratio is {cache_ratio}, but must be above 0 and at most 1.")
    target = round(2 * width * (DEFAULT_CACHE_RATIO if cache_ratio is None else cache_ratio))
    rope = qk_rope_head_dim
    if rope is None:
        reference = 3 * kv_lora_rank // 2 if kv_lora_rank is not None else target
        rope = head_dim
        while rope > reference / 3 and rope % 4 == 0:
            rope //= 2
    if rope % 2 or not 2 <= rope <= width:
        raise ConversionError(
            f"--qk-rope-head-dim is {rope}, but must be even, at least 2 and at most {width} "
            f"(KV heads x head size of the source)."
        )
    rank = target - rope if kv_lora_rank is None else kv_lora_rank
    if rank < 1 and kv_lora_rank is None:
        raise ConversionError(
            f"The cache would have {target} numbers, and {rope} of them are rotary, which leaves no room for a latent: "
            "give a larger --cache-ratio."
        )
    largest = 2 * width - rope
    if not 1 <= rank <= largest:
        raise ConversionError(
            f"A latent of {rank} numbers does not fit: a cache has at most the source's {2 * width} numbers, and "
            f"{rope} of them are rotary, so --kv-lora-rank can be 1 to {largest}."
        )
    return CacheBudget(rank, rope)


def candidate_ropes(kv_heads: int, head_dim: int) -> list[int]:
    """Widths of the rotary key that a search for a packed format compares.

    Each is about ``sqrt(2)`` times the next. GPUs serve all of them: prefill limits the sum of both parts of a head.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source.
    """
    widest = min(kv_heads * head_dim, max(head_dim, MAX_PREFILL_HEAD_SIZE - head_dim))
    steps = (round(widest / 2 ** (step / 2)) for step in range(8))
    return sorted({max(2, width - width % (8 if width >= 16 else 2)) for width in steps})


def candidate_budgets(kv_heads: int, head_dim: int, budget: CacheBudget) -> list[CacheBudget]:
    """The splits of a cache between latent and rotary key that a search compares.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source.
        budget: the cache whose width is split.

    Returns:
        The splits. There is only one if vLLM's fast GPU kernels take this width, or if only ``budget`` fits.
    """
    for latent, rope in VLLM_LAYOUTS:
        if budget.width == latent + rope:
            return [CacheBudget(latent, rope)]
    step = 8 if budget.width >= 64 else 4
    ropes = {max(8, round(budget.width * share / step) * step) for share in SPLITS}
    fitting = [
        CacheBudget(budget.width - rope, rope)
        for rope in sorted(ropes)
        if rope <= kv_heads * head_dim and 1 <= budget.width - rope <= 2 * kv_heads * head_dim - rope
    ]
    return fitting or [budget]
