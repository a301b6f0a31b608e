"""Method ``attention-aware``: it keeps the rotary components and latent directions that attention would miss most."""

from collections.abc import Sequence
from dataclasses import replace

from mla_converters.checkpoints.shape import Shape
from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget, candidate_budgets, candidate_ropes, exact_budget
from mla_converters.latent.packed_sizes import rounding_cost, suited_format, widest_uniform
from mla_converters.methods.asked_cache import (
    TYPICAL_BITS,
    AskedCache,
    asked_cache,
    row_bytes,
    searched_cache,
    too_few_bytes,
    uniform_cache,
)
from mla_converters.methods.attention_aware.amounts import WINDOW, enough_text, too_little_text
from mla_converters.methods.attention_aware.cost import attention_aware_cost
from mla_converters.methods.attention_aware.format_search import FormatFor, search_format
from mla_converters.methods.attention_aware.layer import Settings
from mla_converters.methods.attention_aware.layer_sizes import measured_sizes
from mla_converters.methods.attention_aware.refit import Refit
from mla_converters.methods.attention_aware.run import attention_aware
from mla_converters.methods.attention_aware.split import search_split
from mla_converters.methods.base import Cost, Job, Prepared
from mla_converters.options import AttentionAwareOptions, CacheSizes, Ingredient, LayerSizes
from mla_converters.reports.conversion import Search
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat


class AttentionAware:
    """The method, see :class:`mla_converters.methods.base.Method`."""

    window = WINDOW
    lossless = False

    def __init__(self, options: AttentionAwareOptions) -> None:
        self.options = options

    def cache(self, shape: Shape, sizes: CacheSizes) -> AskedCache:
        if sizes.format is not None or sizes.kv_lora_rank is not None or sizes.latent_bits == 16:
            cache = asked_cache(shape, sizes)
        elif Ingredient.SEARCH in self.options.without:
            cache = uniform_cache(shape, sizes, sizes.latent_bits or TYPICAL_BITS)
        else:
            cache = searched_cache(shape, sizes)
        if cache.format is not None and self.options.layer_sizes == LayerSizes.MEASURED:
            raise ConversionError("--layer-sizes measured is for numbers of 16 bits: give --latent-bits 16 too.")
        return cache

    def nope_dim(self, shape: Shape) -> int:
        return shape.head_dim

    def cost(self, shape: Shape, cache: AskedCache, tokens: int) -> Cost:
        return attention_aware_cost(self.options, shape, cache, tokens)

    def prepare(self, job: Job) -> Prepared:
        options, source, calibration = self.options, job.source, job.calibration
        assert calibration is not None, "the method has a window"
        settings = Settings(Refit(options.refit_steps), options.without, job.seed)
        format, searches = self._format(job, settings)
        budget = job.budget if format is None else CacheBudget(*format.sizes)
        settings = replace(settings, cache_format=format)
        heads, head_dim = source.config.num_key_value_heads, source.head_dim
        both_open = job.sizes.qk_rope_head_dim is None and job.sizes.kv_lora_rank is None
        if format is None and both_open and Ingredient.SEARCH not in options.without:
            splits = candidate_budgets(heads, head_dim, budget)
            record = job.work.record("search")
            budget, errors = search_split(source, calibration, splits, settings, job.device, job.progress, record)
            named = {f"{b.kv_lora_rank}+{b.qk_rope_head_dim}": round(error, 6) for b, error in errors.items()}
            searches = [Search(title="latent + rotary", errors=named)]
        warnings = []
        read = source.config.num_attention_heads * head_dim
        lossless = format is None and budget == exact_budget(heads, head_dim)
        text = calibration.text
        if settings.fits_outputs and not lossless and not enough_text(text.numel(), read, text.shape[1]):
            warnings = [too_little_text(read)]
        budgets = [budget] * source.config.num_hidden_layers
        if options.layer_sizes == LayerSizes.MEASURED:
            record = job.work.record("sizes")
            budgets = measured_sizes(source, calibration, budget, settings, job.device, job.progress, record)
        return Prepared(
            budgets,
            attention_aware(source, calibration, budgets, settings),
            format,
            settings={"refit_steps": options.refit_steps, "without": sorted(options.without)},
            searches=searches,
            warnings=warnings,
        )

    def _format(self, job: Job, settings: Settings) -> tuple[CacheFormat | None, list[Search]]:
        """The cache's packed format, if it has one, and the search that found it.

        Raises:
            ConversionError: nothing fits into the bytes that were asked for.
        """
        sizes, shape = job.sizes, job.source.shape
        cache = self.cache(shape, sizes)
        if cache.searched_bytes is None:
            return cache.format, []
        row = row_bytes(shape, sizes)
        ropes = [sizes.qk_rope_head_dim] if sizes.qk_rope_head_dim else candidate_ropes(shape.kv_heads, shape.head_dim)
        assert job.calibration is not None, "the method has a window"
        found = search_format(
            job.source,
            job.calibration,
            ropes,
            self._format_for(sizes, shape, row),
            settings,
            job.device,
            job.progress,
            job.work,
        )
        if not found:
            raise ConversionError(too_few_bytes(row))
        named = {format.spec: round(error, 6) for format, error in found.items()}
        return min(found, key=lambda format: found[format]), [Search(title="cache format", errors=named)]

    def _format_for(self, sizes: CacheSizes, shape: Shape, row: int) -> FormatFor:
        """What to try for each width of the rotary key: the best bits for each component, or as many for all."""
        if sizes.latent_bits is None:
            return lambda rope, latent, pairs: suited_format(latent, pairs, row)
        bits = sizes.latent_bits

        def uniform(rope: int, latent: Sequence[float], pairs: Sequence[float]) -> tuple[CacheFormat, float] | None:
            format = widest_uniform(rope, bits, row, len(latent))
            return None if format is None else (format, rounding_cost(format, latent, pairs))

        return uniform
