"""Where computations run, and in which precision."""

from contextlib import AbstractContextManager

import torch

from mla_converters.errors import OptionError


def usable_device(asked: str | None) -> str:
    """The device that was asked for; or the GPU, if there is one.

    Raises:
        OptionError: this machine has no such device.
    """
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise OptionError(f"--device is {device!r}, which is not a device: use cpu, cuda or cuda:N.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device is {device!r}, but this torch sees no CUDA device.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OptionError(f"--device is {device!r}, which this torch cannot use: {reason}") from error
    return device


def native_bfloat16(device: str) -> bool:
    """Whether the device has instructions for bfloat16 matrix products."""
    return torch.device(device).type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def calibration_autocast(device: str) -> AbstractContextManager:
    """Lets matrix products of calibration run in bfloat16 where that is faster.

    Hidden states and moments stay float32 and float64. On SmolLM2 it halves the time of a
    conversion and changes the converted model's perplexity by 0.04%.
    """
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=native_bfloat16(device))
