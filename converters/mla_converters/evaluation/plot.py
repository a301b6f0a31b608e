"""The picture of an evaluation: perplexity by cache size."""

from pathlib import Path

from mla_converters.reports.evaluation import EvaluationReport
from mla_converters.support.labels import short_names
from mla_converters.support.plots import png


def plot_report(report: EvaluationReport, path: Path) -> None:
    """Draw perplexity against cached bytes per token and layer, with a horizontal line for the reference.

    Args:
        report: the result of :func:`mla_converters.evaluation.run.evaluate`.
        path: PNG file to write.
    """
    with png(path) as figure:
        axes = figure.add_subplot()
        names = short_names([model.name for model in report.models])
        for name, model in zip(names, report.models, strict=True):
            if model.bytes_per_token_and_layer is not None and model.perplexity is not None:
                point = (model.bytes_per_token_and_layer, model.perplexity)
                axes.plot(*point, "o")
                axes.annotate(name, point, xytext=(6, 6), textcoords="offset points")
        if (reference := report.reference) and reference.perplexity is not None:
            (name,) = short_names([reference.name])
            label = f"{name} (reference): {reference.perplexity:.2f}"
            axes.axhline(reference.perplexity, linestyle="--", color="gray", label=label)
            axes.legend()
        axes.margins(x=0.2, y=0.15)
        axes.set_xlabel("bytes cached per token and layer; numbers that are not packed take 2")
        axes.set_ylabel(f"perplexity on {report.text.name}" if report.text else "perplexity")
        axes.grid(alpha=0.3)
