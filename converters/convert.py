"""The conversion, start to end. :func:`convert` is the Python API behind ``vllm-mla convert``."""

import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import vllm_mla_plugin
from mla_converters.attention_aware_run import WINDOW as ATTENTION_AWARE_WINDOW
from mla_converters.attention_aware_run import AttentionAware, Ingredient, attention_aware_layers, search_split
from mla_converters.budget import CacheBudget, candidate_budgets, exact_budget, resolve_budget
from mla_converters.calibration import WINDOW, calibration_windows
from mla_converters.errors import ConversionError
from mla_converters.families import active_window
from mla_converters.latent_map import mla_weights
from mla_converters.layer_sizes import LayerSizes, measured_sizes
from mla_converters.layers import softmax_scale, source_frequencies
from mla_converters.methods.exact import exact_map
from mla_converters.methods.mha2mla import Keep, Svd, check_sizes
from mla_converters.methods.transmla import fits_freqfold, freqfold_candidates
from mla_converters.mha2mla_run import Mha2mlaOptions, mha2mla_layers
from mla_converters.refit import Refit
from mla_converters.source import Source, open_source
from mla_converters.transmla_run import search_freqfold, transmla_layers
from mla_converters.writer import ShardWriter, output_folder, write_json

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Method(StrEnum):
    """Conversion methods."""

    EXACT = "exact"
    TRANSMLA = "transmla"
    MHA2MLA = "mha2mla"
    ATTENTION_AWARE = "attention-aware"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What a conversion is asked to do; the defaults are those of the command line.

    Attributes:
        method: which method.
        kv_lora_rank, qk_rope_head_dim, cache_ratio: see :func:`mla_converters.budget.resolve_budget`.
        freqfold: neighbouring frequencies treated as one (``transmla``), or None to search.
        layer_sizes: ``same`` in all layers, or ``measured`` for the same total (``attention-aware``).
        rope_keep, svd: see :class:`mla_converters.mha2mla_run.Mha2mlaOptions`; None for its defaults.
        refit_steps: of Adam for each layer (``attention-aware``); 0 for the closed form alone.
        without: ingredients of ``attention-aware`` to leave out.
        calibration: a text file, or ``self`` for text sampled from the model.
        calibration_tokens: how many tokens calibrate.
        seed: of calibration.
        dtype: of the written weights; None keeps the source's.
        device: where layers run.
        max_context: limit on the context of the converted model, as a sliding window needs.
    """

    method: Method = Method.ATTENTION_AWARE
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    cache_ratio: float | None = None
    freqfold: int | None = None
    rope_keep: Keep | None = None
    svd: Svd | None = None
    refit_steps: int = Refit.steps
    without: frozenset[Ingredient] = frozenset()
    layer_sizes: LayerSizes = LayerSizes.SAME
    calibration: str = "self"
    calibration_tokens: int = 16384
    seed: int = 0
    dtype: str | None = None
    device: str = "cpu"
    max_context: int | None = None


def convert(
    source: str,
    out: Path,
    options: Options,
    *,
    revision: str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Convert a GQA or MHA checkpoint to MLA.

    Args:
        source: a Hugging Face folder, a hub id, or a ``.gguf`` file.
        out: folder to create; appears when it is complete.
        options: method, cache size, calibration.
        revision: of a hub id.
        force: replace ``out``.
        quiet: no progress bars.

    Returns:
        The report: what was converted, sizes, seconds, peak memory.

    Raises:
        ConversionError: the input cannot be converted; nothing is left behind.
    """
    started = time.monotonic()
    if options.dtype not in (None, *DTYPES):
        raise ConversionError(f"--dtype is {options.dtype!r}; choose one of {', '.join(DTYPES)}.")
    _check_device(options.device)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, disable=quiet) as progress,
        open_source(source, revision) as opened,
        output_folder(out, force) as folder,
    ):
        context = _context(opened, options)
        _check_options(options)
        budget, layers, details = _plan(opened, options, progress)
        details |= _convert_weights(opened, folder, layers, options, progress)
        _copy_side_files(opened, folder)
        config = _mla_config(opened, budget, context, options, details)
        write_json(folder / "config.json", config)
        write_json(folder / "conversion_report.json", config["mla_conversion"])
    return {
        **config["mla_conversion"],
        "out": str(out),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConversionError(f"--device is {device!r}, which is not a device: use cpu, cuda or cuda:N.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConversionError(f"--device is {device!r}, but this torch sees no CUDA device.")


def _context(source: Source, options: Options) -> int:
    """The converted model's context: within it, no sliding window of the source is active."""
    longest = source.config.max_position_embeddings
    if options.max_context is not None and not 1 <= options.max_context <= longest:
        raise ConversionError(f"--max-context is {options.max_context}, but must be 1 to the source's {longest}.")
    context = options.max_context or longest
    window = active_window(source.config)
    if window is not None and context > window:
        raise ConversionError(
            f"The source attends through a sliding window of {window} tokens, which MLA does not represent; with "
            f"--max-context {window} it is converted for contexts in which the window is inactive."
        )
    return context


def _check_options(options: Options) -> None:
    if options.refit_steps < 0:
        raise ConversionError(f"--refit-steps is {options.refit_steps}, but must be 0 or more.")
    of_one_method = {
        "--freqfold": (options.freqfold is not None, Method.TRANSMLA),
        "--rope-keep": (options.rope_keep is not None, Method.MHA2MLA),
        "--svd": (options.svd is not None, Method.MHA2MLA),
        "--layer-sizes": (options.layer_sizes != LayerSizes.SAME, Method.ATTENTION_AWARE),
        "--without": (bool(options.without), Method.ATTENTION_AWARE),
    }
    for name, (given, method) in of_one_method.items():
        if given and options.method != method:
            raise ConversionError(f"{name} is an option of --method {method}, not of {options.method}: leave it out.")


def _plan(
    source: Source, options: Options, progress: Progress
) -> tuple[CacheBudget, Iterator[dict[str, torch.Tensor]], dict[str, Any]]:
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
) -> tuple[Iterator[dict[str, torch.Tensor]], dict[str, Any]]:
    fold = options.freqfold
    if fold is None:
        fold, errors = search_freqfold(source, windows, budget, options.device, progress)
        details["freqfold_errors"] = {str(k): round(v, 6) for k, v in errors.items()}
    details["freqfold"] = fold
    return transmla_layers(source, windows, budget, fold, options.device), details


def _mha2mla(
    source: Source, budget: CacheBudget, options: Options, progress: Progress
) -> tuple[Iterator[dict[str, torch.Tensor]], dict[str, Any]]:
    method = Mha2mlaOptions(options.rope_keep or Mha2mlaOptions.keep, options.svd or Mha2mlaOptions.svd)
    heads, head_dim = source.config.num_key_value_heads, source.head_dim
    check_sizes(heads, head_dim, budget.qk_rope_head_dim, budget.kv_lora_rank, method.svd)
    windows, details = None, {}
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
) -> tuple[CacheBudget, Iterator[dict[str, torch.Tensor]], dict[str, Any]]:
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


