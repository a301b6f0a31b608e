"""The conversion, start to end. :func:`convert` is the Python API behind ``vllm-mla convert``."""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import Progress

from mla_converters.cards.card import source_card
from mla_converters.cards.describe import outcome
from mla_converters.checkpoints.carry import carry_side_files
from mla_converters.checkpoints.families import active_window, window_refusal
from mla_converters.checkpoints.locate import check_revision, local_path
from mla_converters.checkpoints.mla_config import mla_config, per_layer_sizes
from mla_converters.checkpoints.rope_scaling import context_length, linear_factor
from mla_converters.checkpoints.source import LAYERS, Source, open_source
from mla_converters.checkpoints.writer import Shards
from mla_converters.errors import ConversionError, OptionError, UnfinishedError
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.asked_cache import AskedCache
from mla_converters.methods.base import Job, Method, Prepared
from mla_converters.methods.layer_conversion import ConvertedLayer, Measured
from mla_converters.methods.registry import method_of
from mla_converters.options import ConvertOptions, command_line, option_name
from mla_converters.proof import prove_and_describe
from mla_converters.reports.conversion import (
    CacheBytes,
    CachedNumbers,
    CalibrationText,
    ConversionReport,
    LayerMeasures,
    SourceCard,
)
from mla_converters.resume.identity import VERSIONS, conversion_identity
from mla_converters.resume.layer_pass import Record, Streams
from mla_converters.resume.out_folder import check_apart
from mla_converters.resume.work_folder import Work, work_folder
from mla_converters.streaming.planned import planned_tensors
from mla_converters.support.devices import usable_device
from mla_converters.support.dtypes import DTYPES
from mla_converters.support.progress import progress_bars
from mla_converters.text.calibration import Calibration, calibrate, calibration_texts

MEASURES = 2  # numbers of a :class:`Measured`


def convert(
    source: str,
    out: Path,
    options: ConvertOptions | None = None,
    *,
    force: bool = False,
    quiet: bool = False,
) -> ConversionReport:
    """Convert a GQA or MHA checkpoint to MLA.

    Args:
        source: a Hugging Face folder, a hub id, or a ``.gguf`` file.
        out: folder to create; appears when it is complete.
        options: method, cache size, calibration; None for the defaults.
        force: replace ``out``.
        quiet: no progress.

    Returns:
        The report: what was converted, sizes, seconds, peak memory.

    Raises:
        ConversionError: the input cannot be converted; nothing is left behind.
        UnfinishedError: interrupted, or out of memory or disk space; called again with the same arguments, it goes on.
    """
    started = time.monotonic()
    options = options or ConvertOptions()
    device = usable_device(options.device)
    method = method_of(options.method)
    _check_text(method, options)
    check_revision(source, options.revision)
    with (
        progress_bars(quiet) as progress,
        open_source(source, options.revision, options.trust_remote_code, options.rope_scaling) as opened,
    ):
        check_apart(out, opened.files(), "SOURCE")
        context, cache = _context(opened, options), method.cache(opened.shape, options)
        identity = conversion_identity(opened, options.model_copy(update={"device": device}))
        with work_folder(out, force, identity) as work:
            work.check_space(_disk_bytes(opened, method, cache, options))
            try:
                report = _convert(opened, method, cache.budget, options, context, device, work, progress)
            except torch.OutOfMemoryError as error:
                raise UnfinishedError(
                    f"The memory of {device} is full: make room there, or start again with --device cpu or "
                    "--calibration FILE, because a model that writes its own text is in memory as a whole."
                ) from error
    return outcome(report, out, started)


def _convert(
    source: Source,
    method: Method,
    budget: CacheBudget,
    options: ConvertOptions,
    context: int,
    device: str,
    work: Work,
    progress: Progress,
) -> ConversionReport:
    """Calibrate, convert all layers, and write the model with its report."""
    nope_dim = method.nope_dim(source.shape)
    warnings = source.warnings + carry_side_files(source, work.model)
    try:
        texts = _texts(source, options, method.window, device, work, progress) if method.window else None
        calibration = None if texts is None else calibrate(texts["used"], source, options.seed)
        job = Job(source, options, budget, calibration, options.seed, device, work, progress)
        prepared = method.prepare(job)
        dtype = DTYPES[options.dtype] if options.dtype else None
        format = prepared.cache_format
        shards = Shards(work.model, planned_tensors(source, prepared.budgets, nope_dim, dtype, format))
        measured = _write_weights(source, prepared, shards, work.record("layers"), device, progress)
    except torch.linalg.LinAlgError as error:
        raise ConversionError(
            f"{source.name} gives numbers out of range on the calibration text: its weights are broken."
        ) from error
    sizes, dtype_name = per_layer_sizes(prepared.budgets), str(dtype or source.dtype()).removeprefix("torch.")
    report = _report(source, method, prepared, calibration, options).model_copy(
        update={
            **sizes,
            "dtype": dtype_name,
            "weights_bytes": shards.total_bytes,
            "per_layer": _rounded(measured) if measured else None,
            "warnings": warnings + prepared.warnings,
        }
    )
    config = mla_config(source, prepared.budget, sizes, nope_dim, context, dtype_name, format)
    held_out = None if texts is None else texts["held_out"]
    return prove_and_describe(source, work.model, config, report, held_out, device, progress)


