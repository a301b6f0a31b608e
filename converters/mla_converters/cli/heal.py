"""``vllm-mla heal``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import (
    Force,
    NewFolder,
    ReportFile,
    check_output,
    is_main_process,
    loss_rows,
    print_next,
    print_warnings,
    publish,
    quiet_transformers,
)
from mla_converters.cli.flags import with_flags
from mla_converters.options import HealOptions
from mla_converters.reports.conversion import ConversionReport

EPILOG = """
**Examples**

On text like what you will serve, and on as much that the source writes, so that other text is not forgotten:

`vllm-mla heal ./smol-mla ./smol-healed --text my.txt --text self --tokens 131072`

More text:

`vllm-mla heal ./smol-mla ./smol-healed --text my.txt --tokens 1000000`

**Memory**: the source's weights, the attentions of MODEL and 12 bytes more for each of their weights, and what one step
keeps: it grows with --length and --batch-size.

**Next**: `vllm serve OUT`
"""


@with_flags(HealOptions)
def heal(
    model: Annotated[Path, typer.Argument(help="Folder that `vllm-mla convert` wrote.")],
    out: NewFolder,
    options: HealOptions,
    json_file: ReportFile = None,
    force: Force = False,
) -> None:
    """Train the attentions of MODEL to predict what its source predicts (distillation), and write OUT.

    Everything else of MODEL stays as it is, the size of its cache too. Interrupted, the same command goes on.
    """
    check_output("--json", json_file)
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.heal.run import heal as run
    from mla_converters.support.memory import return_freed_memory

    return_freed_memory()
    quiet_transformers()
    report = run(model, out, options, force=force)
    if not is_main_process():
        return
    publish(report, partial(_print_report, model), json_file)


def _print_report(model: Path, report: ConversionReport) -> None:
    healing = report.healing
    assert healing is not None, "heal has just written it"
    table = Table(title=f"{model} trained", show_header=False)
    table.add_row("steps", f"{healing.steps:,} of {healing.batch_size} x {healing.window} tokens")
    for name, loss in (("KL from the teacher", healing.kl_held_out), ("Loss on the text", healing.lm_held_out)):
        if loss is not None:
            table.add_row(f"{name}, text held out", f"{loss.before:.4f} before, {loss.after:.4f} after")
    for name, value in loss_rows(report).items():
        table.add_row(name, value)
    table.add_row("time, peak memory", f"{report.seconds:.0f} s, {(report.peak_rss_bytes or 0) / 1e9:.2f} GB")
    out = Console()
    out.print(table)
    print_warnings(out, filter(None, [healing.warning]))
    print_next(out, report)