def _convert_weights(
    source: Source, folder: Path, layers: Iterator[dict[str, torch.Tensor]], options: Options, progress: Progress
) -> dict[str, Any]:
    """Write all weights; return what the report says of them."""
    dtype = DTYPES[options.dtype] if options.dtype else source.dtype()
    writer = ShardWriter(folder)
    for name in source.names():
        if not name.startswith("model.layers."):
            writer.add(name, source.tensor(name).to(dtype))
    count = source.config.num_hidden_layers
    for index, converted in enumerate(progress.track(layers, total=count, description="Converting")):
        _write_layer(writer, source, index, converted, dtype)
    writer.finish()
    return {"dtype": str(dtype).removeprefix("torch."), "weights_bytes": writer.total_bytes}


def _exact_layers(source: Source) -> Iterator[dict[str, torch.Tensor]]:
    """Every layer's converted projections, with method ``exact``."""
    freqs, _ = source_frequencies(source)
    exact = exact_map(source.config.num_key_value_heads, source.head_dim, freqs)
    for index in range(source.config.num_hidden_layers):
        yield mla_weights(source.tensors(f"model.layers.{index}.self_attn."), exact)


def _write_layer(
    writer: ShardWriter, source: Source, index: int, converted: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write one layer: the converted projections, and everything else of the layer as it is."""
    prefix = f"model.layers.{index}."
    for name, tensor in converted.items():
        # Rounded to 16 bits, a frequency is off by whole turns after a few hundred tokens.
        writer.add(f"{prefix}self_attn.{name}", tensor.to(torch.float32 if name == "rope_freqs" else dtype))
    for name, tensor in source.tensors(prefix).items():
        replaced = name.removeprefix("self_attn.") in converted
        if not replaced and not any(name.startswith(f"self_attn.{projection}.") for projection in PROJECTIONS):
            writer.add(prefix + name, tensor.to(dtype))


def _copy_side_files(source: Source, folder: Path) -> None:
    for path in source.side_files():
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _mla_config(
    source: Source, budget: CacheBudget, context: int, options: Options, details: dict[str, Any]
) -> dict[str, Any]:
    """``config.json`` of the converted model; its block ``mla_conversion`` is the report."""
    head_dim = source.head_dim
    cached, width = 2 * source.config.num_key_value_heads * head_dim, float(budget.width)
    sizes = {name: details[name] for name in ("kv_lora_ranks", "qk_rope_head_dims") if name in details}
    if sizes:
        width = sum(map(sum, sizes.values())) / source.config.num_hidden_layers
    config = {name: value for name, value in source.raw_config.items() if not name.startswith("_")}
    for stale in ("torch_dtype", "layer_types", "max_window_layers"):  # dtype's older name; sliding windows
        config.pop(stale, None)
    config |= {
        "architectures": [source.family.mla_architecture],
        "model_type": source.family.mla_model_type,
        "dtype": details["dtype"],
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "sliding_window": None,
        "use_sliding_window": False,
        "kv_lora_rank": budget.kv_lora_rank,
        "q_lora_rank": None,
        "qk_rope_head_dim": budget.qk_rope_head_dim,
        "qk_nope_head_dim": 0 if options.method == Method.EXACT else head_dim,
        "v_head_dim": head_dim,
        "softmax_scale": softmax_scale(source),
        **sizes,
        "mla_conversion": {
            "method": options.method.value,
            "source": source.name,
            "revision": source.revision,
            "kv_lora_rank": budget.kv_lora_rank,
            "qk_rope_head_dim": budget.qk_rope_head_dim,
            "cached_per_token_and_layer": {"source": cached, "mla": round(width, 3) if width % 1 else int(width)},
            "cache_ratio": round(width / cached, 6),
            "layers": source.config.num_hidden_layers,
            "versions": {
                "vllm-mla-plugin": vllm_mla_plugin.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            **details,
        },
    }
    return config
