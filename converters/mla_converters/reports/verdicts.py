"""What a loss means for the people who use a model, in words."""

from dataclasses import dataclass

from mla_converters.reports.conversion import ConversionReport


@dataclass(frozen=True)
class Verdict:
    """What to expect of a converted model.

    Attributes:
        below: the KL divergence from the source up to which it holds, in nats per token.
        words: what to expect.
        heals: whether healing is worth its time.
    """

    below: float
    words: str
    heals: bool


VERDICTS = (
    Verdict(0.005, "expect answers like the source's", heals=False),
    Verdict(0.05, "expect a little less than the source gives on hard tasks", heals=True),
    Verdict(0.1, "noticeably worse than the source: heal it, or take a larger cache", heals=True),
    Verdict(float("inf"), "unusable without training: heal it, or take a larger cache", heals=True),
)
"""Bounds by task scores of real models (``benchmarks/results/tasks.json``, docs/research/tasks.md)."""


def verdict(report: ConversionReport) -> Verdict | None:
    """The verdict on a conversion.

    None if it lost nothing, if nothing was measured on text, or if it was trained to differ from its source.
    """
    trained = report.healing
    if report.lossless or (trained and (trained.loss != "kl" or trained.teacher is not None)):
        return None
    if report.loss is not None:
        kl = report.loss.kl
    elif report.self_check is not None and report.self_check.text:
        kl = report.self_check.kl
    else:
        return None
    return next(verdict for verdict in VERDICTS if kl <= verdict.below)
