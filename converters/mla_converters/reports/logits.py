"""The report of ``vllm-mla logits``, which lies beside the predictions as ``logits.json``."""

from mla_converters.reports.base import Report

WRITER = "vllm-mla logits"


class LogitsReport(Report):
    """What a teacher predicted, and on which text.

    Attributes:
        model: the teacher, as the user named it.
        command: the command that was run.
        text: names of files, or ``self`` or ``chat``.
        windows, length: number of windows, and tokens in each.
        top_k: number of tokens written down at every token.
        remainder: mean probability of all other tokens.
        bytes: size on disk.
        seconds: time that it took.
        versions: of this package, torch, transformers and vLLM.
    """

    model: str
    command: str
    text: list[str]
    windows: int
    length: int
    top_k: int
    remainder: float
    bytes: int
    seconds: float
    versions: dict[str, str]
