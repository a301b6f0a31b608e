"""What the commands that write a model have in common: their bars, the files that describe the model, their report."""

import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mla_converters.cards.card import REPORT, write_card
from mla_converters.checkpoints.manifest import write_manifest
from mla_converters.support.json_files import write_json
from mla_converters.support.memory import peak_rss_bytes


def progress_bars(quiet: bool) -> Progress:
    """Bars for long work."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=quiet)


def describe_model(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``, the report that it holds as ``mla_conversion``, the card and the manifest."""
    write_json(folder / "config.json", config)
    write_json(folder / REPORT, config["mla_conversion"])
    write_card(folder)
    write_manifest(folder)


def outcome(report: dict[str, Any], out: Path, started: float) -> dict[str, Any]:
    """The report, and what this run took since ``started``, a time of ``time.monotonic``."""
    return {
        **report,
        "out": str(out),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }
