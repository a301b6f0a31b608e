"""The picture of ``benchmarks.tasks``: scores of tasks against bytes of the cache."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from mla_converters.support.plots import png

ALONE = {"HumanEval": ("bench_humaneval", "passed"), "GSM8K": ("bench_gsm8k", "exact_match")}
"""Task and metric of the scores that are drawn alone. All others are multiple choice, of which the mean is drawn."""
NORMED, PLAIN = "acc_norm", "acc"
CHOICE = "multiple choice"
MARKS = {"HumanEval": ("o", "C0"), "GSM8K": ("s", "C1"), CHOICE: ("^", "C2")}
BYTES = (0.125, 0.1875, 0.25, 0.5, 1)  # that the axis names


def draw(models: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a panel for each model, with a mark for each conversion and kind of task.

    Args:
        models: rows by name, of each model.
        path: PNG file to write.
    """
    with png(path) as figure:
        figure.set_size_inches(5 * len(models), 5)
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, (model, rows) in zip(panels, models.items(), strict=True):
            axes.set_title(model)
            for kind in MARKS:
                _draw_kind(axes, kind, list(rows.values()))
            _scale(axes)


def _draw_kind(axes: Axes, kind: str, rows: list[dict[str, Any]]) -> None:
    """Full marks for packed caches, and empty ones for 16 bits."""
    mark, color = MARKS[kind]
    for packed, fill, unit in ((True, "full", "packed"), (False, "none", "16 bits")):
        some = [row for row in rows if (row.get("latent_cache") is not None) == packed and kind in scores(row)]
        if some:
            points = zip(*((row["bytes"], scores(row)[kind]) for row in some), strict=True)
            axes.plot(*points, mark, fillstyle=fill, color=color, label=f"{kind}, {unit}")


def _scale(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xticks(BYTES, labels=[f"{100 * share:g}%" for share in BYTES])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("bytes cached per token, as a share of 16 bits")
    axes.grid(alpha=0.3)
    axes.legend()


def scores(row: dict[str, Any]) -> dict[str, float]:
    """The scores of a row that are drawn."""
    found = {(score["task"], score["metric"]): score["score"] for score in row["tasks"]}
    drawn = {kind: found[measure] for kind, measure in ALONE.items() if measure in found}
    choice = {
        task: score for metric in (PLAIN, NORMED) for (task, of), score in found.items() if of == metric
    }  # the second metric, where a task has both
    return drawn | ({CHOICE: mean(choice.values())} if choice else {})
