"""Which cache to take: honest about what vLLM does for the source without any conversion."""

import shlex
from collections.abc import Iterable

from mla_converters.checkpoints.shape import PlannedSource
from mla_converters.checkpoints.vllm_caches import FP8, INT4, VllmCache, vllm_caches
from mla_converters.methods.registry import method_of
from mla_converters.options import CacheSizes, ExactOptions, MethodOptions
from mla_converters.options.convert import DEFAULT_CACHE_RATIO
from mla_converters.planning.layouts import Candidate, asked, candidates, share_sizes
from mla_converters.planning.serving import CPU
from mla_converters.reports.plan import Advice
from vllm_mla_plugin.checkpoint.layouts import GPUS, MAX_PREFILL_HEAD_SIZE, PLUGIN_BACKEND

# 16-bit numbers are worth taking for the sake of GPUs if they leave at most this share of the bytes.
WORTHWHILE_RATIO = 0.6
UNTRIED = (
    "Its kernels for packed rows are compiled and simulated, but no GPU has run them yet: check its answers there."
)


def recommend(source: PlannedSource, method: MethodOptions) -> tuple[Candidate, str]:
    """The conversion to make, and why. A method that loses nothing packs the source's own numbers.

    Raises:
        ConversionError: the source or the method has no room for a quarter of the bytes.
    """
    shape = source.shape
    if method_of(method).lossless:
        chosen = asked(shape, method, CacheSizes(latent_bits=4))
        why = f"--method {method.name} keeps all numbers. In 4 bits they take {_share(chosen.ratio(shape))}."
    else:
        chosen = asked(shape, method, share_sizes(method, DEFAULT_CACHE_RATIO))
        why = "From a quarter of the bytes on down, vLLM's own cache formats need more bytes or lose more."
    return chosen, f"{why} {_where(chosen, source, method)}"


def advice(source: PlannedSource, command: str, exact_command: str) -> list[Advice]:
    """What to do for each share of the bytes, largest first.

    Args:
        source: the model.
        command: converts it as recommended.
        exact_command: converts it by ``exact``, in 4 bits.
    """
    shape, found = source.shape, []
    known = {cache.name: cache for cache in vllm_caches(shape)}
    if fp8 := known.get(FP8):
        found.append(
            Advice(
                cache_ratio=_own_ratio(fp8, source),
                what=f"Half of the bytes or more: convert nothing, because vLLM's {FP8} cache of the source loses "
                f"next to nothing. Served on {_names(fp8.served_on(shape.head_dim))}.",
                command=_serve(source, FP8),
            )
        )
    exact = asked(shape, ExactOptions(), CacheSizes(latent_bits=4))
    if int4 := known.get(INT4):
        found.append(
            Advice(
                cache_ratio=_own_ratio(int4, source),
                what=f"{_share(_own_ratio(int4, source))}, on GPUs: convert nothing, vLLM's {INT4} cache of the source "
                "needs no text.",
                command=_serve(source, INT4),
            )
        )
    found.append(
        Advice(
            cache_ratio=round(exact.ratio(shape), 6),
            what=f"{_share(exact.ratio(shape))}, on {_names(exact.backends(source.cache_dtype))}: all numbers in 4 "
            "bits. It needs no text; --cache-ratio 0.3125 does, and loses less.",
            command=exact_command,
        )
    )
    found.append(
        Advice(cache_ratio=DEFAULT_CACHE_RATIO, what="A quarter of the bytes or less: convert.", command=command)
    )
    return found


def _own_ratio(cache: VllmCache, source: PlannedSource) -> float:
    return round(cache.token_bytes(source.shape) / (2 * source.shape.cached * source.shape.layers), 6)


def _serve(source: PlannedSource, cache: str) -> str:
    revision = [] if source.revision is None else ["--revision", source.revision]
    return shlex.join(["vllm", "serve", source.name, "--kv-cache-dtype", cache, *revision])


def _where(chosen: Candidate, source: PlannedSource, method: MethodOptions) -> str:
    """Which hardware serves the recommended cache, and what to do for GPUs that do not."""
    shape, dtype = source.shape, source.cache_dtype
    gpus = [gpu for gpu in GPUS if gpu in chosen.backends(dtype)]
    if gpus:
        where = "on GPUs" if len(gpus) == len(GPUS) else f"on some GPUs ({', '.join(gpus)})"
        return f"CPUs serve it, and {where} {PLUGIN_BACKEND}. {UNTRIED if chosen.cache.format else ''}".rstrip()
    found = f"Only CPUs serve it: {_obstacle(chosen, dtype)}."
    for candidate in candidates(shape, method):
        ratio = candidate.ratio(shape)
        if candidate.is_vllms and ratio <= WORTHWHILE_RATIO and len(candidate.backends(dtype)) > 1:
            found += (
                f" On GPUs take {' '.join(candidate.options)}: {_share(ratio)}, in 16 bits, by vLLM's own kernels. It "
                "loses more, so heal it."
            )
            break
    return found


def _obstacle(candidate: Candidate, dtype: str) -> str:
    """Why no GPU serves a cache."""
    rope = candidate.cache.budget.qk_rope_head_dim
    if dtype == "float32":
        return "GPUs do not serve MLA in float32"
    if candidate.nope_dim + rope > MAX_PREFILL_HEAD_SIZE:
        return (
            f"prefill on GPUs takes heads of at most {MAX_PREFILL_HEAD_SIZE} numbers, and these have "
            f"{candidate.nope_dim} + {rope}"
        )
    return f"rows of {candidate.cache.budget.width:,} numbers are too wide for GPU kernels"


def _share(ratio: float) -> str:
    return f"{ratio:.1%} of the bytes"


def _names(hardware: Iterable[str]) -> str:
    """Hardware in a sentence; all GPUs together are ``GPUs``."""
    names = list(hardware)
    if set(GPUS) <= set(names):
        names = [name for name in names if name not in GPUS] + ["GPUs"]
    return " and ".join(f"{name}s" if name == CPU else name for name in names)
