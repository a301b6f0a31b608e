"""Method ``transmla`` (TransMLA, arXiv 2502.07864)."""

from mla_converters.checkpoints.shape import Shape
from mla_converters.errors import ConversionError
from mla_converters.methods.asked_cache import AskedCache, asked_cache, asked_format
from mla_converters.methods.base import Cost, Job, Prepared
from mla_converters.methods.cost import Passes, conversion_cost
from mla_converters.methods.transmla.map import fits_freqfold, freqfold_candidates
from mla_converters.methods.transmla.run import SOURCE_WINDOWS, search_freqfold, transmla
from mla_converters.options import WINDOW, CacheSizes, TransmlaOptions
from mla_converters.reports.conversion import Search

SEARCH = 1e-3  # core-seconds per layer and number in a token's queries (``H * d``), to search FreqFold


class Transmla:
    """The method, see :class:`mla_converters.methods.base.Method`."""

    window = WINDOW
    lossless = False

    def __init__(self, options: TransmlaOptions) -> None:
        self.options = options

    def cache(self, shape: Shape, sizes: CacheSizes) -> AskedCache:
        cache, fold = asked_cache(shape, sizes), self.options.freqfold
        rope, head_dim = cache.budget.qk_rope_head_dim, shape.head_dim
        candidates = freqfold_candidates(head_dim, rope)
        if fold is not None and (fold < 1 or not fits_freqfold(fold, rope, head_dim)):
            raise ConversionError(
                f"--freqfold {fold} does not fit {rope} rotary dimensions of heads of {head_dim}; choose one of "
                f"{', '.join(map(str, candidates))}."
            )
        return cache

    def nope_dim(self, shape: Shape) -> int:
        return shape.head_dim

    def cost(self, shape: Shape, cache: AskedCache, tokens: int) -> Cost:
        search = SEARCH * shape.query_heads * shape.head_dim
        passes = Passes(tokens=tokens + SOURCE_WINDOWS * WINDOW, search=search, decompositions=8)
        return conversion_cost(shape, cache.budget, self.nope_dim(shape), passes)

    def prepare(self, job: Job) -> Prepared:
        assert job.calibration is not None, "the method has a window"
        windows, fold, searches = job.calibration.text, self.options.freqfold, []
        if fold is None:
            record = job.work.record("search")
            fold, errors = search_freqfold(job.source, windows, job.budget, job.device, job.progress, record)
            searches = [Search(title="FreqFold", errors={str(k): round(v, 6) for k, v in errors.items()})]
        format = asked_format(job.source.shape, job.sizes)
        return Prepared(
            [job.budget] * job.source.config.num_hidden_layers,
            transmla(job.source, windows, job.budget, fold, format),
            format,
            settings={"freqfold": fold},
            searches=searches,
        )
