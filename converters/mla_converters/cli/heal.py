"""``vllm-mla heal``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import (
    Force,
    NewFolder,
    ReportFile,
    TrustTokenizer,
    check_output,
    chosen_device,
    quiet_transformers,
    write_report,
)

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


def heal(
    model: Annotated[Path, typer.Argument(help="Folder that `vllm-mla convert` wrote.")],
    out: NewFolder,
    source: Annotated[
        str | None, typer.Option(help="What MODEL was converted from. [default: what MODEL says it was]")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file like what you will serve; **self**: text sampled from the source; **chat**: conversations "
            "sampled with its chat template. May be repeated, all have an equal share. [default: self]",
            rich_help_panel="Text",
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            help="How many tokens at most, in windows; one in 32 is held out to measure.",
            rich_help_panel="Text",
        ),
    ] = 65536,
    seed: Annotated[int, typer.Option(help="Same seed, same output to the byte.", rich_help_panel="Text")] = 0,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window, at most the source's context. [default: 256 to 1024, from how much was lost]",
            rich_help_panel="Text",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of Adam. [default: each window once, or twice if much was lost]", rich_help_panel="Training"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows to a step.", rich_help_panel="Training")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Change of a weight in the first steps, relative to the root mean square of its matrix; falls by a "
            "cosine. [default: from how much was lost]",
            rich_help_panel="Training",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to train: cpu or cuda. [default: the GPU, if there is one]")
    ] = None,
    trust_remote_code: TrustTokenizer = False,
    json_file: ReportFile = None,
    force: Force = False,
) -> None:
    """Train the attentions of MODEL to predict what its source predicts (distillation), and write OUT.

    Everything else of MODEL stays as it is, the size of its cache too. Interrupted, the same command goes on.
    """
    check_output("--json", json_file)
    # Imported here, not above: `--help` should not wait for torch.
    from mla_converters.heal import heal as run
    from mla_converters.options import HealOptions

    quiet_transformers()
    options = HealOptions(
        text=tuple(text or HealOptions.text),
        tokens=tokens,
        length=length,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        device=chosen_device(device),
        trust_remote_code=trust_remote_code,
    )
    report = run(model, out, options, source=source, force=force, quiet=not Console(stderr=True).is_terminal)
    write_report(json_file, report)
    _print_report(model, report)


def _print_report(model: Path, report: dict[str, Any]) -> None:
    healing = report["healing"]
    table = Table(title=f"{model} healed", show_header=False)
    table.add_row("steps", f"{healing['steps']:,} of {healing['batch_size']} x {healing['window']} tokens")
    kl = healing["kl_held_out"]
    table.add_row("KL from the source, text held out", f"{kl['before']:.4f} before, {kl['after']:.4f} after")
    table.add_row("time, peak memory", f"{report['seconds']:.0f} s, {report['peak_rss_bytes'] / 1e9:.2f} GB")
    out = Console()
    out.print(table)
    out.print(f"Serve it: vllm serve {report['out']}", highlight=False, soft_wrap=True)
