"""What all pictures share. matplotlib is imported when one is drawn: it is an optional package."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def png(path: Path) -> "Iterator[Figure]":
    """A figure to draw on, written to ``path`` when the block ends. Same drawing, same bytes."""
    # No pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    yield figure
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})  # else matplotlib's version is in it
