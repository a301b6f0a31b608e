"""Training in one process, or in many that ``torchrun`` or ``accelerate launch`` starts."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import DistError

from mla_converters.errors import ConversionError, OptionError

Window = TypeVar("Window")
PATIENCE = timedelta(days=7)  # the others wait while the main process samples text, or proves the model


def join_processes(device: str) -> PartialState:
    """Join the processes that were started together; without any others, there is only the main process.

    Args:
        device: the kind of device, as the user gave it. Each process of several gets a GPU of its own.
    """
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # --dtype decides, also with accelerate's configuration files
    return PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)


def begin_on_own_gpu(device: str | None) -> None:
    """Make the GPU of this process of several the current one, so that none of them takes memory of the first GPU.

    Args:
        device: as the user gave it; None for a GPU, if there is one.
    """
    if device in (None, "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def following() -> Iterator[None]:
    """Let a process whose main process has ended end without a traceback, because the main process has said why.

    Raises:
        ConversionError: the main process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, DistError) or "gloo" in str(error)
        if PartialState().is_main_process or not lost:
            raise
        raise ConversionError("The main process has ended, and said why.") from error


def asked_to_shard() -> bool:
    """Whether the configuration of ``accelerate launch`` asks for FSDP; asked only once.

    The models are sharded before Trainer sees them, so accelerate must not do it again.
    """
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shares(batch_size: int, at_a_time: int | None, processes: int) -> tuple[int, int]:
    """How many windows a device computes at a time, and how often in a step.

    Args:
        batch_size: windows in a step, over all processes.
        at_a_time: windows that a device computes at a time; None for its share of a step.
        processes: number of processes.

    Raises:
        OptionError: the windows of a step cannot be shared equally.
    """
    if batch_size % processes:
        raise OptionError(f"--batch-size is {batch_size}, but must be a multiple of the {processes} processes.")
    share = batch_size // processes
    at_a_time = at_a_time or share
    if share % at_a_time:
        raise OptionError(
            f"--device-batch-size is {at_a_time}, but must divide the {share} windows of a step that each device gets."
        )
    return at_a_time, share // at_a_time


def mean_over_windows(windows: Sequence[Window], measure: Callable[[Window], torch.Tensor]) -> torch.Tensor:
    """The mean of a measure over windows, which the processes share.

    All of them compute equally often, because a sharded model needs all of them for every window. The order of the sum
    does not depend on their number.
    """
    state = PartialState()
    own = range(state.process_index, len(windows) + -len(windows) % state.num_processes, state.num_processes)
    measured = [(index, measure(windows[min(index, len(windows) - 1)]).tolist()) for index in own]
    values = dict(gather_object(measured))
    return torch.tensor([values[index] for index in range(len(windows))], dtype=torch.float64).mean(0)
