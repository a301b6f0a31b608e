"""``vllm-mla verify``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import TrustTokenizer, check_output, quiet_transformers, write_report

EPILOG = """
**Examples**

After copying a checkpoint to another machine:

`vllm-mla verify ./llama-mla`

Its predictions against the model that it was made from:

`vllm-mla verify ./llama-mla --source ./Llama-3.1-8B`

**Exit code**: 0 if everything is as it was written, 1 if not.
"""


def verify(
    out: Annotated[Path, typer.Argument(help="Folder that `vllm-mla convert` wrote.")],
    source: Annotated[
        str | None, typer.Option(help="What it was converted from: compares predictions on a short text, in float32.")
    ] = None,
    trust_remote_code: TrustTokenizer = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here, for machines.")] = None,
) -> None:
    """Check that the converted checkpoint OUT is whole: files, configuration, tensors, tokenizer, predictions."""
    check_output("--json", json_file)
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.verify import verify as run

    quiet_transformers()
    report = run(out, source, trust_remote_code)
    write_report(json_file, report)
    _print_report(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _print_report(report: dict[str, Any]) -> None:
    table = Table(title=report["model"], show_header=False)
    for check in report["checks"]:
        table.add_row(
            check["name"], "failed" if check["problems"] else "ok", "; ".join(check["problems"]) or check["detail"]
        )
    out = Console()
    out.print(table)
    failed = [check["name"] for check in report["checks"] if check["problems"]]
    verdict = f"Damaged: {', '.join(failed)}. Copy or convert it again." if failed else "Whole."
    out.print(verdict, highlight=False)
