"""The model card of a converted checkpoint: ``README.md``, rendered from the reports beside it."""

from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from jinja2 import Environment, PackageLoader, StrictUndefined

from mla_converters.cards.evaluation import Evaluation, read_evaluation
from mla_converters.cards.markdown import table
from mla_converters.cards.plot import can_plot, plot_layers
from mla_converters.checkpoints.manifest import update_manifest
from mla_converters.checkpoints.models import read_config
from mla_converters.checkpoints.rope_scaling import context_length
from mla_converters.errors import ConversionError
from mla_converters.options import CHAT, SELF
from mla_converters.reports.conversion import WRITER, ConversionReport, Healing
from mla_converters.reports.evaluation import EvaluationReport
from mla_converters.reports.verdicts import verdict
from mla_converters.support.json_files import read_json_object

CARD = "README.md"
PLOT = "per_layer.png"
REPORT = "conversion_report.json"
TEMPLATE = "card.md.jinja"
CARRIED = ("license", "license_name", "license_link", "language")  # these hold for a conversion as for its source
TAGS = ("mla", "multi-head-latent-attention", "vllm")
WRITTEN_TEXT = {SELF: "text that the source wrote", CHAT: "conversations that the source wrote"}


def source_card(folder: Path, hub_id: str | None) -> dict[str, Any]:
    """The part of the source's own card that :func:`write_card` needs.

    Args:
        folder: of the source.
        hub_id: its name on the hub, if it came from there.

    Returns:
        ``base_model``, ``license``, ``license_name``, ``license_link`` and ``language``, as far as they are known.
    """
    found: dict[str, Any] = {"base_model": hub_id} if hub_id else {}
    try:
        metadata = metadata_load(folder / CARD) or {}
    except Exception:  # no card, or one that is no text or no YAML: a model converts without
        return found
    return found | {name: metadata[name] for name in CARRIED if _is_text(metadata.get(name))}


def _is_text(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and each for each in values)


def read_report(folder: Path) -> ConversionReport:
    """The report of a conversion in its folder.

    Raises:
        ConversionError: there is none, or it is broken.
    """
    path = folder / REPORT
    return ConversionReport.parse(read_json_object(path), str(path), WRITER)


def write_card(folder: Path, *, evaluation: EvaluationReport | None = None, repo: str | None = None) -> list[Path]:
    """Write the card, and the picture it shows where matplotlib is installed. Same reports, same bytes.

    Args:
        folder: a converted checkpoint with its ``conversion_report.json``.
        evaluation: a report that measured this folder.
        repo: where the folder is served from on the hub; None for the folder itself.

    Returns:
        The files written.

    Raises:
        ConversionError: there is no such report, or the evaluation is of other models.
    """
    report = read_report(folder)
    measured = None if evaluation is None else read_evaluation(evaluation, folder, report.source)
    written = [folder / CARD]
    context = context_length(read_config(folder, trust_remote_code=False))
    if report.per_layer and can_plot():
        plot_layers(report.per_layer, folder / PLOT)
        written.append(folder / PLOT)
    (folder / CARD).write_text(_render(report, measured, context, repo, drawn=len(written) > 1), encoding="utf-8")
    return written


def update_card(folder: Path, *, evaluation: EvaluationReport | None = None, repo: str | None = None) -> list[Path]:
    """:func:`write_card`, in a folder whose manifest is written already."""
    try:
        written = write_card(folder, evaluation=evaluation, repo=repo)
        update_manifest(folder, written)
    except OSError as error:
        raise ConversionError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return written


def _render(
    report: ConversionReport, evaluation: Evaluation | None, context: int, repo: str | None, *, drawn: bool
) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, "."), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    text = environment.get_template(TEMPLATE).render(
        card_data=_metadata(report).to_yaml(),
        report=report,
        evaluation=evaluation,
        name=Path(report.source).name,
        method=_method(report),
        versions=", ".join(f"{name} {version}" for name, version in sorted(report.versions.items())),
        source=_source(report),
        saved="the same KV cache size" if report.cache_ratio == 1 else f"{report.cache_ratio:.1%} of its KV cache",
        packed=_packed(report),
        repo=repo,
        served=repo or ".",
        commands=[report.command, *([report.healing.command] if report.healing else [])],
        measurements=_measurements(report, evaluation),
        plot=PLOT if drawn else None,
        context=context,
        licence=_licence(report),
        origins=lambda names: " and ".join(WRITTEN_TEXT.get(name, f"`{name}`") for name in names),
        trained=_trained,
        percent=lambda share: f"{share:.1%}",
    )
    return str(ModelCard(text + "\n"))


