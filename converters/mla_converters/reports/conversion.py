"""The report of a conversion, which travels with the model as ``conversion_report.json``."""

from typing import Any

from pydantic import Field, model_validator

from mla_converters.reports.base import Part, Report

WRITER = "vllm-mla convert"
# Settings of methods, and their searches, as reports without a format version have them.
_SETTINGS = ("freqfold", "rope_keep", "svd", "refit_steps", "without")
_SEARCHES = {"split_errors": "latent + rotary", "freqfold_errors": "FreqFold"}


class CachedNumbers(Part):
    """Numbers cached per token and layer, of the source and of the converted model (the mean where layers differ)."""

    source: int
    mla: int | float


class CalibrationText(Part):
    """The text that a conversion was calibrated on: names of files or ``self`` or ``chat``, tokens, seed."""

    origins: list[str]
    tokens: int
    seed: int


class LayerMeasures(Part):
    """One layer, see :class:`mla_converters.methods.layer_conversion.Measured`."""

    energy_kept: float
    output_error: float


class Search(Part):
    """Settings that were compared.

    Attributes:
        title: of the setting.
        errors: error of the attention outputs of each candidate, relative and squared.
    """

    title: str
    errors: dict[str, float]


class SourceCard(Part):
    """The part of the source's own card that holds for the conversion too."""

    base_model: str | None = None
    license: str | list[str] | None = None
    license_name: str | list[str] | None = None
    license_link: str | list[str] | None = None
    language: str | list[str] | None = None


class Divergence(Part):
    """KL divergence from the source on text held out, nats per token, before and after training."""

    before: float
    after: float


class Healing(Part):
    """What healing did.

    Attributes:
        command: that was run.
        text: names of files, or ``self`` or ``chat``.
        tokens: of all texts.
        window, steps, batch_size, learning_rate, seed: of the training.
        kl_held_out: before and after.
        versions: of the packages.
    """

    command: str
    text: list[str]
    tokens: int
    window: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    kl_held_out: Divergence
    versions: dict[str, str]


class ConversionReport(Report):
    """What was converted, how, and what it measured.

    Attributes:
        method, method_summary, method_reference: name of the method, its summary and the address of its paper.
        lossless: whether the converted model computes the source's function.
        settings: of the method, as they were used.
        source, revision: the name that the user gave, and the hub revision.
        kv_lora_rank, qk_rope_head_dim: sizes of the cache; where layers differ, the largest.
        kv_lora_ranks, qk_rope_head_dims: of each layer, where layers differ.
        cached_per_token_and_layer, cache_ratio: numbers cached, and their share of the source's.
        layers: how many.
        command: that repeats the conversion.
        versions: of the packages.
        source_card: see :class:`SourceCard`.
        calibration: None for a method without.
        searches: settings that were searched.
        warnings: what the user should know, a sentence each.
        dtype, weights_bytes: of the written weights.
        per_layer: measures of each layer; None for a method without calibration.
        healing: what healing did; None before.
        out, seconds, peak_rss_bytes: of this run; not in the model's folder.
    """

    method: str
    method_summary: str = ""
    method_reference: str | None = None
    lossless: bool
    settings: dict[str, Any] = Field(default_factory=dict)
    source: str
    revision: str | None = None
    kv_lora_rank: int
    qk_rope_head_dim: int
    kv_lora_ranks: list[int] | None = None
    qk_rope_head_dims: list[int] | None = None
    cached_per_token_and_layer: CachedNumbers
    cache_ratio: float
    layers: int
    command: str
    versions: dict[str, str]
    source_card: SourceCard = SourceCard()
    calibration: CalibrationText | None = None
    searches: list[Search] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    dtype: str
    weights_bytes: int
    per_layer: list[LayerMeasures] | None = None
    healing: Healing | None = None
    out: str | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_unversioned(cls, content: Any) -> Any:
        """Take in the reports of version 0.1.0, which had no format version and a method's settings side by side."""
        if not isinstance(content, dict) or "format_version" in content or "lossless" in content:
            return content
        content = dict(content)
        content["lossless"] = content.get("method") == "exact"
        content["settings"] = {name: content.pop(name) for name in _SETTINGS if name in content}
        content["searches"] = [
            {"title": title, "errors": content.pop(name)} for name, title in _SEARCHES.items() if name in content
        ]
        return content
