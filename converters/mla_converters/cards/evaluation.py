"""The part of a model card that an evaluation fills."""

from dataclasses import dataclass
from pathlib import Path

from mla_converters.cards.markdown import shell
from mla_converters.errors import ConversionError
from mla_converters.reports.evaluation import EvaluationReport, ModelScores


@dataclass(frozen=True)
class Evaluation:
    """Rows of the card's table, and the text below it that says how they were measured."""

    rows: list[tuple[str, str, str]]
    text: str


def read_evaluation(report: EvaluationReport, folder: Path) -> Evaluation:
    """The part of an evaluation that is about a converted checkpoint.

    Raises:
        ConversionError: it is about other models.
    """
    same = [row for row in report.models if Path(row.name).resolve().name == folder.resolve().name]
    if len(same) != 1:
        names = ", ".join(row.name for row in report.models)
        raise ConversionError(f"The evaluation is not of {folder.name}, but of {names}.")
    return Evaluation(_rows(same[0], report.reference), _text(report))


def _rows(model: ModelScores, reference: ModelScores | None) -> list[tuple[str, str, str]]:
    beside = "" if reference is None else f"{reference.perplexity:.2f}"
    rows = [("perplexity", beside, f"{model.perplexity:.2f}")]
    if model.kl is not None:
        rows.append(("KL divergence from the source, nats per token", "0", f"{model.kl:.4f}"))
    if model.top1_agreement is not None:
        rows.append(("likeliest token is the source's", "100%", f"{model.top1_agreement:.1%}"))
    return rows


def _text(report: EvaluationReport) -> str:
    text = report.text
    measured = (
        f"Perplexity of `{text.name}`, {text.windows:,} windows of {text.length:,} tokens, engine {report.engine}, "
        f"{report.dtype}."
    )
    return f"{measured}\n\n{shell(report.command)}" if report.command else measured
