"""``vllm-mla eval``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import ReportFile, check_output, check_plot, publish, quiet_transformers
from mla_converters.cli.flags import with_flags
from mla_converters.errors import OptionError
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

Whether it still answers as its source does, on 200 problems of each task and on facts hidden in long text:

`vllm-mla eval ./smol-mla --reference ./smol --tasks arc_easy,gsm8k,needles --limit 200`

Your own tasks, YAML files in the format of lm-evaluation-harness:

`vllm-mla eval ./smol-mla --reference ./smol --tasks mine --tasks-dir ./tasks`
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
    """Measure models on the same text and tasks: perplexity, scores, and what they lost against --reference."""
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.evaluation.plot import plot_report
    from mla_converters.evaluation.run import evaluate as run

    quiet_transformers()
    check_output("--json", json_file)
    check_plot(plot)
    if plot and options.text is None and options.dataset is None and options.tasks:
        raise OptionError("--plot draws perplexity: give --text or --dataset too, or leave it out.")
    report = run(models, options)
    report = report.model_copy(update={"command": shlex.join(["vllm-mla", *sys.argv[1:]])})
    publish(report, _print_report, json_file, plot, plot_report)


def _print_report(report: EvaluationReport) -> None:
    out = Console()
    rows = [*([report.reference] if report.reference else []), *report.models]
    names = short_names([row.name for row in rows])
    out.print(
        f"{_headline(report)}; {report.seconds:.0f} s, {report.peak_rss_bytes / 1e9:.1f} GB peak memory",
        highlight=False,
    )
    if report.text:
        _print_text(out, report, names, rows)
    if report.tasks:
        out.print(_tasks_table(names, rows, compared=report.reference is not None))


def _headline(report: EvaluationReport) -> str:
    parts = []
    if text := report.text:
        parts.append(f"{text.name}, {text.protocol}: {text.windows:,} x {text.length:,} tokens; {report.engine}")
    if report.tasks:
        parts.append(f"tasks by lm-eval {report.versions['lm-eval']} on vLLM {report.versions['vllm']}")
    return f"{'; '.join(parts)}, {report.dtype}"


def _print_text(out: Console, report: EvaluationReport, names: list[str], rows: list[ModelScores]) -> None:
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


def _tasks_table(names: list[str], rows: list[ModelScores], compared: bool) -> Table:
    caption = "±: one standard error" + ("; differences are paired by problem" if compared else "")
    table = Table(caption=caption, caption_justify="left")
    columns = ["task", "model", "score", *(["against the reference"] if compared else [])]
    for column in columns:
        table.add_column(column, overflow="fold")
    for number, first in enumerate(rows[0].tasks or []):
        for place, (name, row) in enumerate(zip(names, rows, strict=True)):
            score = (row.tasks or [])[number]
            task = "" if place else f"{first.measure}: {first.problems:,} problems"
            last = [score.compared] if compared else []
            table.add_row(task, name, score.shown, *last, end_section=place == len(rows) - 1)
    return table


def _table(columns: list[str], caption: str) -> Table:
    table = Table(caption=caption, caption_justify="left")
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cell(value: float | None, form: str) -> str:
    return "—" if value is None else form.format(value)
