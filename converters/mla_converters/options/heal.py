"""The options of ``vllm-mla heal``."""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag
from mla_converters.options.common import Device, Seed, Train, TrustedCode
from mla_converters.options.text import MixedText

TRAINING, MEMORY = "Training", "Memory and devices"


def parse_loss(text: str) -> dict[str, float]:
    """The weight of each loss: ``kl``, ``lm``, or a weighted sum such as ``kl:0.8,lm:0.2``.

    Raises:
        OptionError: the text is no such sum.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(kl|lm)(?::(\d*\.?\d+))?", part.strip())
        if not match or match[1] in weights or float(match[2] or 1) == 0:
            raise OptionError(f"--loss is {text!r}, but must be kl, lm, or a weighted sum such as kl:0.8,lm:0.2.")
        weights[match[1]] = float(match[2] or 1)
    return weights


def _loss(text: str) -> str:
    parse_loss(text)
    return text


class HealOptions(TrustedCode, Device, Seed, MixedText):
    """The options of healing, with the command line's defaults.

    Attributes:
        source: the model's source; None for the source that the model names.
        teacher: a model with the same tokenizer whose predictions are learnt, or a folder that ``vllm-mla logits``
            wrote, which then gives the text too; None for the source.
        tokens: limit on the number of tokens; one window in 32 is held out.
        length: tokens in a window, at most the source's context; None for 256 to 1,024, depending on how much the
            conversion lost.
        train: the weights that change: those of the attentions, all, or low-rank changes of the attentions' matrices.
        loss: the KL divergence from the teacher's predictions, the loss of a language model on the text, or a sum.
        temperature: of both models' predictions in the KL divergence.
        lora_rank: rank of the low-rank changes.
        hidden_steps: number of steps at the beginning in which the hidden states of all layers are learnt instead.
        steps: number of steps of Adam; None for one pass over the windows, or two if the conversion lost much.
        batch_size: windows in a step, over all processes.
        learning_rate: learning rate as a fraction of each matrix's root mean square; None to derive it from how much
            the conversion lost.
        dtype: of the computation, while trained weights are float32; None for bfloat16 on devices that have it.
        attention: kernels of the converted model's attention, as transformers names them.
        device_batch_size: windows that one device computes at a time; None for all of its share of a step.
        gradient_checkpointing: whether each layer is computed twice, so that less has to be kept.
        fsdp: whether weights, gradients and moments are sharded over the processes (FSDP2).
        device: the device of all models; None for the GPU, if there is one.
    """

    source: Annotated[str | None, Flag(default="what MODEL says it was")] = Field(
        None, description="What MODEL was converted from."
    )
    teacher: Annotated[str | None, Flag(default="the source")] = Field(
        None,
        description="Larger model with the same tokenizer, or what `vllm-mla logits` wrote, to learn from instead.",
    )
    tokens: Annotated[int, Flag(panel="Text")] = Field(
        65536, description="How many tokens at most, in windows; one in 32 is held out to measure."
    )
    length: Annotated[int | None, Flag(panel="Text", default="256 to 1024, from how much was lost")] = Field(
        None, ge=1, description="Tokens in a window, at most the source's context."
    )
    train: Annotated[Train, Flag(panel=TRAINING)] = Field(
        "attention",
        description="Weights to train: those of the attentions, all, or low-rank changes of the attentions (peft).",
    )
    loss: Annotated[str, Flag(panel=TRAINING, metavar="kl|lm|SUM"), BeforeValidator(_loss)] = Field(
        "kl", description="kl: predict what the teacher predicts; lm: predict the text; or a sum like kl:0.8,lm:0.2."
    )
    temperature: Annotated[float, Flag(panel=TRAINING)] = Field(
        1.0, gt=0, description="Temperature of both models' predictions in kl."
    )
    lora_rank: Annotated[int, Flag(panel=TRAINING)] = Field(16, ge=1, description="Rank of --train lora.")
    hidden_steps: Annotated[int, Flag(panel=TRAINING)] = Field(
        0, ge=0, description="Steps at the start that teach the hidden states of all layers instead."
    )
    steps: Annotated[int | None, Flag(panel=TRAINING, default="each window once, or twice if much was lost")] = Field(
        None, ge=1, description="Steps of Adam."
    )
    batch_size: Annotated[int, Flag(panel=TRAINING)] = Field(
        1, ge=1, description="Windows in a step, over all processes."
    )
    learning_rate: Annotated[float | None, Flag(panel=TRAINING, default="from how much was lost")] = Field(
        None, gt=0, description="Learning rate as a fraction of each matrix's root mean square; cosine decay."
    )
    dtype: Annotated[Literal["float32", "bfloat16"] | None, Flag(panel=MEMORY, default="bfloat16 where it is fast")] = (
        Field(None, description="Dtype of the computation; trained weights are float32.")
    )
    attention: Annotated[Literal["sdpa", "xformers"], Flag(panel=MEMORY)] = Field(
        "sdpa", description="Kernels of MODEL's attention; xformers needs that package and a GPU."
    )
    device_batch_size: Annotated[int | None, Flag(panel=MEMORY, default="its share of --batch-size")] = Field(
        None, ge=1, description="Windows that one device computes at a time; the gradients of a step add up."
    )
    gradient_checkpointing: Annotated[bool, Flag(panel=MEMORY)] = Field(
        False, description="Compute each layer twice, and keep less."
    )
    fsdp: Annotated[bool, Flag(panel=MEMORY)] = Field(
        False, description="Shard weights, gradients and moments over the processes (FSDP2)."
    )

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> Self:
        """Refuse what would change nothing, because the user would believe that it did."""
        given = self.model_fields_set
        if "temperature" in given and "kl" not in self.losses:
            raise OptionError(
                f"--temperature is of the predictions in kl, and --loss is {self.loss}: leave it out, or add kl to the "
                "loss."
            )
        if "lora_rank" in given and self.train != "lora":
            raise OptionError(f"--lora-rank is for --train lora, and --train is {self.train}: leave it out.")
        if self.steps is not None:
            self.check_stages(self.steps)
        return self

    def check_stages(self, steps: int) -> None:
        """Check that predictions are learnt, too.

        Args:
            steps: number of steps.

        Raises:
            OptionError: all steps teach hidden states.
        """
        if self.hidden_steps >= steps:
            raise OptionError(
                f"--hidden-steps is {self.hidden_steps}, but must be less than the {steps} steps: lower it, or raise "
                "--steps."
            )

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss that counts."""
        return parse_loss(self.loss)
