"""The options of ``vllm-mla eval``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mla_converters.options.base import Flag
from mla_converters.options.common import Dtype, TrustedCode


class Engine(StrEnum):
    """The software that runs the models."""

    HF = "hf"
    VLLM = "vllm"


class TextProtocol(StrEnum):
    """How a text becomes windows."""

    STREAM = "stream"
    WIKITEXT2 = "wikitext2"


class EvalOptions(TrustedCode):
    """What an evaluation is asked to do; the defaults are those of the command line.

    Attributes:
        reference: model to compare all others with; usually the source of the conversions.
        text: UTF-8 text file to score; this or ``dataset``.
        dataset: ``ID[:CONFIG[:SPLIT[:COLUMN]]]`` on the hub.
        protocol: how the text becomes windows.
        windows: how many windows; None for the protocol's number.
        length: tokens in a window; None for the protocol's.
        engine: what runs the models.
        dtype: of all models.
        device: where transformers runs the models; None for the CPU. vLLM chooses itself.
        trust_remote_code: whether code that models bring may run.
    """

    reference: str | None = Field(
        None, description="Compare with this model: perplexity ratio, KL divergence, agreement on the likeliest token."
    )
    text: Annotated[Path | None, Flag(panel="Text")] = Field(None, description="UTF-8 text file to score.")
    dataset: Annotated[str | None, Flag(panel="Text")] = Field(
        None,
        description="Instead of --text, a data set on the hub: ID[:CONFIG[:SPLIT[:COLUMN]]], by default split test "
        "and column text. Its rows are joined by blank lines.",
    )
    protocol: Annotated[TextProtocol, Flag(panel="Text")] = Field(
        TextProtocol.STREAM,
        description="**stream**: the head of the text in 8 windows of 1024 tokens, a quick look. **wikitext2**: what "
        "papers report; the lines of a file are taken as rows of a data set, and all of it is scored in windows of "
        "2048.",
    )
    windows: Annotated[int | None, Flag(panel="Text", default="the protocol's")] = Field(
        None, ge=1, description="How many windows."
    )
    length: Annotated[int | None, Flag(panel="Text", default="the protocol's")] = Field(
        None, description="Tokens in a window."
    )
    engine: Annotated[Engine, Flag(panel="Engine")] = Field(
        Engine.HF,
        description="**hf**: transformers. **vllm**: the engine that will serve the model; it gives no KL divergence.",
    )
    dtype: Annotated[Dtype, Flag(panel="Engine")] = Field("float32", description="Of all models.")
    device: Annotated[str | None, Flag(panel="Engine", default="cpu")] = Field(
        None, description="Where --engine hf runs: cpu, cuda, cuda:1 …"
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with models. Read it first.")
