"""The part of a model card that an evaluation fills."""

from dataclasses import dataclass
from pathlib import Path

from mla_converters.cards.markdown import shell
from mla_converters.errors import ConversionError
from mla_converters.reports.evaluation import EvaluationReport, ModelScores


@dataclass(frozen=True)
class Evaluation:
    """Rows of a table in the card, and the text below it that says how they were measured.

    Attributes:
        reference: the model in the second column; None if it is the conversion's source, or there is none.
        rows: of the table.
        text: below it.
    """

    reference: str | None
    rows: list[tuple[str, str, str]]
    text: str


def read_evaluation(report: EvaluationReport, folder: Path, source: str) -> Evaluation:
    """The part of an evaluation that is about a converted checkpoint.

    Args:
        report: of the evaluation.
        folder: the checkpoint.
        source: the model that it was converted from, as the conversion's report names it.

    Raises:
        ConversionError: it is about other models.
    """
    same = [row for row in report.models if _is(row.name, folder)]
    if len(same) != 1:
        names = ", ".join(row.name for row in report.models)
        raise ConversionError(f"The evaluation is not of {folder.name}, but of {names}.")
    other = _other(report.reference, source)
    name = f"`{other}`" if other else "the source"
    return Evaluation(other, _rows(same[0], report.reference, name), _text(report, name))


def _other(reference: ModelScores | None, source: str) -> str | None:
    """The name of a reference that is not the source."""
    if reference is None or Path(reference.name).resolve() == Path(source).resolve():
        return None
    return reference.name


def _is(name: str, folder: Path) -> bool:
    """Whether a model's name means this folder. Of a path on another machine, the last part decides."""
    path, folder = Path(name).resolve(), folder.resolve()
    return path == folder if path.exists() else path.name == folder.name


def _rows(model: ModelScores, reference: ModelScores | None, name: str) -> list[tuple[str, str, str]]:
    """Scores of the reference, which has this name in sentences, and of the model."""
    rows = []
    if model.perplexity is not None:
        beside = "" if reference is None else f"{reference.perplexity:.2f}"
        rows.append(("perplexity", beside, f"{model.perplexity:.2f}"))
    if model.kl is not None:
        rows.append((f"KL divergence from {name}, nats per token", "0", f"{model.kl:.4f}"))
    if model.top1_agreement is not None:
        rows.append((f"likeliest token is {name}'s", "100%", f"{model.top1_agreement:.1%}"))
    theirs = {score.measure: score.shown for score in (reference.tasks or [] if reference else [])}
    for score in model.tasks or []:
        own = f"{score.shown}: {score.compared}" if score.compared else score.shown
        rows.append((f"{score.measure}, {score.problems:,} problems", theirs.get(score.measure, ""), own))
    return rows


def _text(report: EvaluationReport, name: str) -> str:
    measured = []
    if text := report.text:
        measured.append(
            f"Perplexity of `{text.name}`, {text.windows:,} windows of {text.length:,} tokens, engine {report.engine}, "
            f"{report.dtype}."
        )
    if tasks := report.tasks:
        template = ", with the chat template" if tasks.chat else ""
        paired = f", and differences from the reference, {name}, are paired by problem" if report.reference else ""
        measured.append(
            f"Tasks by lm-evaluation-harness {report.versions['lm-eval']} on vLLM {report.versions['vllm']}, "
            f"{report.dtype}{template}; ± is one standard error{paired}."
        )
    return "\n\n".join([*measured, *([shell(report.command)] if report.command else [])])
