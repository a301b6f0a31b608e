"""The report of an evaluation."""

from mla_converters.reports.base import Part, Report

WRITER = "vllm-mla eval --json"


class ScoredText(Part):
    """The text that was scored.

    Attributes:
        name: file name, or data set.
        sha256: of its UTF-8 bytes.
        protocol: how it became windows.
        windows, length: how many, and tokens in each.
        tokens_scored: all but the first of each window.
        bytes_scored: UTF-8 bytes behind these tokens; None if the tokenizer cannot tell.
    """

    name: str
    sha256: str
    protocol: str
    windows: int
    length: int
    tokens_scored: int
    bytes_scored: int | None = None


class ModelScores(Part):
    """One model's scores; see :mod:`mla_converters.evaluation.scores` for what each measures.

    Measures that the engine or the tokenizer cannot give are None, and so is every comparison without a reference.
    """

    name: str
    cached_per_token_and_layer: int | float | None = None
    perplexity: float
    bits_per_byte: float | None = None
    loss_by_position: dict[str, float]
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    kl: float | None = None
    kl_by_position: dict[str, float] | None = None
    top1_agreement: float | None = None


class EvaluationReport(Report):
    """Models that were scored on the same windows of tokens.

    Attributes:
        text: that was scored.
        engine, dtype, device: what ran the models; the device is None with vLLM, which chooses itself.
        reference: the model that the others are compared with, or None.
        models: in the order in which they were given.
        command: that was run; None from the Python API.
        versions: of the packages.
        seconds, peak_rss_bytes: of the run.
    """

    text: ScoredText
    engine: str
    dtype: str
    device: str | None = None
    reference: ModelScores | None = None
    models: list[ModelScores]
    command: str | None = None
    versions: dict[str, str]
    seconds: float
    peak_rss_bytes: int
