"""The model card of a converted checkpoint: ``README.md``, rendered from the reports beside it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from mla_converters.cards.evaluation import Evaluation, read_evaluation
from mla_converters.cards.markdown import shell, table
from mla_converters.cards.plot import can_plot, plot_layers
from mla_converters.checkpoints.manifest import update_manifest
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import read_json_object
from mla_converters.text.calibration import CHAT, SELF

CARD = "README.md"
PLOT = "per_layer.png"
REPORT = "conversion_report.json"
CARRIED = ("license", "license_name", "license_link", "language")  # what holds for a conversion as for its source
TAGS = ("mla", "multi-head-latent-attention", "vllm")
CACHE_BYTES = 2  # of a cached number; vLLM serves float32 checkpoints in bfloat16, too
METHODS = {
    "attention-aware": "what keeps RoPE and what the latent carries was chosen by what attention loses",
    "transmla": "RoRoPE, FreqFold and joint PCA of [TransMLA](https://arxiv.org/abs/2502.07864)",
    "mha2mla": "partial RoPE and SVD of [MHA2MLA](https://arxiv.org/abs/2502.14837), without the training meant to "
    "follow",
    "exact": "the same function and the same cache size as the source",
}
SEARCHES = {"split_errors": "latent + rotary", "freqfold_errors": "FreqFold"}


def source_card(folder: Path, hub_id: str | None) -> dict[str, Any]:
    """What the report says of the source's own card, for :func:`write_card`.

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


def write_card(folder: Path, *, evaluation: dict[str, Any] | None = None, repo: str | None = None) -> list[Path]:
    """Write the card, and the picture it shows where matplotlib is installed. Same reports, same bytes.

    Args:
        folder: a converted checkpoint with its ``conversion_report.json``.
        evaluation: a report of :func:`mla_converters.evaluation.run.evaluate` that measured this folder.
        repo: where the folder is served from on the hub; None for the folder itself.

    Returns:
        The files written.

    Raises:
        ConversionError: there is no such report, or the evaluation is of other models.
    """
    report = read_json_object(folder / REPORT)
    measured = None if evaluation is None else read_evaluation(evaluation, folder)
    written = [folder / CARD]
    try:
        context = read_json_object(folder / "config.json")["max_position_embeddings"]
        drawn = bool(report.get("per_layer")) and can_plot()
        if drawn:
            plot_layers(report["per_layer"], folder / PLOT)
            written.append(folder / PLOT)
        sections = (
            _introduction(report),
            _serving(repo),
            _conversion(report),
            _measurements(report, measured),
            *([f"![energy kept and output error of each layer]({PLOT})"] if drawn else []),
            *_searches(report),
            _limits(report, context, repo),
            _licence(report),
        )
        card = ModelCard(f"---\n{_metadata(report).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{folder / REPORT} is not a report that vllm-mla convert wrote ({error!r}).") from error
    (folder / CARD).write_text(str(card), encoding="utf-8")
    return written


def update_card(folder: Path, *, evaluation: dict[str, Any] | None = None, repo: str | None = None) -> list[Path]:
    """:func:`write_card`, in a folder whose manifest is written already."""
    try:
        written = write_card(folder, evaluation=evaluation, repo=repo)
        update_manifest(folder, written)
    except OSError as error:
        raise ConversionError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return written


def _metadata(report: dict[str, Any]) -> ModelCardData:
    known: dict[str, Any] = dict(report.get("source_card") or {})
    if "base_model" in known:
        known["base_model_relation"] = "finetune"  # the hub's word for other weights, not quantised
    return ModelCardData(library_name="vllm", pipeline_tag="text-generation", tags=list(TAGS), **known)


def _introduction(report: dict[str, Any]) -> str:
    name = Path(report["source"]).name
    saved = "the same KV cache size" if report["method"] == "exact" else f"{report['cache_ratio']:.1%} of its KV cache"
    return (
        f"# {name} with Multi-head Latent Attention\n\n"
        f"{_source(report)}, converted to Multi-head Latent Attention (MLA) with vllm-mla-plugin: {saved}, served by "
        "vLLM on its own MLA attention layer."
    )


def _source(report: dict[str, Any]) -> str:
    revision = f" at revision `{report['revision']}`" if report.get("revision") else ""
    hub_id = (report.get("source_card") or {}).get("base_model")
    name = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"The local model `{report['source']}`"
    return name + revision


def _serving(repo: str | None) -> str:
    title = "## Serve it" if repo else "## Serve it, in this folder"
    install = "pip install 'vllm-mla-plugin[cuda]'  # without GPU: 'vllm-mla-plugin[cpu]'"
    return (
        f"{title}\n\n{shell(install, f'vllm serve {_served(repo)}')}\n\n"
        "In transformers, `import vllm_mla_plugin.hf` makes `AutoModelForCausalLM.from_pretrained` load it."
    )


