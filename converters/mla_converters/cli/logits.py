"""``vllm-mla logits``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import NewFolder, ReportFile, check_output, publish, quiet_transformers
from mla_converters.cli.flags import with_flags
from mla_converters.options import LogitsOptions
from mla_converters.reports.logits import LogitsReport

EPILOG = """
**Examples**

Let a model that does not fit beside its student predict a text, and then train the student on that:

`vllm-mla logits ./Qwen2.5-7B ./qwen-7b.logits --text a.jsonl --tokens 1000000 --top-k 64`

`vllm-mla heal ./qwen-mla ./qwen-healed --teacher ./qwen-7b.logits`
"""


@with_flags(LogitsOptions)
def logits(
    model: Annotated[str, typer.Argument(help="Folder, hub id or `.gguf` file of the teacher.")],
    out: NewFolder,
    options: LogitsOptions,
    json_file: ReportFile = None,
) -> None:
    """Write down what MODEL predicts at every token of a text, for `vllm-mla heal --teacher OUT`.

    vLLM runs MODEL. The likeliest tokens are written down, and what remains counts as one token.
    """
    check_output("--json", json_file)
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.logits import logits as run

    quiet_transformers()
    report = run(model, out, options)
    publish(report, _print_report, json_file)


def _print_report(report: LogitsReport) -> None:
    table = Table(title=f"Predictions of {report.model}", show_header=False)
    table.add_row("tokens", f"{report.windows:,} windows of {report.length:,}")
    table.add_row("written down at each", f"{report.top_k} likeliest; the others have {report.remainder:.2%} together")
    table.add_row("size, time", f"{report.bytes / 1e9:,.2f} GB, {report.seconds:,.0f} s")
    Console().print(table)
