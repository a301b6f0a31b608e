"""Candidate caches that a conversion of a source can have, with the options that ask for them."""

from dataclasses import dataclass

from mla_converters.checkpoints.shape import Shape
from mla_converters.errors import ConversionError
from mla_converters.methods.asked_cache import TYPICAL_BITS, AskedCache
from mla_converters.methods.registry import method_of
from mla_converters.options import (
    AttentionAwareOptions,
    CacheSizes,
    ExactOptions,
    LayerSizes,
    MethodOptions,
    given_options,
)
from mla_converters.options.convert import DEFAULT_CACHE_RATIO
from mla_converters.planning.serving import serving_backends
from vllm_mla_plugin.checkpoint.layouts import VLLM_LAYOUTS

SHARES = (DEFAULT_CACHE_RATIO, 0.5, 0.3125, 0.1875, 0.125, 0.0625)
"""The recommended one first: of several that come to the same cache, because a search keeps no more, it is listed."""
EXACT_BITS = (8, 4)


@dataclass(frozen=True)
class Candidate:
    """A cache that a conversion can have.

    Attributes:
        method: the method that makes it, with its options.
        sizes: what to ask it for.
        cache: what is known of the cache before anything is searched.
        nope_dim: ``qk_nope_head_dim`` of the converted model.
    """

    method: MethodOptions
    sizes: CacheSizes
    cache: AskedCache
    nope_dim: int

    @property
    def options(self) -> tuple[str, ...]:
        """The options of ``vllm-mla convert`` that ask for the cache, without those of the method."""
        named = ("--method", self.method.name) if self.method.name == ExactOptions.name else ()
        return (*named, *given_options(self.sizes))

    @property
    def is_vllms(self) -> bool:
        """Whether vLLM has GPU kernels of its own for the cache."""
        budget = self.cache.budget
        plain = self.cache.format is None and not sizes_differ(self.method)
        return plain and (budget.kv_lora_rank, budget.qk_rope_head_dim) in VLLM_LAYOUTS

    def ratio(self, shape: Shape) -> float:
        """The cache's bytes as a share of the source's in 16 bits."""
        return self.cache.row_bytes / (2 * shape.cached)

    def backends(self, dtype: str) -> dict[str, list[str]]:
        """Who serves it, see :func:`mla_converters.planning.serving.serving_backends`."""
        return serving_backends(self.cache, self.nope_dim, dtype, sizes_differ(self.method))


def sizes_differ(method: MethodOptions) -> bool:
    """Whether a method gives its layers different sizes."""
    return isinstance(method, AttentionAwareOptions) and method.layer_sizes == LayerSizes.MEASURED


def candidates(shape: Shape, method: MethodOptions) -> list[Candidate]:
    """The caches to compare, largest first.

    These are shares of the source's bytes; the sizes of vLLM's own fast GPU kernels, in 16 bits, if they are smaller
    than the source's cache; and the source's own numbers in 8 and 4 bits, by method ``exact``.

    Args:
        shape: of the source.
        method: the method that makes all but the last, with its options.
    """
    exact = [asked(shape, ExactOptions(), CacheSizes(latent_bits=bits)) for bits in EXACT_BITS]
    if method_of(method).lossless:
        return exact
    layouts = [layout for layout in VLLM_LAYOUTS if sum(layout) < shape.cached]
    wanted = [CacheSizes(kv_lora_rank=latent, qk_rope_head_dim=rope) for latent, rope in layouts]
    found = {candidate.cache: candidate for candidate in exact}
    for sizes in (*(share_sizes(method, ratio) for ratio in SHARES), *wanted):
        try:
            candidate = asked(shape, method, sizes)
        except ConversionError:  # a tiny source has no room for so little, and some methods do not take all sizes
            continue
        found.setdefault(candidate.cache, candidate)
    return sorted(found.values(), key=lambda candidate: -candidate.cache.row_bytes)


def share_sizes(method: MethodOptions, ratio: float) -> CacheSizes:
    """What to ask a method for, to get a share of the source's bytes.

    The default method chooses bits by itself, except for layers of different sizes, which are not packed. The others
    get the same bits for every number.
    """
    if not isinstance(method, AttentionAwareOptions):
        return CacheSizes(cache_ratio=ratio, latent_bits=TYPICAL_BITS)
    return CacheSizes(cache_ratio=ratio, latent_bits=16 if sizes_differ(method) else None)


def asked(shape: Shape, method: MethodOptions, sizes: CacheSizes) -> Candidate:
    """The candidate for some sizes.

    Raises:
        ConversionError: they do not fit the source or the method.
    """
    made = method_of(method)
    return Candidate(method, sizes, made.cache(shape, sizes), made.nope_dim(shape))
