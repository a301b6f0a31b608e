"""The options of ``vllm-mla eval``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag, option_name
from mla_converters.options.common import Dtype, TrustedCode


class Engine(StrEnum):
    """The software that runs the models."""

    HF = "hf"
    VLLM = "vllm"


class TextProtocol(StrEnum):
    """How a text is cut into windows."""

    STREAM = "stream"
    WIKITEXT2 = "wikitext2"


def _parse_tasks(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise OptionError(f"--tasks is {value!r}, but must be names separated by commas, such as arc_easy,gsm8k.")
    return tuple(dict.fromkeys(names))


class EvalOptions(TrustedCode):
    """The options of an evaluation, with the command line's defaults.

    Attributes:
        reference: the model with which all others are compared; usually the source of the conversions.
        text: UTF-8 text file to score; given instead of ``dataset``.
        dataset: ``ID[:CONFIG[:SPLIT[:COLUMN]]]`` of a data set on the hub; given instead of ``text``.
        protocol: how the text is cut into windows.
        windows: number of windows; None for the protocol's number.
        length: tokens in a window; None for the protocol's number.
        engine: the software that runs the models.
        dtype: dtype of all models.
        device: the device on which transformers runs the models; None for the CPU. vLLM chooses its device itself.
        tasks: names of tasks and groups of lm-evaluation-harness, ``needles``, or ``needles_N``.
        tasks_dir: folder with YAML files of more tasks. Paths in them start there.
        limit: the number of problems of each task; None for all.
        chat: whether prompts get the model's chat template.
        allow_code_execution: whether tasks may run code that the models write.
        trust_remote_code: whether code that comes with models may run.
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
    tasks: Annotated[tuple[str, ...], BeforeValidator(_parse_tasks), Flag(panel="Tasks", metavar="NAME,…")] = Field(
        (),
        description="Tasks of lm-evaluation-harness, on vLLM: arc_easy,gsm8k. **needles**: find facts that are hidden "
        "in long text (--text, or one that comes with the package), in lengths up to the models' context; "
        "**needles_4096**: in this length only. Needs the extra eval.",
    )
    tasks_dir: Annotated[Path | None, Flag(panel="Tasks", metavar="DIR")] = Field(
        None, description="Folder with YAML files of your own tasks. Paths in them start there. Their Python code runs."
    )
    limit: Annotated[int | None, Flag(panel="Tasks", default="all")] = Field(
        None, ge=1, description="How many problems of each task."
    )
    chat: Annotated[bool, Flag(panel="Tasks")] = Field(False, description="Ask with the model's chat template.")
    allow_code_execution: Annotated[bool, Flag(panel="Tasks")] = Field(
        False, description="Let tasks such as humaneval run the code that a model writes, on this machine."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with models. Read it first.")

    @model_validator(mode="after")
    def _tasks_are_named(self) -> Self:
        for name in ("tasks_dir", "limit", "chat", "allow_code_execution"):
            if getattr(self, name) and not self.tasks:
                raise OptionError(f"{option_name(name)} is for tasks: name them with --tasks, or leave it out.")
        return self

    @model_validator(mode="after")
    def _text_is_named(self) -> Self:
        if self.tasks and self.text is None and self.dataset is None:
            for name in ("protocol", "windows", "length", "engine", "device"):
                if name in self.model_fields_set:
                    raise OptionError(f"{option_name(name)} is for text: give --text or --dataset, or leave it out.")
        return self
