"""From options to converted layers: sizes, calibration, and the method's own loop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from mla_converters.attention_aware_run import WINDOW as ATTENTION_AWARE_WINDOW
from mla_converters.attention_aware_run import AttentionAware, Ingredient, attention_aware_layers, search_split
from mla_converters.budget import CacheBudget, candidate_budgets, exact_budget, resolve_budget
from mla_converters.calibration import WINDOW, calibration_windows
from mla_converters.errors import ConversionError
from mla_converters.latent_map import mla_weights
from mla_converters.layer_sizes import LayerSizes, measured_sizes
from mla_converters.methods.exact import exact_map
from mla_converters.methods.mha2mla import check_sizes
from mla_converters.methods.transmla import fits_freqfold, freqfold_candidates
from mla_converters.mha2mla_run import Mha2mlaOptions, mha2mla_layers
from mla_converters.options import Method, Options
from mla_converters.refit import Refit
from mla_converters.source import Source
from mla_converters.transmla_run import search_freqfold, transmla_layers

Layers = Iterator[dict[str, torch.Tensor]]
"""The converted projections of each layer, named as below ``self_attn.``."""


def converted_layers(
    source: Source, options: Options, progress: Progress
) -> tuple[CacheBudget, Layers, dict[str, Any]]:
    """The cache's sizes, the converted projections of every layer, and what the report says of them."""
    heads, head_dim = source.config.num_key_value_heads, source.head_dim
    if options.method == Method.EXACT:
        if (options.kv_lora_rank, options.qk_rope_head_dim, options.cache_ratio) != (None, None, None):
            raise ConversionError(
                "Method exact keeps the whole cache: leave out --kv-lora-rank, --qk-rope-head-dim and "
                "--cache-ratio, or use another --method."
            )
        return exact_budget(heads, head_dim), _exact_layers(source), {}
    budget = resolve_budget(heads, head_dim, options.kv_lora_rank, options.qk_rope_head_dim, options.cache_ratio)
    if options.method == Method.TRANSMLA:
        _check_freqfold(options.freqfold, budget, head_dim)
    if options.method == Method.MHA2MLA:
        return budget, *_mha2mla(source, budget, options, progress)
    windows, details = _calibrate(source, options, progress)
    if options.method == Method.TRANSMLA:
        return budget, *_transmla(source, windows, budget, options, details, progress)
    return _attention_aware(source, windows, budget, options, details, progress)


def _calibrate(source: Source, options: Options, progress: Progress) -> tuple[torch.Tensor, dict[str, Any]]:
    """Calibration windows ``[windows, tokens]``, and what the report says of them."""
    length = ATTENTION_AWARE_WINDOW if options.method == Method.ATTENTION_AWARE else WINDOW
    windows = calibration_windows(
        source, options.calibration, options.calibration_tokens, options.seed, progress, length
    )
    details: dict[str, Any] = {
        "calibration": {
            "origin": "self" if options.calibration == "self" else Path(options.calibration).name,
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


def _transmla(
    source: Source,
    windows: torch.Tensor,
    budget: CacheBudget,
    options: Options,
    details: dict[str, Any],
    progress: Progress,
) -> tuple[Layers, dict[str, Any]]:
    fold = options.freqfold
    if fold is None:
        fold, errors = search_freqfold(source, windows, budget, options.device, progress)
        details["freqfold_errors"] = {str(k): round(v, 6) for k, v in errors.items()}
    details["freqfold"] = fold
    return transmla_layers(source, windows, budget, fold, options.device), details


def _mha2mla(
    source: Source, budget: CacheBudget, options: Options, progress: Progress
) -> tuple[Layers, dict[str, Any]]:
    method = Mha2mlaOptions(options.rope_keep or Mha2mlaOptions.keep, options.svd or Mha2mlaOptions.svd)
    if source.has_qk_norm:
        raise ConversionError(
            "Method mha2mla takes keys apart by their projection alone, and the source normalises keys after it "
            "(QK-norm): use --method attention-aware."
        )
    heads, head_dim = source.config.num_key_value_heads, source.head_dim
    check_sizes(heads, head_dim, budget.qk_rope_head_dim, budget.kv_lora_rank, method.svd)
    windows, details = None, dict[str, Any]()
    if method.calibrated:
        windows, details = _calibrate(source, options, progress)
    details |= {"rope_keep": method.keep, "svd": method.svd}
    return mha2mla_layers(source, windows, budget, method, options.device), details


def _attention_aware(
    source: Source,
    windows: torch.Tensor,
    budget: CacheBudget,
    options: Options,
    details: dict[str, Any],
    progress: Progress,
) -> tuple[CacheBudget, Layers, dict[str, Any]]:
    method = AttentionAware(Refit(options.refit_steps), options.without, options.seed)
    if options.qk_rope_head_dim is None and options.kv_lora_rank is None and Ingredient.SEARCH not in options.without:
        budgets = candidate_budgets(source.config.num_key_value_heads, source.head_dim, budget)
        budget, errors = search_split(source, windows, budgets, method, options.device, progress)
        details["split_errors"] = {f"{b.kv_lora_rank}+{b.qk_rope_head_dim}": round(e, 6) for b, e in errors.items()}
    details |= {"refit_steps": options.refit_steps, "without": sorted(options.without)}
    sizes = [budget] * source.config.num_hidden_layers
    if options.layer_sizes == LayerSizes.MEASURED:
        sizes = measured_sizes(source, windows, budget, method, options.device, progress)
        budget = CacheBudget(max(b.kv_lora_rank for b in sizes), max(b.qk_rope_head_dim for b in sizes))
        details["kv_lora_ranks"] = [b.kv_lora_rank for b in sizes]
        details["qk_rope_head_dims"] = [b.qk_rope_head_dim for b in sizes]
    return budget, attention_aware_layers(source, windows, sizes, method, options.device), details


def _exact_layers(source: Source) -> Layers:
    """Every layer's converted projections, with method ``exact``."""
    freqs, _ = source.rope
    exact = exact_map(source.config.num_key_value_heads, source.head_dim, freqs)
    for index in range(source.config.num_hidden_layers):
        yield mla_weights(source.attention_weights(index), exact)
