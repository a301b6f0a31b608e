"""The options of ``vllm-mla plan``."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag
from mla_converters.options.common import Dtype
from mla_converters.options.convert import Calibration, MethodChoice

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str, option: str = "--memory") -> int:
    """Bytes from a number with a unit, decimal (GB) or binary (GiB).

    Raises:
        OptionError: it is neither.
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


class PlanOptions(Calibration, MethodChoice):
    """What a plan is made for.

    Attributes:
        memory: memory for the KV cache, with its unit, to say how many tokens fit.
        revision: branch, tag or commit of a hub id.
        dtype: to serve in; None for what ``vllm serve`` takes: the source's, but bfloat16 for float32.
    """

    memory: Annotated[str, BeforeValidator(_memory)] = Field(
        "16GiB", description="Memory for the KV cache, to say how many tokens fit: 16GiB, 80GB …"
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Annotated[Dtype | None, Flag(default="the source's; bfloat16 for float32")] = Field(
        None, description="To serve in: float32, bfloat16 or float16."
    )

    @property
    def memory_bytes(self) -> int:
        """Bytes for the KV cache."""
        return parse_memory(self.memory)
