"""Method ``mha2mla`` (MHA2MLA, arXiv 2502.14837)."""

from dataclasses import replace

from mla_converters.checkpoints.shape import Shape
from mla_converters.errors import ConversionError
from mla_converters.methods.asked_cache import AskedCache, asked_cache, asked_format
from mla_converters.methods.base import Cost, Job, Prepared
from mla_converters.methods.cost import Passes, conversion_cost
from mla_converters.methods.mha2mla.map import check_sizes
from mla_converters.methods.mha2mla.run import mha2mla
from mla_converters.options import WINDOW, CacheSizes, Keep, Mha2mlaOptions


class Mha2mla:
    """The method, see :class:`mla_converters.methods.base.Method`."""

    lossless = False

    def __init__(self, options: Mha2mlaOptions) -> None:
        self.options = options
        # Only this rule needs text; the other rules choose pairs by their frequencies.
        self.window = WINDOW if options.rope_keep == Keep.TWO_NORM else None

    def cache(self, shape: Shape, sizes: CacheSizes) -> AskedCache:
        cache = asked_cache(shape, sizes)
        budget = cache.budget
        if shape.qk_norm:
            raise ConversionError(
                "Method mha2mla splits keys by their projection alone, but the source normalises keys after that "
                "projection (QK-norm): use --method attention-aware."
            )
        check_sizes(shape.kv_heads, shape.head_dim, budget.qk_rope_head_dim, budget.kv_lora_rank, self.options.svd)
        return cache

    def nope_dim(self, shape: Shape) -> int:
        return shape.head_dim

    def cost(self, shape: Shape, cache: AskedCache, tokens: int) -> Cost:
        passes = Passes(tokens=tokens if self.window else 0, decompositions=1)
        return conversion_cost(shape, cache.budget, self.nope_dim(shape), passes)

    def prepare(self, job: Job) -> Prepared:
        windows = None if job.calibration is None else job.calibration.text
        format = asked_format(job.source.shape, job.sizes)
        if windows is None and format is not None:
            format = replace(format, mean=False)  # there is no text to measure it on
        return Prepared(
            [job.budget] * job.source.config.num_hidden_layers,
            mha2mla(job.source, windows, job.budget, self.options, format),
            format,
            settings=self.options.model_dump(mode="json"),
        )
