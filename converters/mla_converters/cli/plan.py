"""``vllm-mla plan``."""

from collections.abc import Collection
from functools import partial
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import ReportFile, check_output, print_warnings, publish, quiet_transformers
from mla_converters.cli.flags import with_flags
from mla_converters.options import PlanOptions
from mla_converters.reports.plan import (
    Layout,
    Plan,
    PlannedConversion,
    PlannedGpus,
    PlannedModel,
    PlannedTraining,
    Recommendation,
    VllmCacheSize,
)
from vllm_mla_plugin.checkpoint.layouts import GPUS

OPTIONS_WIDTH = len("--method exact --latent-bits 4")

EPILOG = """
**Examples**

What would Llama 3.1 look like with MLA? No weights are fetched, only its config.json:

`vllm-mla plan meta-llama/Llama-3.1-8B --memory 40GiB`

What do eight GPUs hold of it, by how they share the work?

`vllm-mla plan meta-llama/Llama-3.1-8B --tensor-parallel 8 --memory 40GiB`

What does training it take, on eight GPUs?

`vllm-mla plan meta-llama/Llama-3.1-8B --heal --devices 8 --tokens 1000000000`

A folder, a bare configuration file, and the answer for machines:

`vllm-mla plan ./Llama-3.1-8B`

`vllm-mla plan ./config.json --json plan.json`

**Next**: run the command that it prints last, and measure the quality on your own text before you deploy.
"""


@with_flags(PlanOptions)
def plan(
    source: Annotated[
        str, typer.Argument(help="Hugging Face folder (weights may be absent), hub id, .gguf or config.json file.")
    ],
    options: PlanOptions,
    json_file: ReportFile = None,
) -> None:
    """Say what converting SOURCE would give and cost, from its config.json or a GGUF file's header alone."""
    check_output("--json", json_file)
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.planning.plan import plan as run

    quiet_transformers()
    result = run(source, options)
    publish(result, partial(_print_plan, memory=options.memory), json_file)


def _print_plan(result: Plan, memory: str) -> None:
    out = Console()
    out.print(_source_table(result.source, memory))
    out.print(_vllm_table(result.vllm_caches, memory))
    out.print(_layout_table(result, memory))
    gpus = _gpu_table(result.layouts)
    if gpus.row_count:
        out.print(gpus)
    out.print(_cost_table(result.conversion, result.recommended))
    if result.training is not None:
        out.print(_training_table(result.training))
    if result.gpus is not None:
        out.print(_many_gpus_table(result.gpus, memory))
    print_warnings(out, result.warnings)
    for advice in result.advice:
        out.print(advice.what, highlight=False)
        out.print(f"    {advice.command}", highlight=False, soft_wrap=True, markup=False)
    out.print(f"Recommended: {result.recommended.reason}", highlight=False)
    if result.gpus is not None:
        out.print(result.gpus.recommended, highlight=False)
    out.print(result.command, highlight=False, soft_wrap=True, markup=False)


