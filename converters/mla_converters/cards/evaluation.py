"""What a model card says of an evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_converters.cards.markdown import shell
from mla_converters.errors import ConversionError


@dataclass(frozen=True)
class Evaluation:
    """What the card says of an evaluation: rows of the table, and what they were measured on."""

    rows: list[tuple[str, str, str]]
    text: str


def read_evaluation(report: dict[str, Any], folder: Path) -> Evaluation:
    """What a report of :func:`mla_converters.evaluation.run.evaluate` says of a converted checkpoint.

    Raises:
        ConversionError: nothing, or it is no such report.
    """
    try:
        rows = {str(row["name"]): row for row in report["models"]}
        same = [row for name, row in rows.items() if Path(name).resolve().name == folder.resolve().name]
        if len(same) == 1:
            return Evaluation(_evaluation_rows(same[0], report["reference"]), _evaluation_text(report))
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError("The evaluation is not a report that vllm-mla eval --json wrote.") from error
    raise ConversionError(f"The evaluation is not of {folder.name}, but of {', '.join(rows)}.")


def _evaluation_rows(model: dict[str, Any], reference: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    beside = "" if reference is None else f"{reference['perplexity']:.2f}"
    rows = [("perplexity", beside, f"{model['perplexity']:.2f}")]
    if model.get("kl") is not None:
        rows.append(("KL divergence from the source, nats per token", "0", f"{model['kl']:.4f}"))
    if "top1_agreement" in model:
        rows.append(("likeliest token is the source's", "100%", f"{model['top1_agreement']:.1%}"))
    return rows


def _evaluation_text(report: dict[str, Any]) -> str:
    text = report["text"]
    return (
        f"Perplexity of `{text['name']}`, {text['windows']:,} windows of {text['length']:,} tokens, "
        f"engine {report['engine']}, {report['dtype']}.\n\n{shell(report['command'])}"
    )
