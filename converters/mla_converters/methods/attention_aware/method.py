"""Method ``attention-aware``: keep RoPE, and fill the latent, where attention would lose most."""

from mla_converters.checkpoints.shape import Shape
from mla_converters.latent.cache_size import CacheBudget, candidate_budgets, exact_budget
from mla_converters.methods.attention_aware.amounts import WINDOW, enough_text, too_little_text
from mla_converters.methods.attention_aware.cost import attention_aware_cost
from mla_converters.methods.attention_aware.layer import Settings
from mla_converters.methods.attention_aware.layer_sizes import measured_sizes
from mla_converters.methods.attention_aware.refit import Refit
from mla_converters.methods.attention_aware.run import attention_aware
from mla_converters.methods.attention_aware.split import search_split
from mla_converters.methods.base import Cost, Job, Prepared, asked_budget
from mla_converters.options import AttentionAwareOptions, CacheSizes, Ingredient, LayerSizes
from mla_converters.reports.conversion import Search


class AttentionAware:
    """The method, see :class:`mla_converters.methods.base.Method`."""

    window = WINDOW
    lossless = False

    def __init__(self, options: AttentionAwareOptions) -> None:
        self.options = options

    def budget(self, shape: Shape, sizes: CacheSizes) -> CacheBudget:
        return asked_budget(shape, sizes)

    def nope_dim(self, shape: Shape) -> int:
        return shape.head_dim

    def cost(self, shape: Shape, budget: CacheBudget, tokens: int) -> Cost:
        return attention_aware_cost(self.options, shape, budget, tokens)

    def prepare(self, job: Job) -> Prepared:
        options, source, calibration, budget = self.options, job.source, job.calibration, job.budget
        assert calibration is not None, "the method has a window"
        settings = Settings(Refit(options.refit_steps), options.without, job.seed)
        heads, head_dim = source.config.num_key_value_heads, source.head_dim
        searches = []
        both_open = job.sizes.qk_rope_head_dim is None and job.sizes.kv_lora_rank is None
        if both_open and Ingredient.SEARCH not in options.without:
            splits = candidate_budgets(heads, head_dim, budget)
            record = job.work.record("search")
            budget, errors = search_split(source, calibration, splits, settings, job.device, job.progress, record)
            named = {f"{b.kv_lora_rank}+{b.qk_rope_head_dim}": round(error, 6) for b, error in errors.items()}
            searches = [Search(title="latent + rotary", errors=named)]
        warnings = []
        read, lossless = source.config.num_attention_heads * head_dim, budget == exact_budget(heads, head_dim)
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
            settings={"refit_steps": options.refit_steps, "without": sorted(options.without)},
            searches=searches,
            warnings=warnings,
        )
