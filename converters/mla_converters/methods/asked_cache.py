"""The cache that the options ask for, before anything is searched."""

from dataclasses import dataclass

from mla_converters.checkpoints.shape import Shape
from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget, candidate_ropes, resolve_budget
from mla_converters.latent.packed_sizes import alignment_for, uniform_format, widest_uniform
from mla_converters.options import CacheSizes
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.layouts import WIDEST_PACKED_LATENT

BYTES_OF_16_BITS = 2
TYPICAL_BITS = 4  # where the bytes do not hold all of the source's numbers
MORE_BITS = (8, 6, 5)  # where they do


@dataclass(frozen=True)
class AskedCache:
    """What is known of a cache before anything is searched.

    Attributes:
        budget: its sizes.
        format: how it is packed; None for numbers of 16 bits.
        searched_bytes: bytes of a token in a layer, if sizes and bits are still to be searched for them; then
            ``budget`` and ``format`` are only typical. None if nothing is searched that the format depends on.
    """

    budget: CacheBudget
    format: CacheFormat | None = None
    searched_bytes: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in a layer; numbers that are not packed take 16 bits."""
        if self.searched_bytes is not None:
            return self.searched_bytes
        return BYTES_OF_16_BITS * self.budget.width if self.format is None else self.format.bytes_per_token


def row_bytes(shape: Shape, sizes: CacheSizes) -> int:
    """The bytes that a token may take in a layer."""
    return int(sizes.share * BYTES_OF_16_BITS * shape.cached)


def asked_format(shape: Shape, sizes: CacheSizes) -> CacheFormat | None:
    """The packed format that the options give; None for numbers of 16 bits, or if bits are left open.

    Raises:
        ConversionError: the sizes do not fit the source.
    """
    if (given := sizes.format) is not None:
        try:
            resolve_budget(shape.kv_heads, shape.head_dim, *given.sizes)
        except ConversionError as error:
            raise ConversionError(f"--latent-cache packs sizes that the source cannot have: {error}") from error
        return given
    if sizes.uniform_bits == BYTES_OF_16_BITS * 8:
        return None
    if sizes.kv_lora_rank is not None:
        budget = resolve_budget(shape.kv_heads, shape.head_dim, sizes.kv_lora_rank, sizes.qk_rope_head_dim)
        return uniform_format(budget.kv_lora_rank, budget.qk_rope_head_dim, sizes.uniform_bits)
    return uniform_row(shape, sizes, sizes.uniform_bits)


def uniform_row(shape: Shape, sizes: CacheSizes, bits: int) -> CacheFormat:
    """The widest format with so many bits for every number in the bytes that were asked for.

    Raises:
        ConversionError: the sizes do not fit the source, or the bytes are too few.
    """
    rope, row = _usual_rope(shape, sizes, bits), row_bytes(shape, sizes)
    format = widest_uniform(rope, bits, row, shape.cached - rope)
    if format is None:
        raise ConversionError(too_few_bytes(row))
    return format


def _usual_rope(shape: Shape, sizes: CacheSizes, bits: int) -> int:
    """The width of the rotary key that is given, or usual beside as many numbers as fit with so many bits."""
    numbers = min(1.0, sizes.share * BYTES_OF_16_BITS * 8 / bits)
    return resolve_budget(shape.kv_heads, shape.head_dim, None, sizes.qk_rope_head_dim, numbers).qk_rope_head_dim


def searched_cache(shape: Shape, sizes: CacheSizes) -> AskedCache:
    """A cache whose format is searched, with a typical format: the same bits for every number.

    If no bits were given, there are as many as all numbers fit with that the search may keep, but at least 4. Where the
    bytes hold about all of them, the rotary key is the widest that is searched.

    Raises:
        ConversionError: the sizes do not fit the source, or the bytes are too few.
    """
    if sizes.qk_rope_head_dim is not None:
        resolve_budget(shape.kv_heads, shape.head_dim, 1, sizes.qk_rope_head_dim)  # raises if it does not fit
    row, widest = row_bytes(shape, sizes), max(candidate_ropes(shape.kv_heads, shape.head_dim))
    rope = sizes.qk_rope_head_dim or widest
    fitting = (bits for bits in MORE_BITS if _whole_format(shape, rope, bits).bytes_per_token <= row)
    bits = sizes.latent_bits or next(fitting, TYPICAL_BITS)
    if 8 * row < bits * sum(_whole_format(shape, rope, bits).sizes):
        rope = _usual_rope(shape, sizes, bits)
    whole = _whole_format(shape, rope, bits)
    format = widest_uniform(rope, bits, row, whole.sizes[0])
    if format is None:
        raise ConversionError(too_few_bytes(row))
    most = _whole_format(shape, rope, sizes.latent_bits or MORE_BITS[0]).bytes_per_token
    return AskedCache(CacheBudget(*format.sizes), format, min(row - row % alignment_for(row), most))


def _whole_format(shape: Shape, rope: int, bits: int) -> CacheFormat:
    """The format with the widest latent that a search considers beside a rotary key."""
    return uniform_format(min(shape.cached - rope, WIDEST_PACKED_LATENT), rope, bits)


def uniform_cache(shape: Shape, sizes: CacheSizes, bits: int) -> AskedCache:
    """A cache with as many bits for every number, in a share of the source's bytes; raises as :func:`uniform_row`."""
    format = uniform_row(shape, sizes, bits)
    return AskedCache(CacheBudget(*format.sizes), format)


def asked_cache(shape: Shape, sizes: CacheSizes) -> AskedCache:
    """A cache whose format is not searched.

    Raises:
        ConversionError: the sizes do not fit the source.
    """
    return AskedCache(asked_budget(shape, sizes), asked_format(shape, sizes))


def too_few_bytes(row: int) -> str:
    """What to say if nothing fits into a token's row."""
    return f"A cache of {row} bytes per token and layer has no room for a latent: give a larger --cache-ratio."


def asked_budget(shape: Shape, sizes: CacheSizes) -> CacheBudget:
    """The cache's sizes, where :func:`resolve_budget` chooses those that the user did not give.

    Raises:
        ConversionError: the sizes do not fit the source.
    """
    format = asked_format(shape, sizes)
    if format is not None:
        return CacheBudget(*format.sizes)
    return resolve_budget(shape.kv_heads, shape.head_dim, sizes.kv_lora_rank, sizes.qk_rope_head_dim, sizes.cache_ratio)
