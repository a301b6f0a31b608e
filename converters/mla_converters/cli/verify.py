"""``vllm-mla verify``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import ReportFile, check_output, publish, quiet_transformers
from mla_converters.cli.flags import with_flags
from mla_converters.options import VerifyOptions
from mla_converters.reports.verification import Verification

EPILOG = """
**Examples**

After copying a checkpoint to another machine:

`vllm-mla verify ./llama-mla`

Its predictions against the model that it was made from:

`vllm-mla verify ./llama-mla --source ./Llama-3.1-8B`

**Exit code**: 0 if everything is as it was written, 1 if not.
"""


@with_flags(VerifyOptions)
def verify(
    out: Annotated[Path, typer.Argument(help="Folder that `vllm-mla convert` wrote.")],
    options: VerifyOptions,
    json_file: ReportFile = None,
) -> None:
    """Check that the converted checkpoint OUT is whole: files, configuration, tensors, tokenizer, predictions."""
    check_output("--json", json_file)
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.verify import verify as run

    quiet_transformers()
    report = run(out, options)
    publish(report, _print_report, json_file)
    if not report.ok:
        raise typer.Exit(1)


def _print_report(report: Verification) -> None:
    table = Table(title=report.model, show_header=False)
    for check in report.checks:
        table.add_row(check.name, "failed" if check.problems else "ok", "; ".join(check.problems) or check.detail)
    out = Console()
    out.print(table)
    failed = [check.name for check in report.checks if check.problems]
    verdict = f"Damaged: {', '.join(failed)}. Copy or convert it again." if failed else "Whole."
    out.print(verdict, highlight=False)
