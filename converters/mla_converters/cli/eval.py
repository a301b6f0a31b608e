"""``vllm-mla eval``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import ReportFile, check_output, check_plot, quiet_transformers, write_report
from mla_converters.cli.flags import with_flags
from mla_converters.options import EvalOptions
from mla_converters.reports.evaluation import EvaluationReport, ModelScores
from mla_converters.support.labels import short_names

EPILOG = """
**Examples**

What a conversion cost, on your text:

`vllm-mla eval ./smol-mla --reference HuggingFaceTB/SmolLM2-135M-Instruct --text my.txt`

The number that papers report, for several cache sizes, with a picture:

`vllm-mla eval ./mla-* --dataset Salesforce/wikitext:wikitext-2-raw-v1 --protocol wikitext2 --plot sizes.png`

**Memory**: the weights of one model, and with --reference those of both, at 4 bytes each in float32; and for each
of them 4 bytes x length x vocabulary for the logits of one window.

**Task scores** (HellaSwag, MMLU …) come from lm-eval: see docs/evaluating.md.
"""


@with_flags(EvalOptions)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folders, hub ids or .gguf files: converted checkpoints or any causal model."
        ),
    ],
    options: EvalOptions,
    json_file: ReportFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw perplexity against cache size into this .png file.", rich_help_panel="Output"),
    ] = None,
) -> None:
    """Measure models on the same text: perplexity, and what they lost against --reference."""
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.evaluation.plot import plot_report
    from mla_converters.evaluation.run import evaluate as run

    quiet_transformers()
    check_output("--json", json_file)
    check_plot(plot)
    report = run(models, options)
    report = report.model_copy(update={"command": shlex.join(["vllm-mla", *sys.argv[1:]])})
    write_report(json_file, report)
    if plot:
        plot_report(report, plot)
    _print_report(report)


def _print_report(report: EvaluationReport) -> None:
    text, out = report.text, Console()
    out.print(
        f"{text.name}, {text.protocol}: {text.windows:,} x {text.length:,} tokens; "
        f"{report.engine}, {report.dtype}; {report.seconds:.0f} s, "
        f"{report.peak_rss_bytes / 1e9:.1f} GB peak memory",
        highlight=False,
    )
    rows = [*([report.reference] if report.reference else []), *report.models]
    names = short_names([row.name for row in rows])
    out.print(_measures_table(names, rows, compared=report.reference is not None))
    out.print(_positions_table(names, rows, "loss", "loss in nats, by position in the window"))
    if report.reference and report.engine == "hf":
        compared = names[1:], report.models
        out.print(_positions_table(*compared, "kl", "KL from the reference in nats, by position in the window"))
    elif report.reference:
        out.print("KL needs all logits, which vLLM does not give: use --engine hf.", highlight=False)


def _measures_table(names: list[str], rows: list[ModelScores], compared: bool) -> Table:
    columns = {
        "cached": ("cached_per_token_and_layer", "{:,}"),
        "perplexity": ("perplexity", "{:.4f}"),
        "bits/byte": ("bits_per_byte", "{:.4f}"),
    }
    caption = "cached: numbers per token and layer"
    if compared:
        columns |= {
            "ratio": ("perplexity_ratio", "{:.4f}"),
            "KL": ("kl", "{:z.4f}"),  # z: rounding can leave a zero negative
            "top-1": ("top1_agreement", "{:.1%}"),
        }
        caption += "; KL: from the reference, nats per token; top-1: likeliest token is the reference's"
    table = _table(list(columns), caption=caption)
    for name, row in zip(names, rows, strict=True):
        table.add_row(name, *(_cell(getattr(row, key), form) for key, form in columns.values()))
    return table


def _positions_table(names: list[str], rows: list[ModelScores], measure: str, caption: str) -> Table:
    key = f"{measure}_by_position"
    table = _table(list(getattr(rows[0], key)), caption=caption)
    for name, row in zip(names, rows, strict=True):
        table.add_row(name, *(f"{value:z.3f}" for value in getattr(row, key).values()))
    return table


def _table(columns: list[str], caption: str) -> Table:
    table = Table(caption=caption, caption_justify="left")
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cell(value: float | None, form: str) -> str:
    return "—" if value is None else form.format(value)
