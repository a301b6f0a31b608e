"""The options of ``vllm-mla bench``."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag, OptionsModel
from mla_converters.options.plan import parse_memory

MOST: Literal["most"] = "most"
RIVALS = (
    "fp8",
    "fp8_per_token_head",
    "int8_per_token_head",
    "int4_per_token_head",
    "nvfp4",
    "turboquant_k8v4",
    "turboquant_4bit_nc",
    "turboquant_k3v4_nc",
    "turboquant_3bit_nc",
)
"""vLLM's formats of a cache of keys and values, as ``--kv-cache-dtype`` names them."""


@dataclass(frozen=True)
class Workload:
    """Requests of one size that are sent together.

    Attributes:
        requests: number of requests; ``MOST`` for as many as the cache of the model's engine holds at full length.
        input_len: tokens of each prompt.
        output_len: tokens of each answer.
    """

    requests: int | Literal["most"]
    input_len: int
    output_len: int


def _parse_requests(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return tuple(MOST if part.strip() == MOST else int(part) for part in value.split(","))
    except ValueError as error:
        raise OptionError(f"--requests is {value!r}, but must be numbers or most, separated by commas.") from error


def _parse_lengths(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    pairs = []
    for part in value.split(","):
        numbers = part.split(":")
        if len(numbers) > 2 or not all(number.strip().isdigit() for number in numbers):
            raise OptionError(f"--lengths has {part!r}, but must have IN:OUT or one number for both, such as 1024.")
        pairs.append((int(numbers[0]), int(numbers[-1])))
    return tuple(pairs)


def _parse_cache(value: Any) -> Any:
    return parse_memory(value, "--cache") if isinstance(value, str) else value


def _parse_rivals(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    names = tuple(name.strip() for name in value.split(",")) if value != "none" else ()
    if unknown := [name for name in names if name not in RIVALS]:
        raise OptionError(f"--rivals has {unknown[0]!r}, but must be none or some of: {', '.join(RIVALS)}.")
    return names


def _parse_engine(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        arguments = json.loads(value)
    except json.JSONDecodeError as error:
        raise OptionError(f"--engine is not valid JSON: {error}.") from error
    if not isinstance(arguments, dict):
        raise OptionError(f"--engine is {value}, but must be a JSON object of arguments.")
    return arguments


def _positive(requests: tuple[int | Literal["most"], ...]) -> tuple[int | Literal["most"], ...]:
    if any(count != MOST and count < 1 for count in requests):
        raise OptionError("--requests must be 1 or more, or most.")
    return requests


class BenchOptions(OptionsModel):
    """The options of a benchmark, with the command line's defaults.

    Attributes:
        lengths: pairs of input and output length; None for TransMLA's lengths, as far as all models' contexts go.
        requests: numbers of requests, each of which is measured at all lengths; see :class:`Workload`.
        rounds: number of measurements of every model; the medians are reported.
        dtype: dtype of weights and cache; ``auto`` leaves it to the model.
        load_format: ``auto``, or ``dummy`` for random weights.
        rivals: formats of vLLM in which the first model's cache is measured too, where it is compared with others.
        cache: bytes of each engine's cache; None for vLLM's choice on a GPU, 4 GiB on a CPU.
        engine: further arguments of ``vllm.LLM``.
        workloads: workloads to measure instead of ``requests`` at ``lengths``.
    """

    lengths: Annotated[
        tuple[tuple[int, int], ...] | None,
        BeforeValidator(_parse_lengths),
        Flag(panel="Requests", metavar="IN:OUT,…", default="1024,2048,4096,8192,16384, as far as all contexts go"),
    ] = Field(None, description="Input and output tokens, IN:OUT or one number for both, separated by commas.")
    requests: Annotated[
        tuple[int | Literal["most"], ...],
        BeforeValidator(_parse_requests),
        AfterValidator(_positive),
        Flag(panel="Requests", metavar="N,…"),
    ] = Field(
        (16,),
        description="How many at once; several, separated by commas. **most**: as many as each model's own cache "
        "holds.",
    )
    rounds: Annotated[int, Flag(panel="Requests")] = Field(
        3, ge=1, description="Turns of every model; medians are reported."
    )
    rivals: Annotated[
        tuple[str, ...],
        BeforeValidator(_parse_rivals),
        Flag(panel="Requests", metavar="FORMAT,…", default="fp8,int4_per_token_head,turboquant_4bit_nc"),
    ] = Field(
        ("fp8", "int4_per_token_head", "turboquant_4bit_nc"),
        description="vLLM's formats of the first model's cache to measure too, as far as the device serves them; "
        "conversions are then measured in 16 bits and fp8 too. **none**: every model as it is.",
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Flag(panel="Engine")] = Field(
        "auto", description="Of all models."
    )
    load_format: Annotated[Literal["auto", "dummy"], Flag(panel="Engine")] = Field(
        "auto", description="**dummy**: random weights, to measure a shape."
    )
    cache: Annotated[
        int | None,
        BeforeValidator(_parse_cache),
        Flag(panel="Engine", metavar="SIZE", default="vLLM's choice on a GPU, 4GiB on a CPU"),
    ] = Field(None, description="Memory of each engine's KV cache: 4GiB …")
    engine: Annotated[dict[str, Any], BeforeValidator(_parse_engine), Flag(panel="Engine", metavar="JSON")] = Field(
        {}, description="Further arguments of vllm.LLM: tensor_parallel_size …"
    )
    workloads: Annotated[tuple[Workload, ...], Flag(hidden=True)] = ()
