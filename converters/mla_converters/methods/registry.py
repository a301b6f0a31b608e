"""From options to converted layers: sizes, calibration, and the method's own loop."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from mla_converters.checkpoints.source import Source
from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget, candidate_budgets, exact_budget, resolve_budget
from mla_converters.latent.maps import mla_weights
from mla_converters.methods.attention_aware.layer_sizes import LayerSizes, measured_sizes
from mla_converters.methods.attention_aware.refit import Refit
from mla_converters.methods.attention_aware.run import WINDOW as ATTENTION_AWARE_WINDOW
from mla_converters.methods.attention_aware.run import (
    AttentionAware,
    Ingredient,
    attention_aware,
    enough_text,
    fits_outputs,
    search_split,
    too_little_text,
)
from mla_converters.methods.base import ConvertedLayer, LayerConversion
from mla_converters.methods.exact import exact_map
from mla_converters.methods.mha2mla.map import check_sizes
from mla_converters.methods.mha2mla.run import Mha2mlaOptions, mha2mla
from mla_converters.methods.transmla.map import fits_freqfold, freqfold_candidates
from mla_converters.methods.transmla.run import search_freqfold, transmla
from mla_converters.options import Method, Options
from mla_converters.resume.work_folder import Work
from mla_converters.text.calibration import WINDOW, calibration_windows, random_tokens

Details = dict[str, Any]
"""What the report says of a conversion."""


@dataclass(frozen=True)
class Prepared:
    """A conversion whose sizes are settled.

    Attributes:
        budget: the cache's sizes; where they differ between layers, the largest.
        budgets: each layer's.
        conversion: converts the layers.
        details: what the report says so far.
    """

    budget: CacheBudget
    budgets: list[CacheBudget]
    conversion: LayerConversion
    details: Details


def asked_budget(source: Source, options: Options) -> CacheBudget:
    """The cache's sizes as asked for, before any search.

    Raises:
        ConversionError: they do not fit the source or the method.
    """
    heads, head_dim = source.config.num_key_value_heads, source.head_dim
    if options.method == Method.EXACT:
        if (options.kv_lora_rank, options.qk_rope_head_dim, options.cache_ratio) != (None, None, None):
            raise ConversionError(
                "Method exact keeps the whole cache: leave out --kv-lora-rank, --qk-rope-head-dim and "
                "--cache-ratio, or use another --method."
            )
        return exact_budget(heads, head_dim)
    budget = resolve_budget(heads, head_dim, options.kv_lora_rank, options.qk_rope_head_dim, options.cache_ratio)
    if options.method == Method.TRANSMLA:
        _check_freqfold(options.freqfold, budget, head_dim)
    if options.method == Method.MHA2MLA:
        _check_mha2mla(source, budget, options)
    return budget


def prepare(source: Source, budget: CacheBudget, options: Options, work: Work, progress: Progress) -> Prepared:
    """Calibrate and search, or take up what an earlier run found."""
    details: Details = {}
    windows = None
    if _calibrated(options):
        windows, details = _calibrate(source, options, work, progress)
    budgets = [budget] * source.config.num_hidden_layers
    if options.method == Method.EXACT:
        return Prepared(budget, budgets, exact(source), details)
    if options.method == Method.MHA2MLA:
        method = _mha2mla_options(options)
        details |= {"rope_keep": method.keep, "svd": method.svd}
        return Prepared(budget, budgets, mha2mla(source, windows, budget, method), details)
    assert windows is not None
    if options.method == Method.TRANSMLA:
        fold = options.freqfold
        if fold is None:
            record = work.record("search")
            fold, errors = search_freqfold(source, windows, budget, options.device, progress, record)
            details["freqfold_errors"] = {str(k): round(v, 6) for k, v in errors.items()}
        details["freqfold"] = fold
        return Prepared(budget, budgets, transmla(source, windows, budget, fold), details)
    random = random_tokens(source, (1, windows.shape[1]), torch.Generator().manual_seed(options.seed))
    return _attention_aware(source, torch.cat((windows, random)), budget, options, details, work, progress)


def _calibrated(options: Options) -> bool:
    if options.method == Method.MHA2MLA:
        return _mha2mla_options(options).calibrated
    return options.method != Method.EXACT


def _calibrate(source: Source, options: Options, work: Work, progress: Progress) -> tuple[torch.Tensor, Details]:
    """Calibration windows ``[windows, tokens]``, and what the report says of them."""
    length = ATTENTION_AWARE_WINDOW if options.method == Method.ATTENTION_AWARE else WINDOW
    windows = work.remembered(
        "calibration",
        lambda: calibration_windows(
            source, options.calibration, options.calibration_tokens, options.seed, progress, length
        ),
    )
    details: Details = {
        "calibration": {
            "origins": [Path(origin).name for origin in options.calibration],
            "tokens": windows.numel(),
            "seed": options.seed,
        }
    }
    return windows, details


def _check_freqfold(freqfold: int | None, budget: CacheBudget, head_dim: int) -> None:
    candidates = freqfold_candidates(head_dim, budget.qk_rope_head_dim)
    if freqfold is not None and (freqfold < 1 or not fits_freqfold(freqfold, budget.qk_rope_head_dim, head_dim)):
        raise ConversionError(
            f"--freqfold {freqfold} does not fit {budget.qk_rope_head_dim} rotary dimensions of heads of "
            f"{head_dim}; choose one of {', '.join(map(str, candidates))}."
        )


def _mha2mla_options(options: Options) -> Mha2mlaOptions:
    return Mha2mlaOptions(options.rope_keep or Mha2mlaOptions.keep, options.svd or Mha2mlaOptions.svd)


def _check_mha2mla(source: Source, budget: CacheBudget, options: Options) -> None:
    if source.has_qk_norm:
        raise ConversionError(
            "Method mha2mla takes keys apart by their projection alone, and the source normalises keys after it "
            "(QK-norm): use --method attention-aware."
        )
    svd = _mha2mla_options(options).svd
    check_sizes(source.config.num_key_value_heads, source.head_dim, budget.qk_rope_head_dim, budget.kv_lora_rank, svd)


def _attention_aware(
    source: Source,
    windows: torch.Tensor,
    budget: CacheBudget,
    options: Options,
    details: Details,
    work: Work,
    progress: Progress,
) -> Prepared:
    method = AttentionAware(Refit(options.refit_steps), options.without, options.seed)
    if options.qk_rope_head_dim is None and options.kv_lora_rank is None and Ingredient.SEARCH not in options.without:
        budgets = candidate_budgets(source.config.num_key_value_heads, source.head_dim, budget)
        record = work.record("search")
        budget, errors = search_split(source, windows, budgets, method, options.device, progress, record)
        details["split_errors"] = {f"{b.kv_lora_rank}+{b.qk_rope_head_dim}": round(e, 6) for b, e in errors.items()}
    details |= {"refit_steps": options.refit_steps, "without": sorted(options.without)}
    lossless = budget == exact_budget(source.config.num_key_value_heads, source.head_dim)
    read = source.config.num_attention_heads * source.head_dim
    if fits_outputs(method) and not lossless and not enough_text(windows[:-1].numel(), read, windows.shape[1]):
        details["warnings"] = [too_little_text(read)]
    sizes = [budget] * source.config.num_hidden_layers
    if options.layer_sizes == LayerSizes.MEASURED:
        record = work.record("sizes")
        sizes = measured_sizes(source, windows, budget, method, options.device, progress, record)
        budget = CacheBudget(max(b.kv_lora_rank for b in sizes), max(b.qk_rope_head_dim for b in sizes))
        details["kv_lora_ranks"] = [b.kv_lora_rank for b in sizes]
        details["qk_rope_head_dims"] = [b.qk_rope_head_dim for b in sizes]
    return Prepared(budget, sizes, attention_aware(source, windows, sizes, method), details)


def exact(source: Source) -> LayerConversion:
    """Method ``exact``, ready to convert layers."""
    freqs, _ = source.rope
    maps = exact_map(source.config.num_key_value_heads, source.head_dim, freqs)
    return LayerConversion(dict, lambda layer, _: ConvertedLayer(mla_weights(layer.attention_weights, maps)))
