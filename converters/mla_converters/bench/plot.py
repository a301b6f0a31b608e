"""The picture of a benchmark: throughput against length, for all models."""

from pathlib import Path

from mla_converters.reports.bench import BenchReport
from mla_converters.support.labels import short_names
from mla_converters.support.plots import png


def plot_report(report: BenchReport, path: Path) -> None:
    """Draw output tokens per second against input + output length: one line for each model and number of requests.

    Args:
        report: of :func:`mla_converters.bench.run.bench`.
        path: PNG file to write.
    """
    with png(path) as figure:
        axes = figure.add_subplot()
        rows = report.models
        full = list(dict.fromkeys(row.name for row in rows))
        for name, short in zip(full, short_names(full), strict=True):
            for requests in dict.fromkeys(row.requests for row in rows):
                points = [
                    (row.input_len + row.output_len, row.output_tokens_per_second)
                    for row in rows
                    if (row.name, row.requests) == (name, requests)
                ]
                axes.plot(*zip(*sorted(points), strict=True), "o-", label=f"{short}, {requests} requests")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("input + output tokens of a request")
        axes.set_ylabel("output tokens per second")
        axes.grid(alpha=0.3)
        axes.legend()
