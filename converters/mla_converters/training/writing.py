"""Writing a trained model, whatever its weights are sharded over."""

from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel

from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.writer import Shards
from mla_converters.options.common import Train
from mla_converters.training.checkpoints import BYTES
from mla_converters.training.teachers import ATTENTION
from mla_converters.training.trained import trained_tensors

TOKEN_BYTES = 4  # of a token id
SAVES = 2  # checkpoints; a new one is written before the old one goes


def disk_bytes(checkpoint: Checkpoint, choice: Train, tokens: int) -> int:
    """Bytes on disk of the trained model, and of checkpoints and text on the way there.

    Args:
        checkpoint: of the model before.
        tokens: of the text.
        choice: the weights that are trained. Low-rank changes count as the matrices that they change.
    """
    tensors = {name: checkpoint.meta(name) for name in checkpoint.names()}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    trained = [tensor for name, tensor in tensors.items() if choice == "all" or ATTENTION in name]
    return weights + TOKEN_BYTES * tokens + SAVES * sum(BYTES * tensor.numel() for tensor in trained)


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
