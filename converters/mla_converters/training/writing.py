"""Writing a trained model, whatever its weights are sharded over."""

from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.writer import Shards
from mla_converters.options.common import Train
from mla_converters.training.checkpoints import BYTES
from mla_converters.training.teachers import ATTENTION
from mla_converters.training.trained import PROJECTIONS, trained_tensors

TOKEN_BYTES = 4  # of a token id
SAVES = 2  # checkpoints; a new one is written before the old one goes


def disk_bytes(checkpoint: Checkpoint, choice: Train, lora_rank: int, tokens: int) -> int:
    """Bytes on disk of the trained model, and of checkpoints and text on the way there.

    Args:
        checkpoint: of the model before.
        choice: the weights that are trained.
        lora_rank: rank of low-rank changes.
        tokens: of the text.
    """
    tensors = {name: checkpoint.meta(name) for name in checkpoint.names()}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    trained = sum(_trained_numbers(name, tensor, choice, lora_rank) for name, tensor in tensors.items())
    return weights + TOKEN_BYTES * tokens + SAVES * BYTES * trained


def _trained_numbers(name: str, tensor: torch.Tensor, choice: Train, lora_rank: int) -> int:
    """How many numbers are trained to change a tensor of a checkpoint."""
    if choice != "all" and ATTENTION not in name:
        return 0
    if choice == "lora" and name.split(".")[-2] in PROJECTIONS:
        return lora_rank * sum(tensor.shape) if tensor.dim() == 2 else 0  # biases stay as they are
    return tensor.numel()


def write_weights(checkpoint: Checkpoint, student: PreTrainedModel, folder: Path) -> None:
    """Write all weights. All processes give their shards of those that were trained, and the main process writes.

    Args:
        checkpoint: of the model before; what was not trained is copied from it.
        student: the trained model.
        folder: for the new weights.
    """
    shards = Shards(folder, {name: checkpoint.meta(name) for name in checkpoint.names()})
    main, trained = PartialState().is_main_process, set()
    if main:
        shards.allocate()
    for name, tensor in trained_tensors(student):
        trained.add(name)
        if main and name in checkpoint:  # a tied head is in no file
            shards.write(name, tensor)
    if main:
        for name in checkpoint.names():
            if name not in trained:
                shards.write(name, checkpoint.tensor(name))
        shards.finish()
