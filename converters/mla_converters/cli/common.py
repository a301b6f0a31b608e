"""What the commands share: arguments, checks of output files, and JSON reports."""

import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from mla_converters.errors import ConversionError, OptionError
from mla_converters.reports.base import Report
from mla_converters.reports.conversion import ConversionReport
from mla_converters.reports.verdicts import verdict
from mla_converters.support.packages import require

R = TypeVar("R", bound=Report)
NewFolder = Annotated[Path, typer.Argument(help="Folder to create. It appears when it is complete.")]
ReportFile = Annotated[
    Path | None, typer.Option("--json", help="Write the report here, for machines.", rich_help_panel="Output")
]
Plot = Annotated[Path | None, typer.Option("--plot", rich_help_panel="Output")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.", rich_help_panel="Output")]


def check_output(option: str, path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written after it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise OptionError(f"{option} is {path}, which is not a file in an existing folder.")
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"{option} is {path}, which cannot be written: name a file in another place.")


def check_plot(path: Path | None) -> None:
    """Refuse, before any work, a ``--plot`` that could not be drawn after it."""
    check_output("--plot", path)
    if path is not None:
        if path.suffix != ".png":
            raise OptionError(f"--plot is {path}, but must end in .png.")
        require("matplotlib", "--plot", "run pip install matplotlib, or leave it out")


def publish(
    report: R,
    show: Callable[[R], None],
    json_file: Path | None,
    plot: Path | None = None,
    draw: Callable[[R, Path], None] | None = None,
) -> None:
    """Write the files of a report that were asked for, and show it even if one of them cannot be written.

    Args:
        report: of the command, which may have taken hours.
        show: prints it.
        json_file: for machines.
        plot: for a picture.
        draw: draws it.

    Raises:
        ConversionError: a file cannot be written.
    """
    try:
        if json_file:
            with _writing(json_file):
                json_file.write_text(json.dumps(report.as_json(), indent=2) + "\n")
        if plot and draw:
            with _writing(plot):
                draw(report, plot)
    finally:
        show(report)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in one sentence that a file cannot be written.

    Raises:
        ConversionError: the block failed to write it.
    """
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{path} cannot be written: {error.strerror or error}.") from error


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that ``torchrun`` or ``accelerate launch`` started."""
    return os.environ.get("RANK", "0") == "0"


def print_warnings(out: Console, warnings: Iterable[str]) -> None:
    """Print a report's warnings."""
    for warning in warnings:
        out.print(f"Warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


def loss_rows(report: ConversionReport) -> dict[str, str]:
    """The rows of a table that say what a conversion lost, and what to expect of it."""
    rows = {}
    if loss := report.loss:
        rows["Perplexity, text held out"] = f"{loss.perplexity:,.3f}, the source's {loss.source_perplexity:,.3f}"
        rows["KL from the source"] = (
            f"{loss.kl:.4f} nats; likeliest token the source's for {loss.top1_agreement:.0%} of {loss.tokens:,} tokens"
        )
    if found := verdict(report):
        rows["Verdict"] = found.words
    return rows


def print_next(out: Console, report: ConversionReport) -> None:
    """Print what to type next: how to serve the model and, where that pays, how to heal it."""
    found, folder = verdict(report), shlex.quote(str(report.out))
    if found and found.heals:
        healed = shlex.quote(f"{str(report.out).rstrip('/')}-healed")
        command = f"vllm-mla heal {folder} {healed} --text TEXT_LIKE_YOURS.txt"
        out.print(f"{'Heal it further' if report.healing else 'Heal it'}: {command}", highlight=False, soft_wrap=True)
    out.print(f"Serve it: vllm serve {folder}", highlight=False, soft_wrap=True)


def quiet_transformers() -> None:
    """Silence transformers' notices and progress bars, which are about training and serving."""
    # Imported here: `--help` should not wait for torch.
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
