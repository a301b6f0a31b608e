"""The options of ``vllm-mla heal``."""

from typing import Annotated

from pydantic import Field

from mla_converters.options.base import Flag
from mla_converters.options.common import Device, Seed, TrustedCode
from mla_converters.options.text import ORIGINS, SELF


class HealOptions(TrustedCode, Device, Seed):
    """How to heal; the defaults are those of the command line.

    Attributes:
        source: what the model was converted from; None for the source that the model names.
        text: text files, or ``self`` or ``chat`` for text that the source writes.
        tokens: how many tokens at most; one window in 32 is held out.
        steps: of Adam; None for one pass over the windows, or two if much was lost.
        length: tokens in a window, at most the source's context; None for 256 to 1,024, by how much was lost.
        batch_size: windows in a step.
        learning_rate: change of a weight in the first steps, as a fraction of its matrix's root mean square; None to
            derive it from how much was lost.
        device: where both models are; None for the GPU, if there is one.
    """

    source: Annotated[str | None, Flag(default="what MODEL says it was")] = Field(
        None, description="What MODEL was converted from."
    )
    text: Annotated[tuple[str, ...], Flag(panel="Text")] = Field((SELF,), min_length=1, description=ORIGINS)
    tokens: Annotated[int, Flag(panel="Text")] = Field(
        65536, description="How many tokens at most, in windows; one in 32 is held out to measure."
    )
    length: Annotated[int | None, Flag(panel="Text", default="256 to 1024, from how much was lost")] = Field(
        None, ge=1, description="Tokens in a window, at most the source's context."
    )
    steps: Annotated[int | None, Flag(panel="Training", default="each window once, or twice if much was lost")] = Field(
        None, ge=1, description="Steps of Adam."
    )
    batch_size: Annotated[int, Flag(panel="Training")] = Field(1, ge=1, description="Windows in a step.")
    learning_rate: Annotated[float | None, Flag(panel="Training", default="from how much was lost")] = Field(
        None, gt=0, description="Learning rate as a fraction of each matrix's root mean square; cosine decay."
    )
