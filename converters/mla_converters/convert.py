"""The conversion, start to end. :func:`convert` is the Python API behind ``vllm-mla convert``."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from mla_converters.cards.card import source_card
from mla_converters.cards.describe import describe_model, outcome, progress_bars
from mla_converters.checkpoints.families import active_window, window_refusal
from mla_converters.checkpoints.locate import local_path
from mla_converters.checkpoints.source import Source, open_source
from mla_converters.checkpoints.writer import Shards
from mla_converters.errors import ConversionError
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.attention_aware.run import random_count
from mla_converters.methods.registry import Prepared, asked_budget, prepare
from mla_converters.options import DTYPES, Method, Options, check_options, command_line
from mla_converters.resume.identity import VERSIONS, conversion_identity
from mla_converters.resume.layer_pass import record_bytes
from mla_converters.resume.work_folder import Work, work_folder
from mla_converters.streaming.planned import planned_tensors, write_weights

STREAMS = 2  # of hidden states, at most, that pass through the layers


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
        UnfinishedError: interrupted, or out of disk space; called again with the same arguments, it goes on.
    """
    started = time.monotonic()
    check_options(options)
    with (
        progress_bars(quiet) as progress,
        open_source(source, revision, options.trust_remote_code) as opened,
    ):
        context, budget = _context(opened, options), asked_budget(opened, options)
        with work_folder(out, force, conversion_identity(opened, options)) as work:
            work.check_space(_disk_bytes(opened, budget, options))
            try:
                prepared = prepare(opened, budget, options, work, progress)
                details = prepared.details | _convert_weights(opened, prepared, work, options, progress)
            except torch.linalg.LinAlgError as error:
                raise ConversionError(
                    f"{source} gives numbers out of range on the calibration text: its weights are broken."
                ) from error
            _copy_side_files(opened, work.model)
            config = _mla_config(opened, prepared.budget, context, options, details)
            describe_model(work.model, config)
    return outcome(config["mla_conversion"], out, started)


def _context(source: Source, options: Options) -> int:
    """The converted model's context: within it, no sliding window of the source is active."""
    longest = source.config.max_position_embeddings
    if options.max_context is not None and not 1 <= options.max_context <= longest:
        raise ConversionError(f"--max-context is {options.max_context}, but must be 1 to the source's {longest}.")
    context = options.max_context or longest
    window = active_window(source.config)
    if window is not None and context > window:
        raise ConversionError(window_refusal(window))
    return context


def _convert_weights(
    source: Source, prepared: Prepared, work: Work, options: Options, progress: Progress
) -> dict[str, Any]:
    """Write all weights; return what the report says of them."""
    shards = Shards(work.model, _planned(source, prepared.budgets, options))
    measured = write_weights(source, prepared, shards, work.record("layers"), options.device, progress)
    dtype = str(_dtype(source, options)).removeprefix("torch.")
    details: dict[str, Any] = {"dtype": dtype, "weights_bytes": shards.total_bytes}
    if measured:
        details["per_layer"] = [{key: round(value, 6) for key, value in asdict(row).items()} for row in measured]
    return details


def _planned(source: Source, budgets: list[CacheBudget], options: Options) -> dict[str, torch.Tensor]:
    return planned_tensors(source, budgets, _nope_dim(source, options), _dtype(source, options))


def _dtype(source: Source, options: Options) -> torch.dtype:
    return DTYPES[options.dtype] if options.dtype else source.dtype()


def _disk_bytes(source: Source, budget: CacheBudget, options: Options) -> int:
    """What a conversion takes on disk: the weights, and the records of what passes through the layers."""
    planned = _planned(source, [budget] * source.config.num_hidden_layers, options)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in planned.values())
    tokens = STREAMS * options.calibration_tokens + random_count(options.calibration_tokens)
    return weights + record_bytes(tokens, source.config.hidden_size)


def _nope_dim(source: Source, options: Options) -> int:
    return 0 if options.method == Method.EXACT else source.head_dim


def _copy_side_files(source: Source, folder: Path) -> None:
    for path in source.side_files():
        shutil.copyfile(path, folder / path.name)


def _mla_config(
    source: Source, budget: CacheBudget, context: int, options: Options, details: dict[str, Any]
) -> dict[str, Any]:
    """``config.json`` of the converted model; its block ``mla_conversion`` is the report."""
    head_dim = source.head_dim
    cached, width = 2 * source.config.num_key_value_heads * head_dim, float(budget.width)
    sizes: dict[str, list[int]] = {
        name: details[name] for name in ("kv_lora_ranks", "qk_rope_head_dims") if name in details
    }
    if sizes:
        width = sum(map(sum, sizes.values())) / source.config.num_hidden_layers
    config: dict[str, Any] = {name: value for name, value in source.raw_config.items() if not name.startswith("_")}
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
        "qk_nope_head_dim": _nope_dim(source, options),
        "v_head_dim": head_dim,
        "softmax_scale": source.softmax_scale,
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
            "command": command_line(source.name, source.revision, options),
            "versions": VERSIONS,
            "source_card": source_card(source.folder, source.name if local_path(source.name) is None else None),
            **details,
            **({"unknown_keys": source.unknown_keys} if source.unknown_keys else {}),
        },
    }
    return config