def _served(repo: str | None) -> str:
    return repo or "."


def _conversion(report: dict[str, Any]) -> str:
    lines = [
        f"- Method: `{report['method']}`, {METHODS.get(report['method'], '')}".rstrip(", "),
        f"- Cached per token and layer: `kv_lora_rank` {report['kv_lora_rank']} + `qk_rope_head_dim` "
        f"{report['qk_rope_head_dim']}{_layer_sizes(report)}, {report['cache_ratio']:.1%} of the source's",
    ]
    if calibration := report.get("calibration"):
        origins = (_origin(origin) for origin in calibration["origins"])
        tokens = f"{calibration['tokens']:,} tokens of {' and '.join(origins)}"
        lines.append(f"- Calibration: {tokens}, seed {calibration['seed']}")
    if "refit_steps" in report:
        lines.append(f"- Refit: {report['refit_steps']} steps in each layer")
    if healing := report.get("healing"):
        kl = healing["kl_held_out"]
        lines.append(
            f"- Healed: attentions trained on the source's predictions for {healing['steps']} steps of "
            f"{healing['batch_size']} x {healing['window']:,} tokens; text: {healing['tokens']:,} tokens of "
            f"{' and '.join(map(_origin, healing['text']))}; KL divergence on text held out {kl['before']:.4f} before, "
            f"{kl['after']:.4f} after"
        )
    lines.append(f"- Weights: {report['weights_bytes'] / 1e6:,.1f} MB, {report['dtype']}")
    lines.append(
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(report["versions"].items()))
    )
    commands = [block["command"] for block in (report, report.get("healing") or {}) if "command" in block]
    return "## How it was converted\n\n" + "\n".join(lines) + (f"\n\n{shell(*commands)}" if commands else "")


def _origin(name: str) -> str:
    written = {SELF: "text that the source wrote", CHAT: "conversations that the source wrote"}
    return written.get(name, f"`{name}`")


def _layer_sizes(report: dict[str, Any]) -> str:
    return " at most, by what each layer needs" if "kv_lora_ranks" in report else ""


def _measurements(report: dict[str, Any], evaluation: Evaluation | None) -> str:
    cached = report["cached_per_token_and_layer"]
    per_token = {who: round(numbers * report["layers"]) * CACHE_BYTES for who, numbers in cached.items()}
    rows = [
        ("numbers cached per token and layer", f"{cached['source']:,}", f"{cached['mla']:,}"),
        ("KV cache per token, at 16 bits", f"{per_token['source']:,} bytes", f"{per_token['mla']:,} bytes"),
    ]
    if layers := report.get("per_layer"):
        error = sum(layer["output_error"] for layer in layers) / len(layers)
        when = ", before it was healed" if "healing" in report else ""
        rows.append((f"relative squared error of attention outputs, mean of layers{when}", "0", f"{error:.4f}"))
    if evaluation is not None:
        rows += evaluation.rows
    return f"## Measured\n\n{table(('', 'source', 'MLA'), rows)}" + (
        f"\n\n{evaluation.text}" if evaluation is not None else ""
    )


def _searches(report: dict[str, Any]) -> list[str]:
    """A table for each setting that was chosen by the error of the attention outputs."""
    return [
        f"Settings tried, and the error of attention outputs on a part of the calibration text:\n\n"
        f"{table((title, 'error'), [(each, f'{error:.4f}') for each, error in report[name].items()])}"
        for name, title in SEARCHES.items()
        if name in report
    ]


def _limits(report: dict[str, Any], context: int, repo: str | None) -> str:
    lines = [f"- Contexts of up to {context:,} tokens."]
    if report["method"] != "exact":
        trained = "" if "healing" in report else "Nothing was trained after the conversion: "
        lines.append(
            f"- {trained}{'i' if trained else 'I'}t answers worse than its source, and more so on text unlike the "
            f"calibration's. Measure it on yours: `vllm-mla eval {_served(repo)} --reference SOURCE --text my.txt`."
        )
    lines.append(
        "- vLLM serves it only where the plugin is installed. What the source's card says of its limits holds here too."
    )
    return "## Limits\n\n" + "\n".join(lines)


def _licence(report: dict[str, Any]) -> str:
    known = report.get("source_card") or {}
    if "license" not in known:
        return (
            "## Licence\n\nThat of the source, which is not known here: look it up before you use or share this model."
        )
    name = known.get("license_name", known["license"])
    named = ", ".join(name) if isinstance(name, list) else name
    link = known.get("license_link")
    return f"## Licence\n\nThat of the source: {f'[{named}]({link})' if isinstance(link, str) else named}."