def _check_text(method: Method, options: ConvertOptions) -> None:
    """Refuse options about text that the method would ignore."""
    given = [option_name(name) for name in ("calibration", "calibration_tokens") if name in options.model_fields_set]
    if given and method.window is None:
        raise OptionError(f"{given[0]} is for a method that reads text, which this one does not: leave it out.")


def _context(source: Source, options: ConvertOptions) -> int:
    """The converted model's context: within it, no sliding window of the source is active."""
    least, longest = math.ceil(linear_factor(source.config)), context_length(source.config)
    if options.max_context is not None and not least <= options.max_context <= longest:
        raise ConversionError(f"--max-context is {options.max_context}, but must be {least} to the source's {longest}.")
    context = options.max_context or longest
    window = active_window(source.config)
    if window is not None and context > window:
        raise ConversionError(window_refusal(window))
    return context


def _disk_bytes(source: Source, method: Method, cache: AskedCache, options: ConvertOptions) -> int:
    """What the conversion takes on disk, by the estimate that ``plan`` shows."""
    dtype = DTYPES[options.dtype] if options.dtype else source.dtype()
    shape = replace(source.shape, weight_bytes=dtype.itemsize)
    return method.cost(shape, cache, options.calibration_tokens).disk_bytes - source.carried_saving()


def _texts(
    source: Source, options: ConvertOptions, window: int, device: str, work: Work, progress: Progress
) -> Streams:
    """Text to calibrate on and text to measure the loss on, or those of an earlier run."""
    return work.remembered(
        "texts",
        lambda: calibration_texts(
            source, options.calibration, options.calibration_tokens, options.seed, progress, window, device
        ),
    )


def _write_weights(
    source: Source, prepared: Prepared, shards: Shards, record: Record, device: str, progress: Progress
) -> list[Measured]:
    """Convert all layers and write all tensors; the layers that an earlier run has written stay.

    Returns:
        The measures of each layer; nothing without calibration.

    Raises:
        OSError: the disk is full.
    """
    if shards.allocate():
        record.forget()
    for name in source.carried_names():
        shards.write(name, source.carried(name))
    count = source.config.num_hidden_layers

    def start() -> Streams:
        return prepared.conversion.start() | {"measured": torch.full((count, MEASURES), torch.nan, dtype=torch.float64)}

    streams = record.begin(start)
    for index in range(record.done):
        shards.written_before(f"{LAYERS}{index}.")
    for layer in record.layers(source, device, progress, "Converting"):
        converted = prepared.conversion.convert(layer, streams)
        _write_layer(shards, source, layer.index, converted)
        if converted.measured is not None:
            row = converted.measured
            streams["measured"][layer.index] = torch.tensor((row.energy_kept, row.output_error), dtype=torch.float64)
    shards.finish()
    return [Measured(*row) for row in streams["measured"].tolist() if not any(map(math.isnan, row))]


def _write_layer(shards: Shards, source: Source, index: int, converted: ConvertedLayer) -> None:
    for name, tensor in source.converted_attention(index, converted.weights).items():
        shards.write(f"{LAYERS}{index}.self_attn.{name}", tensor)
    for name in source.carried_names(index):
        shards.write(name, source.carried(name))


def _rounded(measured: list[Measured]) -> list[LayerMeasures]:
    return [LayerMeasures(**{name: round(value, 6) for name, value in asdict(row).items()}) for row in measured]


def _whole(mean: float) -> int | float:
    return round(mean, 3) if mean % 1 else int(mean)


def _report(
    source: Source, method: Method, prepared: Prepared, calibration: Calibration | None, options: ConvertOptions
) -> ConversionReport:
    """The report, before the weights are written."""
    budgets, cached, format = prepared.budgets, source.shape.cached, prepared.cache_format
    width = sum(budget.width for budget in budgets) / len(budgets)
    row = 2 * width if format is None else format.bytes_per_token
    return ConversionReport(
        method=method.options.name,
        method_summary=method.options.summary,
        method_reference=method.options.reference,
        lossless=method.lossless and format is None,
        settings=prepared.settings,
        source=source.name,
        revision=source.revision,
        kv_lora_rank=prepared.budget.kv_lora_rank,
        qk_rope_head_dim=prepared.budget.qk_rope_head_dim,
        cached_per_token_and_layer=CachedNumbers(source=cached, mla=_whole(width)),
        cache_ratio=round(row / (2 * cached), 6),
        latent_cache=None if format is None else format.spec,
        bytes_per_token_and_layer=CacheBytes(source=2 * cached, mla=_whole(row)),
        layers=len(budgets),
        command=command_line(source.name, options),
        versions=VERSIONS,
        source_card=SourceCard(**source_card(source.folder, source.name if local_path(source.name) is None else None)),
        calibration=None
        if calibration is None
        else CalibrationText(
            origins=[Path(origin).name for origin in options.calibration],
            tokens=calibration.text.numel(),
            seed=options.seed,
        ),
        searches=prepared.searches,
        unknown_keys=source.unknown_keys,
        rope_scaling=options.rope_scaling,
        dtype="",
        weights_bytes=0,
    )
