"""The shared part of all pictures. matplotlib is imported only to draw one, because it is an optional package."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def png(path: Path) -> "Iterator[Figure]":
    """A figure to draw on, which is written to ``path`` when the block ends. The same drawing gives the same bytes."""
    # pyplot is not used, because it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    yield figure
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})  # keep matplotlib's version out
