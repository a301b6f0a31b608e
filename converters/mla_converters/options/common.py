"""Options that several commands have."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag, OptionsModel

Dtype = Literal["float32", "bfloat16", "float16"]
Train = Literal["attention", "all", "lora"]
"""The weights that a training changes: those of the attentions, all, or low-rank changes of the attentions."""


class TrustedCode(OptionsModel):
    """Whether Python code that comes with a model may run."""

    trust_remote_code: bool = Field(False, description="Run Python code that comes with the tokenizer. Read it first.")


class Device(OptionsModel):
    """The device that does the work."""

    device: Annotated[str | None, Flag(default="the GPU, if there is one")] = Field(
        None, description="Where to run: cpu, cuda, cuda:1 …"
    )


class Seed(OptionsModel):
    """The seed of everything that is drawn at random."""

    seed: Annotated[int, Flag(panel="Text")] = Field(0, description="Same seed, same output to the byte.")

    @field_validator("seed")
    @classmethod
    def _fits_generators(cls, seed: int) -> int:
        if not -(2**63) <= seed < 2**64:
            raise OptionError(f"--seed is {seed}, but must fit 64 bits.")
        return seed
