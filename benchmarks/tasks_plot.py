"""The picture of ``benchmarks.tasks``: scores of tasks against bytes of the cache."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.ticker import PercentFormatter

from mla_converters.support.plots import png

SHOWN = {"bench_humaneval": "passed", "bench_gsm8k": "exact_match"}
"""The metric of each task that is drawn alone; all others have :data:`NORMED` or :data:`PLAIN`, and are averaged."""
NORMED, PLAIN = "acc_norm", "acc"
BYTES = (0.125, 0.1875, 0.25, 0.5, 1)  # that the axis names


def draw(models: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a panel for each model, with a mark for each conversion and kind of task.

    Args:
        models: rows by name, of each model.
        path: PNG file to write.
    """
    with png(path) as figure:
        figure.set_size_inches(5 * len(models), 5)
        for axes, (model, rows) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
            for kind, mark in (("HumanEval", "o"), ("GSM8K", "s"), ("multiple choice", "^")):
                points = [
                    (row["bytes"], score) for row in rows.values() if (score := scores(row).get(kind)) is not None
                ]
                axes.plot(*zip(*points, strict=True), mark, label=kind)
            axes.set_title(model)
            axes.set_xscale("log")
            axes.set_xticks(BYTES, labels=[f"{100 * share:g}%" for share in BYTES])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlabel("bytes cached per token, as a share of the source's 16-bit cache")
            axes.grid(alpha=0.3)
            axes.legend()


def scores(row: dict[str, Any]) -> dict[str, float]:
    """The scores of a row that are drawn; multiple choice is the mean over its tasks."""
    found = {(score["task"], score["metric"]): score["score"] for score in row["tasks"]}
    drawn = {
        name: found[task, SHOWN[task]]
        for name, task in (("HumanEval", "bench_humaneval"), ("GSM8K", "bench_gsm8k"))
        if (task, SHOWN[task]) in found
    }
    plain = {task: score for (task, metric), score in found.items() if metric == PLAIN}
    normed = {task: score for (task, metric), score in found.items() if metric == NORMED}
    return drawn | ({"multiple choice": mean((plain | normed).values())} if plain else {})
