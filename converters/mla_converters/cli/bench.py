"""``vllm-mla bench``."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import ReportFile, check_output, check_plot, publish, quiet_transformers
from mla_converters.cli.flags import with_flags
from mla_converters.options import BenchOptions
from mla_converters.reports.bench import BenchReport, BenchRow
from mla_converters.support.labels import short_names

EPILOG = """
**Examples**

A model beside its conversion, random prompts, input = output = 1K to as much as fits:

`vllm-mla bench ./Llama-3.1-8B ./llama-mla`

Decoding after long prompts, for 1 and 16 requests at once, with a picture and JSON:

`vllm-mla bench ./smol ./smol-mla --lengths 2048:128,6144:128 --requests 1,16 --plot speed.png --json speed.json`

A shape, without its weights (config.json is enough):

`vllm-mla bench ./Llama-3.1-8B ./llama-mla --load-format dummy`

Without the rivals, vLLM's own formats of the first model's cache:

`vllm-mla bench ./smol ./smol-mla --rivals none`

Every request has the same length and is sent at once. Ratios are to the first model; above 1 is better than it.
See docs/benchmarking.md for what each number means.
"""


@with_flags(BenchOptions)
def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE MODEL...", help="Folders or hub ids; the first is what others are compared to."),
    ],
    options: BenchOptions,
    json_file: ReportFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw throughput against length into this .png file.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Measure how fast vLLM serves models: throughput, latency, concurrency and KV capacity, side by side."""
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.bench.plot import plot_report
    from mla_converters.bench.run import bench as run
    from mla_converters.support.packages import require

    quiet_transformers()
    check_output("--json", json_file)
    check_plot(plot)
    require("vllm", "bench", "run pip install 'vllm-mla-plugin[cuda]' or '[cpu]'")
    report = run(models, options)
    report = report.model_copy(update={"command": shlex.join(["vllm-mla", *sys.argv[1:]])})
    publish(report, _print_report, json_file, plot, plot_report)


def _print_report(report: BenchReport) -> None:
    rows, out = report.models, Console()
    hardware, versions = report.hardware, report.versions
    out.print(
        f"vLLM {versions['vllm']} on {hardware['device']}, {hardware['cores']} cores; medians of {report.rounds} "
        f"rounds; {report.seconds:.0f} s",
        highlight=False,
    )
    names = list(dict.fromkeys(row.name for row in rows))
    short = dict(zip(names, short_names(names), strict=True))
    for requests, input_len, output_len in dict.fromkeys((row.requests, row.input_len, row.output_len) for row in rows):
        count = f"{requests:,}" if isinstance(requests, int) else requests
        table = Table(title=f"{count} x {input_len:,} in, {output_len:,} out", title_justify="left", title_style="bold")
        table.add_column("", overflow="fold")
        measured = [
            row for row in rows if (row.requests, row.input_len, row.output_len) == (requests, input_len, output_len)
        ]
        for row in measured:
            table.add_column(short[row.name], justify="right", overflow="fold")
        table.add_row("cache", *map(_cache, measured))
        for label, key, figure in FIGURES:
            table.add_row(label, *(_cell(figure(row), key, row) for row in measured))
        out.print(table)
    for note in report.notes:
        out.print(note, highlight=False, markup=False)
    better = "In parentheses: how many times as good as the first model"
    if any(row.ratios_to_best for row in rows):
        better += ", and as the first model with whichever of its caches is best for the figure"
    out.print(f"{better}.", highlight=False)


def _cell(value: float | None, key: str, row: BenchRow) -> str:
    """A figure, with its ratios."""
    if value is None:
        return "—"
    text = f"{value:,.1f}" if value < 1000 and value != int(value) else f"{value:,.0f}"
    known = [ratios.get(key) for ratios in (row.ratios, row.ratios_to_best or {})]
    shown = ", ".join(f"{ratio:.2f}x" for ratio in known if ratio is not None)
    return f"{text} ({shown})" if shown else text


def _cache(row: BenchRow) -> str:
    return row.cache_format if isinstance(row.cache_format, str) else "formats differ by layer"


def _milliseconds(key: str, statistic: str) -> Callable[[BenchRow], float | None]:
    return lambda row: None if getattr(row, key) is None else 1e3 * getattr(getattr(row, key), statistic)


# Label, name of the ratio if there is one, and how a row of the report gives the figure.
FIGURES: tuple[tuple[str, str, Callable[[BenchRow], float | None]], ...] = (
    ("output tokens/s", "output_tokens_per_second", lambda row: row.output_tokens_per_second),
    ("decode tokens/s", "decode_tokens_per_second", lambda row: row.decode_tokens_per_second),
    ("time to first token, ms (median)", "time_to_first_token", _milliseconds("time_to_first_token", "median")),
    ("time to first token, ms (p99)", "", _milliseconds("time_to_first_token", "p99")),
    ("time per output token, ms (median)", "time_per_output_token", _milliseconds("time_per_output_token", "median")),
    ("requests at once, at most", "", lambda row: row.peak_concurrency),
    ("bits of a cached number", "", lambda row: row.bits_per_cached_number),
    ("bytes cached per token and layer", "", lambda row: row.bytes_per_token_and_layer),
    ("KV capacity, tokens", "kv_capacity", lambda row: row.kv_capacity_tokens),
)