def _metadata(report: ConversionReport) -> ModelCardData:
    known = report.source_card.model_dump(exclude_none=True)
    if "base_model" in known:
        known["base_model_relation"] = "finetune"  # the hub's word for other weights, not quantised
    return ModelCardData(library_name="vllm", pipeline_tag="text-generation", tags=list(TAGS), **known)


def _trained(healing: Healing) -> str:
    """What was trained, on what."""
    weights = {"attention": "attentions", "all": "all weights", "lora": "attentions"}[healing.train]
    how = ", by low-rank changes," if healing.train == "lora" else ""
    teacher = f"`{healing.teacher}`" if healing.teacher else "the source"
    goals = [f"{teacher}'s predictions"] if healing.kl_held_out else []
    goals += ["the text itself"] if healing.lm_held_out else []
    return f"{weights} trained{how} on {' and '.join(goals)}"


def _method(report: ConversionReport) -> str:
    summary = f", {report.method_summary}" if report.method_summary else ""
    paper = f" ([paper]({report.method_reference}))" if report.method_reference else ""
    return f"`{report.method}`{summary}{paper}"


def _packed(report: ConversionReport) -> str | None:
    """The formats of a packed cache, each once."""
    if report.latent_cache is None:
        return None
    if isinstance(report.latent_cache, str):
        return f"`{report.latent_cache}`"
    counted = Counter(report.latent_cache)
    return ", ".join(f"`{spec}` ({count} {'layer' if count == 1 else 'layers'})" for spec, count in counted.items())


def _source(report: ConversionReport) -> str:
    revision = f" at revision `{report.revision}`" if report.revision else ""
    hub_id = report.source_card.base_model
    name = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"The local model `{report.source}`"
    return name + revision


def _measurements(report: ConversionReport, evaluation: Evaluation | None) -> str:
    """The table of measures, source beside conversion."""
    cached, (source, mla) = report.cached_per_token_and_layer, report.cache_bytes
    unit = "packed; the source's at 16 bits" if report.latent_cache else "at 16 bits"
    rows = [
        ("numbers cached per token and layer", f"{cached.source:,}", f"{cached.mla:,}"),
        (f"KV cache per token, {unit}", f"{source:,} bytes", f"{mla:,} bytes"),
    ]
    if layers := report.per_layer:
        error = sum(layer.output_error for layer in layers) / len(layers)
        when = ", before it was healed" if report.healing else ""
        rows.append((f"relative squared error of attention outputs, mean of layers{when}", "0", f"{error:.4f}"))
    if check := report.self_check:
        agreement = f"{check.top1_agreement:.1%} of {check.tokens} tokens"
        rows.append(("self-check: likeliest token is the source's, on a short English text", "100%", agreement))
    if loss := report.loss:
        text = f"{loss.tokens:,} tokens held out"
        rows.append((f"perplexity, {text}", f"{loss.source_perplexity:.3f}", f"{loss.perplexity:.3f}"))
        rows.append((f"KL divergence from the source, {text}", "0", f"{loss.kl:.4f} nats per token"))
    if found := verdict(report):
        rows.append(("verdict", "", found.words))
    if evaluation is None or evaluation.reference is None:
        return table(("", "source", "MLA"), rows + ([] if evaluation is None else evaluation.rows))
    compared = table(("", f"`{evaluation.reference}`", "MLA"), evaluation.rows)
    return "\n\n".join((table(("", "source", "MLA"), rows), compared))


def _licence(report: ConversionReport) -> str:
    known = report.source_card
    if known.license is None:
        return "That of the source, which is not known here: look it up before you use or share this model."
    name = known.license_name or known.license
    named = ", ".join(name) if isinstance(name, list) else name
    link = known.license_link
    return f"That of the source: {f'[{named}]({link})' if isinstance(link, str) else named}."
