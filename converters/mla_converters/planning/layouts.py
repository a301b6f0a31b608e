"""Candidate cache layouts of a source, and which one to take."""

from dataclasses import dataclass

from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget, candidate_budgets, resolve_budget
from mla_converters.planning.serving import serving_backends
from vllm_mla_plugin.checkpoint.layouts import GPUS, MAX_PREFILL_HEAD_SIZE, PLUGIN_BACKEND, VLLM_LAYOUTS

RATIOS = (0.75, 0.5, 0.33, 0.25, 0.125)
# A layout that GPUs serve is worth taking if it keeps at most the first share of the cache. Below the second, a
# conversion without training loses too much.
WORTHWHILE_RATIO = 0.6
SAFE_RATIO = 0.25


@dataclass(frozen=True)
class Candidate:
    """A layout, and the options that ask ``vllm-mla convert`` for it."""

    layout: CacheBudget
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.layout.kv_lora_rank} + {self.layout.qk_rope_head_dim}"

    @property
    def is_vllms(self) -> bool:
        """Whether vLLM has GPU kernels of its own for the layout."""
        return (self.layout.kv_lora_rank, self.layout.qk_rope_head_dim) in VLLM_LAYOUTS


def candidates(kv_heads: int, head_dim: int) -> list[Candidate]:
    """Layouts smaller than the source's cache, largest first: those of vLLM's own GPU kernels, and shares of the cache.

    Shares are split between latent and rope as ``convert`` starts; a method may search for a better split.
    """
    cached = 2 * kv_heads * head_dim
    found: dict[CacheBudget, Candidate] = {}
    for layout in (CacheBudget(*sizes) for sizes in VLLM_LAYOUTS):
        if layout.width < cached and _fits(kv_heads, head_dim, layout):
            found[layout] = _by_size(layout)
    for ratio in RATIOS:
        try:
            share = _share(kv_heads, head_dim, ratio)
        except ConversionError:  # a tiny source has no room for so little
            continue
        found.setdefault(share.layout, share)
    return sorted(found.values(), key=lambda candidate: -candidate.layout.width)


def recommend(kv_heads: int, head_dim: int, dtype: str) -> tuple[Candidate, str]:
    """The layout to take, and why.

    Of the layouts that GPUs serve, that save enough and that keep enough, it is the largest with vLLM's own kernels, or
    else the largest with this plugin's. If there is none, it is half the cache.

    Args:
        kv_heads, head_dim: ``g`` and ``d`` of the source.
        dtype: the dtype that the model is served in.

    Raises:
        ConversionError: the source caches too little to be halved.
    """
    cached = 2 * kv_heads * head_dim
    half = _share(kv_heads, head_dim, 0.5)
    if dtype == "float32":
        searched = Candidate(half.layout, ("--cache-ratio", "0.5"))  # there are no limits of GPUs to keep to
        return searched, "In float32 only the CPU serves MLA, at any size; half the cache is where to start."
    on_gpus = [
        candidate
        for candidate in candidates(kv_heads, head_dim)
        if _gpus(candidate.layout, head_dim) and candidate.layout.width <= WORTHWHILE_RATIO * cached
    ]
    safe = [candidate for candidate in on_gpus if candidate.layout.width >= SAFE_RATIO * cached]
    for candidate in safe:
        if candidate.is_vllms:
            kept = _kept(candidate, cached)
            return candidate, f"{candidate.name} keeps {kept}, and vLLM has GPU kernels of its own for it."
    if safe:
        return safe[0], _why_plugins(safe[0], half, on_gpus, cached, head_dim)
    return half, _why_half(half, on_gpus, cached, head_dim)


def _why_plugins(chosen: Candidate, half: Candidate, on_gpus: list[Candidate], cached: int, head_dim: int) -> str:
    """Why a layout that GPUs serve by this plugin's backend alone."""
    gpus = _gpus(chosen.layout, head_dim)
    where = "on GPUs" if gpus == set(GPUS) else f"on some GPUs ({', '.join(gpu for gpu in GPUS if gpu in gpus)})"
    reasons = [f"{chosen.name} keeps {_kept(chosen, cached)}, and {where} {PLUGIN_BACKEND} serves it."]
    if chosen != half:
        reasons.append(f"No GPU serves half the cache: {_obstacle(half, head_dim)}.")
    own = " and ".join(f"{latent} + {rope}" for latent, rope in VLLM_LAYOUTS)
    if trained := next((candidate for candidate in on_gpus if candidate.is_vllms), None):
        reasons.append(f"vLLM has GPU kernels of its own for {trained.name}, but {_too_little(trained, cached)}")
    elif all(sum(layout) > WORTHWHILE_RATIO * cached for layout in VLLM_LAYOUTS):
        reasons.append(
            f"The source caches only {cached:,} numbers per token and layer: {own}, for which vLLM has GPU kernels of "
            "its own, save little or nothing."
        )
    return " ".join(reasons)


def _why_half(half: Candidate, on_gpus: list[Candidate], cached: int, head_dim: int) -> str:
    """Why half the cache, though no GPU serves a layout that keeps enough."""
    reason = f"Half the cache is where to start, but no GPU serves it: {_obstacle(half, head_dim)}."
    if on_gpus:
        reason += f" On GPUs take {on_gpus[0].name} and train afterwards: {_too_little(on_gpus[0], cached)}"
    return reason


def _obstacle(candidate: Candidate, head_dim: int) -> str:
    """Why no GPU serves a layout."""
    rope = candidate.layout.qk_rope_head_dim
    if head_dim + rope > MAX_PREFILL_HEAD_SIZE:
        return (
            f"prefill on GPUs takes heads of at most {MAX_PREFILL_HEAD_SIZE} numbers, and these have "
            f"{head_dim} + {rope}"
        )
    return f"rows of {candidate.layout.width:,} numbers are too wide for GPU kernels"


def _too_little(candidate: Candidate, cached: int) -> str:
    return (
        f"it keeps {_kept(candidate, cached)}, too little without training. TransMLA (arXiv 2502.07864) cut "
        "Llama-2-7B's cache by 93% and restored it with 6 billion tokens."
    )


def _kept(candidate: Candidate, cached: int) -> str:
    return f"{candidate.layout.width / cached:.1%} of the cache"


def _gpus(layout: CacheBudget, head_dim: int) -> set[str]:
    """The GPUs that serve a layout in 16 bits."""
    return set(serving_backends(layout, head_dim, "bfloat16")) & set(GPUS)


def _share(kv_heads: int, head_dim: int, ratio: float) -> Candidate:
    """A share of the source's cache.

    With ``--cache-ratio``, ``convert`` searches for a split between latent and rope. Where it could find a rotary part
    that is too wide for prefill on GPUs, the options give both sizes instead.

    Raises:
        ConversionError: the source has no room for so little.
    """
    layout = resolve_budget(kv_heads, head_dim, cache_ratio=ratio)
    gpus = _gpus(layout, head_dim)
    if all(gpus <= _gpus(split, head_dim) for split in candidate_budgets(kv_heads, head_dim, layout)):
        return Candidate(layout, ("--cache-ratio", str(ratio)))
    return _by_size(layout)


def _fits(kv_heads: int, head_dim: int, layout: CacheBudget) -> bool:
    try:
        resolve_budget(kv_heads, head_dim, layout.kv_lora_rank, layout.qk_rope_head_dim)
    except ConversionError:
        return False
    return True


def _by_size(layout: CacheBudget) -> Candidate:
    options = ("--kv-lora-rank", str(layout.kv_lora_rank), "--qk-rope-head-dim", str(layout.qk_rope_head_dim))
    return Candidate(layout, options)
