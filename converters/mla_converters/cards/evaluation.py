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
    rows = []
    if model.perplexity is not None:
        beside = "" if reference is None else f"{reference.perplexity:.2f}"
        rows.append(("perplexity", beside, f"{model.perplexity:.2f}"))
    if model.kl is not None:
        rows.append(("KL divergence from the source, nats per token", "0", f"{model.kl:.4f}"))
    if model.top1_agreement is not None:
        rows.append(("likeliest token is the source's", "100%", f"{model.top1_agreement:.1%}"))
    theirs = {score.measure: score.shown for score in (reference.tasks or [] if reference else [])}
    for score in model.tasks or []:
        own = f"{score.shown}: {score.compared}" if score.compared else score.shown
        rows.append((f"{score.measure}, {score.problems:,} problems", theirs.get(score.measure, ""), own))
    return rows


def _text(report: EvaluationReport) -> str:
    measured = []
    if text := report.text:
        measured.append(
            f"Perplexity of `{text.name}`, {text.windows:,} windows of {text.length:,} tokens, engine {report.engine}, "
            f"{report.dtype}."
        )
    if tasks := report.tasks:
        template = ", with the chat template" if tasks.chat else ""
        measured.append(
            f"Tasks by lm-evaluation-harness {report.versions['lm-eval']} on vLLM {report.versions['vllm']}, "
            f"{report.dtype}{template}; ± is one standard error, and differences are paired by problem."
        )
    return "\n\n".join([*measured, *([shell(report.command)] if report.command else [])])