def _source_table(source: PlannedModel, memory: str) -> Table:
    table = Table(title=source.name, show_header=False)
    weights = f"{source.parameters / 1e9:,.2f} billion parameters, {source.weights_bytes / 1e9:,.2f} GB"
    rows = {
        "Architecture": source.architecture,
        "Weights": f"{weights} ({source.dtype})",
        "Attention": f"{source.layers} layers, {source.kv_heads} KV heads of {source.head_dim}",
        "Context": f"{source.context:,} tokens",
        "Cached per token and layer": f"{source.cached_per_token_and_layer:,} numbers",
        "KV cache per token": f"{source.kv_bytes_per_token:,} bytes ({source.cache_dtype})",
        f"Tokens in {memory}": f"{source.tokens_in_memory:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _vllm_table(caches: list[VllmCacheSize], memory: str) -> Table:
    """vLLM's own formats of the source's cache."""
    table = Table(title="Without a conversion: --kv-cache-dtype of vLLM 0.32.0")
    table.add_column("Format", no_wrap=True)
    for column in ("Share", "KV bytes/token", f"Tokens in {memory}"):
        table.add_column(column, justify="right")
    table.add_column("Served on")
    for cache in caches:
        size = (f"{cache.cache_ratio:.1%}", f"{cache.kv_bytes_per_token:,}", f"{cache.tokens_in_memory:,}")
        table.add_row(cache.kv_cache_dtype, *size, _hardware(cache.served_on))
    return table


def _layout_table(result: Plan, memory: str) -> Table:
    """Candidates; the recommended one is marked."""
    title = "Conversions (~: typical, because convert searches for these bytes)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)  # fits 80 columns
    table.add_column("Share", justify="right")
    table.add_column("Options of convert", min_width=OPTIONS_WIDTH)
    for column in ("Numbers", "Bits", "KV bytes\nper token", f"Tokens in\n{memory}"):
        table.add_column(column, justify="right")
    table.add_column("Served\non")
    for layout in result.layouts:
        about = "~" if layout.typical else ""
        table.add_row(
            f"{layout.cache_ratio:.1%}",
            " ".join(layout.options),
            f"{about}{layout.kv_lora_rank + layout.qk_rope_head_dim:,}",
            f"{about}{layout.bits_per_number}",
            f"{layout.kv_bytes_per_token:,}",
            f"{layout.tokens_in_memory:,}",
            _hardware(layout.backends),
            style="bold" if layout.options == result.recommended.options else None,
        )
    return table


def _hardware(served_on: Collection[str]) -> str:
    """Where something is served, in few words."""
    gpus = sum(gpu in served_on for gpu in GPUS)
    cpu = ["CPU"] if len(served_on) > gpus else []
    return ", ".join([*cpu, *(["GPU"] if gpus == len(GPUS) else ["some GPUs"] if gpus else [])])


def _gpu_table(layouts: list[Layout]) -> Table:
    """Backends of each cache; GPUs that have the same backends share a row."""
    table = Table(title="GPU backends; vLLM's own are read from its version 0.32.0, its choice first")
    for column in ("Options of convert", "GPU", "Backends"):
        table.add_column(column)
    for layout in layouts:
        gpus: dict[str, list[str]] = {}
        for gpu in GPUS:
            if gpu in layout.backends:
                gpus.setdefault(", ".join(layout.backends[gpu]), []).append(gpu)
        for backends, served in gpus.items():
            where = "NVIDIA Ampere or later" if len(served) == len(GPUS) else ", ".join(served)
            table.add_row(" ".join(layout.options), where, backends)
    return table


def _cost_table(cost: PlannedConversion, chosen: Recommendation) -> Table:
    table = Table(title=f"Converting with {' '.join(chosen.options)} on CPU, about", show_header=False)
    for method, seconds in cost.core_seconds.items():
        table.add_row(f"Time, --method {method}", _duration(seconds))
    tokens = f"{cost.calibration_tokens:,}"
    table.add_row(f"Sampling {tokens} tokens, --calibration self or chat", _duration(cost.sampling_core_seconds))
    table.add_row("Proof and loss of the converted model", _duration(cost.proof_core_seconds))
    for calibration, peak in cost.peak_memory_bytes.items():
        table.add_row(f"Peak memory, --calibration {calibration.replace('file', 'FILE')}", f"{peak / 1e9:,.1f} GB")
    table.add_row("Disk", f"{cost.peak_disk_bytes / 1e9:,.2f} GB")
    table.add_row("Weights", f"{cost.weights_bytes / 1e9:,.2f} GB")
    return table


def _training_table(training: PlannedTraining) -> Table:
    tokens = f"{training.tokens:,} tokens, --train {training.train}"
    devices = "1 device" if training.devices == 1 else f"{training.devices} devices"
    table = Table(title=f"Training on {tokens}, with {devices}, about", show_header=False)
    table.add_row("Trained weights", f"{training.trained_parameters / 1e6:,.0f} million")
    table.add_row("Memory of a device", f"{training.memory_bytes / 1e9:,.1f} GB")
    if training.devices > 1:
        table.add_row("Memory of a device, --fsdp", f"{training.sharded_memory_bytes / 1e9:,.1f} GB")
    table.add_row("Disk", f"{training.disk_bytes / 1e9:,.1f} GB")
    speed = "measured here" if training.measured else "from its peak"
    table.add_row(f"Speed of a device, {speed}", f"{training.tokens_per_second_and_device:,.0f} tokens/s")
    table.add_row("Time", f"{training.hours:,.1f} hours")
    return table


def _many_gpus_table(gpus: PlannedGpus, memory: str) -> Table:
    """What each of several GPUs caches, by how they share the work."""
    title = f"{gpus.gpus} GPUs with {memory} each for the cache"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)  # fits 80 columns
    table.add_column("Cache", min_width=OPTIONS_WIDTH)
    table.add_column("GPUs share by")
    table.add_column("KV bytes per\ntoken and GPU", justify="right")
    table.add_column("Tokens in\nall GPUs", justify="right")
    for way in gpus.ways:
        cache = " ".join([way.model, *way.options] if way.model == "source" else way.options)
        table.add_row(cache, way.way, f"{way.kv_bytes_per_token:,}", f"{way.tokens:,}")
    return table


def _duration(core_seconds: float) -> str:
    hours = core_seconds / 3600
    return f"{hours:,.1f} core-hours" if hours >= 1 else f"{core_seconds / 60:,.0f} core-minutes"
