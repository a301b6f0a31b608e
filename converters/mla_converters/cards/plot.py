"""The card's picture: what each layer kept and lost."""

from importlib.util import find_spec
from pathlib import Path

from mla_converters.reports.conversion import LayerMeasures
from mla_converters.support.plots import png


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_layers(layers: list[LayerMeasures], path: Path) -> None:
    """Draw energy kept and output error of each layer, one above the other. Same numbers, same bytes.

    Args:
        layers: measures of each layer.
        path: PNG file to write.
    """
    from matplotlib.ticker import MaxNLocator

    with png(path) as figure:
        kept, lost = figure.subplots(2, sharex=True)
        kept.plot([layer.energy_kept for layer in layers], "o-")
        kept.set_ylabel("energy kept")
        lost.plot([layer.output_error for layer in layers], "o-", color="tab:red")
        lost.set_ylabel("output error")
        lost.set_xlabel("layer")
        lost.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (kept, lost):
            axes.grid(alpha=0.3)
