"""The files that describe a written model, and what a run took."""

import time
from pathlib import Path
from typing import Any

from mla_converters.cards.card import REPORT, write_card
from mla_converters.checkpoints.manifest import write_manifest
from mla_converters.reports.conversion import ConversionReport
from mla_converters.support.json_files import write_json
from mla_converters.support.memory import peak_rss_bytes


def describe_model(folder: Path, config: dict[str, Any], report: ConversionReport) -> None:
    """Write ``config.json`` with the report as ``mla_conversion``, the report, the card and the manifest."""
    content = report.as_json()
    write_json(folder / "config.json", config | {"mla_conversion": content})
    write_json(folder / REPORT, content)
    write_card(folder)
    write_manifest(folder)


def outcome(report: ConversionReport, out: Path, started: float) -> ConversionReport:
    """The report with the time and memory of this run since ``started``, a time of ``time.monotonic``."""
    return report.model_copy(
        update={
            "out": str(out),
            "seconds": round(time.monotonic() - started, 1),
            "peak_rss_bytes": peak_rss_bytes(),
        }
    )
