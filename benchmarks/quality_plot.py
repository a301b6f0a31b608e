"""The picture of ``benchmarks.quality``: perplexity against bytes of the cache."""

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from mla_converters.support.plots import png

# The rows that are joined by lines.
LINES = {
    "packed closed-form": "packed, closed form",
    "packed closed-form healed": "packed, closed form, healed",
    "packed refit": "packed, refit",
    "packed refit healed": "packed, refit, healed",
    "packed self healed": "packed, calibrated and healed on self",
    "transmla": "TransMLA (ours), 16 bits",
    "closed-form": "closed form, 16 bits",
    "refit healed": "refit, healed, 16 bits",
}
MARKS = "sD^v<>Pp*X"
BYTES = (0.03, 0.06, 0.125, 0.25, 0.5, 1)  # that the axis names
PERPLEXITIES = (30, 40, 60, 100, 200, 400)


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a line for each kind of conversion, and a mark for each rival.

    Args:
        rows: by name.
        path: PNG file to write.
    """
    with png(path) as figure:
        figure.set_size_inches(8, 8)
        axes = figure.add_subplot()
        for kind, label in LINES.items():
            points = [_point(row) for name, row in rows.items() if re.fullmatch(rf"{kind} [\d.]+", name)]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        rivals = {name: row for name, row in rows.items() if name.startswith("rival ")}
        for mark, (name, row) in zip(MARKS, rivals.items(), strict=False):
            label = f"{name.removeprefix('rival ')} on the source"
            axes.plot(*_point(row), mark, color="gray", markeredgecolor="black", label=label)
        axes.axhline(rows["source"]["perplexity"], color="black", linewidth=1, label="source")
        _scale(axes)
        figure.legend(loc="outside lower center", ncols=2, fontsize="x-small")


def _point(row: dict[str, Any]) -> tuple[float, float]:
    return row["bytes"], row["perplexity"]


def _scale(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xticks(BYTES, labels=[f"{100 * share:g}%" for share in BYTES])
    axes.set_yscale("log")
    axes.set_yticks(PERPLEXITIES)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlabel("bytes cached per token, as a share of the source's 16-bit cache")
    axes.set_ylabel("WikiText-2 perplexity")
    axes.grid(alpha=0.3)
