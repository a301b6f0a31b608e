"""The report of a conversion, which travels with the model as ``conversion_report.json``."""

from typing import Any

from pydantic import Field, model_validator

from mla_converters.reports.base import Part, Report

WRITER = "vllm-mla convert"
CACHE_BYTES = 2  # of a cached number; vLLM serves float32 checkpoints in bfloat16, too
# The entries for settings of methods, and for searches, in reports without a format version.
_SETTINGS = ("freqfold", "rope_keep", "svd", "refit_steps", "without")
_SEARCHES = {"split_errors": "latent + rotary", "freqfold_errors": "FreqFold"}


class CachedNumbers(Part):
    """Numbers cached per token and layer by the source and by the converted model (the mean if layers differ)."""

    source: int
    mla: int | float


class CacheBytes(Part):
    """Bytes per token and layer (the mean if layers differ): of the source's cache in 16 bits, and of the converted
    model's as vLLM allocates it, with scales and padding."""

    source: int | float
    mla: int | float


class CalibrationText(Part):
    """The text on which a conversion was calibrated.

    Attributes:
        origins: names of files, or ``self`` or ``chat``.
        tokens: number of tokens.
        seed: the seed that selected or sampled them.
    """

    origins: list[str]
    tokens: int
    seed: int


class LayerMeasures(Part):
    """One layer, see :class:`mla_converters.methods.layer_conversion.Measured`."""

    energy_kept: float
    output_error: float


class Search(Part):
    """A search that compared values of one setting.

    Attributes:
        title: name of the setting.
        errors: relative squared error of the attention outputs for each candidate.
    """

    title: str
    errors: dict[str, float]


class SourceCard(Part):
    """The entries of the source's own card that are also true of the conversion."""

    base_model: str | None = None
    license: str | list[str] | None = None
    license_name: str | list[str] | None = None
    license_link: str | list[str] | None = None
    language: str | list[str] | None = None


class Divergence(Part):
    """A loss on held-out text before and after training, in nats per token."""

    before: float
    after: float


class Healing(Part):
    """The healing of a converted model.

    Attributes:
        command: the command that was run.
        text: names of files, or ``self`` or ``chat``.
        tokens: number of tokens in all texts.
        window, steps, batch_size, learning_rate, seed: settings of the training; a window is in tokens.
        train: the weights that were trained: ``attention``, ``all`` or ``lora``.
        loss: the loss: ``kl``, ``lm`` or a weighted sum.
        teacher: the model that taught; None for the source, or for none.
        kl_held_out: the divergence from the teacher on held-out text before and after; None without a teacher.
        lm_held_out: the loss of a language model on held-out text before and after; None where it did not count.
        warning: a sentence for the user if held-out text does not show that training helped.
        versions: versions of the packages.
    """

    command: str
    text: list[str]
    tokens: int
    window: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    train: str = "attention"
    loss: str = "kl"
    teacher: str | None = None
    kl_held_out: Divergence | None = None
    lm_held_out: Divergence | None = None
    warning: str | None = None
    versions: dict[str, str]


class SelfCheck(Part):
    """A comparison of source and conversion on a short probe, with transformers; see :mod:`mla_converters.proof`.

    Attributes:
        tokens: number of tokens in the probe.
        text: whether the probe is text. For a source without a tokenizer, it is token ids without meaning.
        source_perplexity, perplexity: perplexities of the source and of the conversion.
        kl: KL divergence from the source, in nats per token.
        top1_agreement: share of positions, 0 to 1, at which both models find the same token likeliest.
        worst_layer_error: the largest relative squared error of any layer's attention output.
    """

    tokens: int
    text: bool
    source_perplexity: float
    perplexity: float
    kl: float
    top1_agreement: float
    worst_layer_error: float


class Loss(Part):
    """What a conversion lost on text that it was not calibrated or trained on.

    See :mod:`mla_converters.streaming.loss`.

    Attributes:
        tokens: number of tokens.
        source_perplexity, perplexity: perplexities of the source and of the conversion.
        kl: KL divergence from the source, in nats per token.
        top1_agreement: share of positions, 0 to 1, at which both models find the same token likeliest.
    """

    tokens: int
    source_perplexity: float
    perplexity: float
    kl: float
    top1_agreement: float


class ConversionReport(Report):
    """The source, the settings and the measurements of a conversion.

    Attributes:
        method, method_summary, method_reference: name of the method, its summary and the address of its paper.
        lossless: whether the converted model computes the source's function.
        settings: the settings that the method used.
        source, revision: the name that the user gave, and the hub revision.
        kv_lora_rank, qk_rope_head_dim: sizes of the cache; the largest if layers differ.
        kv_lora_ranks, qk_rope_head_dims: sizes of each layer; None if layers do not differ.
        cached_per_token_and_layer: the cached numbers of both models.
        cache_ratio: the cache's bytes as a share of the source's in 16 bits.
        latent_cache: how the cache is packed, as :meth:`vllm_mla_plugin.checkpoint.cache_formats.CacheFormat.parse`
            reads it; a text for each layer if layers differ; None for a cache of 16-bit numbers.
        bytes_per_token_and_layer: the bytes of both caches; None in reports without them.
        layers: number of layers.
        command: the command that repeats the conversion.
        versions: versions of the packages.
        source_card: see :class:`SourceCard`.
        calibration: the calibration text; None for a method without calibration.
        searches: the searches of settings.
        warnings: sentences for the user.
        unknown_keys: keys of the source's configuration that were not understood, and that may or may not matter.
        rope_scaling: the RoPE scaling that the user added to the source; None without one.
        dtype, weights_bytes: dtype and size of the written weights.
        per_layer: measurements of each layer; None for a method without calibration.
        healing: the healing of the model; None if it was not healed.
        self_check: the short proof that was made before the model got its name.
        loss: what it lost on text held out; None for a method without text, or if no text was left.
        out, seconds, peak_rss_bytes: folder, time and peak memory of this run; not in the copy in the model's folder.
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
    latent_cache: str | list[str] | None = None
    bytes_per_token_and_layer: CacheBytes | None = None
    layers: int
    command: str
    versions: dict[str, str]
    source_card: SourceCard = SourceCard()
    calibration: CalibrationText | None = None
    searches: list[Search] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    unknown_keys: list[str] = Field(default_factory=list)
    rope_scaling: dict[str, Any] | None = None
    dtype: str
    weights_bytes: int
    per_layer: list[LayerMeasures] | None = None
    healing: Healing | None = None
    self_check: SelfCheck | None = None
    loss: Loss | None = None
    out: str | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Bytes of a token in all layers: of the source's cache in 16 bits, and of the converted model's."""
        if size := self.bytes_per_token_and_layer:
            return round(size.source * self.layers), round(size.mla * self.layers)
        cached = self.cached_per_token_and_layer
        return CACHE_BYTES * round(cached.source * self.layers), CACHE_BYTES * round(cached.mla * self.layers)

    @model_validator(mode="before")
    @classmethod
    def _from_unversioned(cls, content: Any) -> Any:
        """Convert reports of version 0.1.0, which had no format version and held a method's settings side by side."""
        if not isinstance(content, dict) or "format_version" in content or "lossless" in content:
            return content
        content = dict(content)
        content["lossless"] = content.get("method") == "exact"
        content["settings"] = {name: content.pop(name) for name in _SETTINGS if name in content}
        content["searches"] = [
            {"title": title, "errors": content.pop(name)} for name, title in _SEARCHES.items() if name in content
        ]
        return content
