"""The report of an evaluation."""

from mla_converters.reports.base import Part, Report

WRITER = "vllm-mla eval --json"


class ScoredText(Part):
    """The text that was scored.

    Attributes:
        name: file name, or data set.
        sha256: SHA-256 of its UTF-8 bytes.
        protocol: the protocol that cut it into windows.
        windows, length: number of windows, and tokens in each.
        tokens_scored: number of scored tokens: all but the first of each window.
        bytes_scored: UTF-8 bytes of the text of these tokens; None if the tokenizer cannot tell.
    """

    name: str
    sha256: str
    protocol: str
    windows: int
    length: int
    tokens_scored: int
    bytes_scored: int | None = None


class ModelScores(Part):
    """The scores of one model; :mod:`mla_converters.evaluation.scores` explains each.

    A score is None if the engine or the tokenizer cannot give it. Every comparison is None if there is no reference.
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
        text: the text that was scored.
        engine, dtype, device: the engine, dtype and device that ran the models; the device is None with vLLM, which
            chooses it itself.
        reference: scores of the model with which the others are compared, or None.
        models: scores of the models, in the order in which the user gave them.
        command: the command that was run; None from the Python API.
        versions: versions of the packages.
        seconds, peak_rss_bytes: time and peak memory of the run.
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
