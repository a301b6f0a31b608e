"""The options of ``vllm-mla plan``."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag, OptionsModel
from mla_converters.options.common import Dtype, Train
from mla_converters.options.convert import Calibration, MethodChoice

HEAL = "Training with heal"

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str, option: str = "--memory") -> int:
    """Bytes from a number with a decimal (GB) or binary (GiB) unit.

    Raises:
        OptionError: the text is not such a number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text.strip(), re.IGNORECASE)
    unit = match and UNITS.get(match[2].upper())
    if not match or not unit or float(match[1]) == 0:
        raise OptionError(f"{option} is {text!r}, but must be a number with a unit, such as 16GiB or 80GB.")
    return int(float(match[1]) * unit)


def _memory(value: Any) -> Any:
    if isinstance(value, str):
        parse_memory(value)
    return value


class PlanTraining(OptionsModel):
    """The training that a plan is made for.

    Attributes:
        heal: whether to plan a training.
        train: the weights that change.
        devices: number of devices that train together.
        tokens: number of tokens to train on.
        length: tokens in a window.
        device_batch_size: windows that one device computes at a time.
        gradient_checkpointing: whether each layer is computed twice, so that less has to be kept.
        device_tflops: peak of one device in bfloat16, in 10^12 floating-point operations per second.
        measure: whether to measure the speed of this machine instead.
        device: the device to measure; None for the GPU, if there is one.
    """

    heal: Annotated[bool, Flag(panel=HEAL)] = Field(
        False, description="Say what training the conversion takes: memory per device, disk, hours."
    )
    train: Annotated[Train, Flag(panel=HEAL)] = Field("attention", description="Weights to train.")
    devices: Annotated[int, Flag(panel=HEAL)] = Field(1, ge=1, description="Devices that train together.")
    tokens: Annotated[int, Flag(panel=HEAL)] = Field(100_000_000, ge=1, description="Tokens to train on.")
    length: Annotated[int, Flag(panel=HEAL)] = Field(1024, ge=2, description="Tokens in a window.")
    device_batch_size: Annotated[int, Flag(panel=HEAL)] = Field(
        1, ge=1, description="Windows that one device computes at a time."
    )
    gradient_checkpointing: Annotated[bool, Flag(panel=HEAL)] = Field(
        False, description="Compute each layer twice, and keep less."
    )
    device_tflops: Annotated[float, Flag(panel=HEAL)] = Field(
        989.0, gt=0, description="Peak of one device in bfloat16; 40% of it are taken to be reached."
    )
    measure: Annotated[bool, Flag(panel=HEAL)] = Field(
        False, description="Measure the speed of this machine instead, in a few steps."
    )
    device: Annotated[str | None, Flag(panel=HEAL, default="the GPU, if there is one")] = Field(
        None, description="Device to measure."
    )


class PlanOptions(Calibration, MethodChoice, PlanTraining):
    """The options of a plan.

    Attributes:
        memory: memory for the KV cache, with a unit; the plan says how many tokens fit into it.
        revision: branch, tag or commit of a hub id.
        dtype: dtype in which the model will be served; None for the default of ``vllm serve``: the source's dtype, but
            bfloat16 if that is float32.
        tensor_parallel: number of GPUs to plan for; with more than one, the plan says what each of them caches.
    """

    memory: Annotated[str, BeforeValidator(_memory)] = Field(
        "16GiB", description="Memory for the KV cache, to say how many tokens fit: 16GiB, 80GB …"
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="GPUs that serve together: say what each caches. --memory is then that of each GPU.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Annotated[Dtype | None, Flag(default="the source's; bfloat16 for float32")] = Field(
        None, description="To serve in: float32, bfloat16 or float16."
    )

    @property
    def memory_bytes(self) -> int:
        """Bytes for the KV cache."""
        return parse_memory(self.memory)
