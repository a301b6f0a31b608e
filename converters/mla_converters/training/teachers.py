"""The teacher beside the student: another model, or the student itself with its source's attentions."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.source import Source

ATTENTION = ".self_attn."  # in the names of the tensors that a conversion changes


class BothAttentions(nn.Module):
    """The attention of a converted layer, and that of its source, of which one is used at a time.

    A conversion changes nothing but attentions. The source's predictions are therefore those of the converted model
    with the source's attentions, and everything else is in memory only once, however it is sharded.

    Args:
        student: the converted layer's attention.
        teacher: the source's.

    Attributes:
        teaching: whether the source's is used.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.teaching = False

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The output of the attention that is used."""
        return (self.teacher if self.teaching else self.student)(*arguments, **named)


@contextmanager
def as_teacher(attentions: Iterable[BothAttentions]) -> Iterator[None]:
    """Use the source's attentions inside a ``with`` block."""
    attentions = list(attentions)
    for both in attentions:
        both.teaching = True
    try:
        yield
    finally:
        for both in attentions:
            both.teaching = False


def attach_source(student: PreTrainedModel, source: Source, dtype: torch.dtype) -> list[BothAttentions]:
    """Put the attentions of the student's source beside the student's own.

    Args:
        student: the converted model; changed in place.
        source: its source, all of whose other tensors it shares.
        dtype: dtype of the source's attentions.
    """
    skeleton = source.skeleton()
    device = next(student.parameters()).device
    # The converted model rotates by frequencies of its own layers, and does not use these.
    student.model.rotary_emb = type(skeleton.model.rotary_emb)(source.config).to(device)
    attentions = []
    for index, layer in enumerate(student.model.layers):
        attention = skeleton.model.layers[index].self_attn.requires_grad_(False).eval()
        weights = source.attention_weights(index)
        attention.load_state_dict({name: weight.to(device, dtype) for name, weight in weights.items()}, assign=True)
        layer.self_attn = BothAttentions(layer.self_attn, attention)
        attentions.append(layer.self_attn)
    return attentions


def shares_the_rest(checkpoint: Checkpoint, source: Source, dtype: torch.dtype) -> bool:
    """Whether a converted model has all tensors of its source but those of attentions, read as ``dtype``."""
    own, others = ({name for name in names if ATTENTION not in name} for names in (checkpoint.names(), source.names()))
    return own == others and all(
        torch.equal(checkpoint.tensor(name).to(dtype), source.tensor(name).to(dtype)) for name in sorted(own)
    )
