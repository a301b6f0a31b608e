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


class TaskScore(Part):
    """One metric of one task, and how it differs from the reference's.

    Attributes:
        task: name of the task, or of a group of tasks, whose problems then count together.
        metric: name of the metric.
        filter: what takes the answer out of the generated text; None if the task has only one way.
        higher_is_better: whether a larger score is better.
        problems: number of problems.
        few_shot: solved examples in front of each problem; None for a group.
        fraction: whether every problem's score is between 0 and 1, so that ``score`` is a share of the problems.
        score: mean over the problems, or as the task combines them.
        stderr: its standard error; None if the score is no mean, or with one problem.
        difference: score minus the reference's; None without a reference, as the following.
        difference_stderr: its standard error, paired by problem; None as ``stderr``.
        verdict: the difference in words; None as ``stderr``.
        score_of_each: the score of each problem, in the task's order, so that other models can be compared with this
            one later; None if they are no numbers of which ``score`` is the mean.
    """

    task: str
    metric: str
    filter: str | None = None
    higher_is_better: bool
    problems: int
    few_shot: int | None = None
    fraction: bool
    score: float
    stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    verdict: str | None = None
    score_of_each: list[float] | None = None

    @property
    def measure(self) -> str:
        """Task, metric and filter, in words."""
        return f"{self.task}, {self.metric}" + (f" ({self.filter})" if self.filter else "")

    @property
    def shown(self) -> str:
        """The score with its standard error, fractions in percent."""
        if not self.fraction:
            return f"{self.score:.4f}" + (f" ± {self.stderr:.4f}" if self.stderr is not None else "")
        return f"{self.score:.1%}" + (f" ± {self.stderr * 100:.1f}" if self.stderr is not None else "")

    @property
    def compared(self) -> str:
        """The verdict, or the bare difference if there is no standard error to judge it by; empty if neither is."""
        if self.verdict is not None or self.difference is None:
            return self.verdict or ""
        return f"{self.difference * 100:+.1f} points" if self.fraction else f"{self.difference:+.4f}"


class AskedTasks(Part):
    """What ``--tasks`` asked for.

    Attributes:
        names: tasks and groups.
        limit: the most problems of a task; None for all.
        chat: whether prompts had the model's chat template.
    """

    names: list[str]
    limit: int | None = None
    chat: bool


class ModelScores(Part):
    """The scores of one model; :mod:`mla_converters.evaluation.scores` explains those on text.

    A score is None if it was not asked for, or if the engine or the tokenizer cannot give it. Every comparison is None
    if there is no reference. Both cache sizes are None for a model without attention; a cache that is not packed counts
    two bytes a number.
    """

    name: str
    cached_per_token_and_layer: int | float | None = None
    bytes_per_token_and_layer: int | float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    loss_by_position: dict[str, float] | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    kl: float | None = None
    kl_by_position: dict[str, float] | None = None
    top1_agreement: float | None = None
    tasks: list[TaskScore] | None = None


class EvaluationReport(Report):
    """Models that were scored on the same windows of tokens, on the same tasks, or on both.

    Attributes:
        text: the text that was scored, or None.
        tasks: the tasks that were asked, or None.
        engine, device: the engine and device that scored the text; None without a text. The device is None with vLLM
            too, which chooses it itself. Tasks run on vLLM in any case.
        dtype: dtype of the models.
        reference: scores of the model with which the others are compared, or None.
        models: scores of the models, in the order in which the user gave them.
        command: the command that was run; None from the Python API.
        versions: versions of the packages.
        seconds, peak_rss_bytes: time and peak memory of the run.
    """

    text: ScoredText | None = None
    tasks: AskedTasks | None = None
    engine: str | None = None
    dtype: str
    device: str | None = None
    reference: ModelScores | None = None
    models: list[ModelScores]
    command: str | None = None
    versions: dict[str, str]
    seconds: float
    peak_rss_bytes: int
