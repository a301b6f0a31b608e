"""Checkpoints of a training that another number of processes can go on from.

They are safetensors files, written by torch's distributed checkpoints: each process writes its own shards, and reads
the parts of any shards that it needs.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by their names in torch
BYTES = 12  # per trained weight: the weight and Adam's two moments, in float32


def save_training(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the trained weights and what Adam knows of each; all processes together.

    Raises:
        OSError: a file cannot be written.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quietly():
            dcp.save(_state(model, optimizer), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(str(next(iter(error.failures.values()))[0])) from error


def load_training(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what :func:`save_training` wrote; all processes together."""
    with _quietly():
        dcp.load(_state(model, optimizer), storage_reader=HuggingFaceStorageReader(str(folder)))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(model).items():
        known = _known(parameter, optimizer)
        # Weights may have taken different numbers of steps, because hidden states are learnt without the output head.
        state |= {name: parameter.detach(), f"{name}.step": known["step"].view(1)}
        state |= {f"{name}.{moment}": known[moment] for moment in MOMENTS}
    return state


def _known(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What Adam knows of a weight. If that is nothing yet, it gets what Adam itself begins with."""
    if not optimizer.state[parameter]:
        moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer.state[parameter]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
