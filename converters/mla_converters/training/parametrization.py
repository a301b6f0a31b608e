"""Projections taken apart for training, so that blocks of different scale get learning rates of their own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize


class Apart(nn.Module):
    """A weight as two parameters, so that each has its own learning rate.

    Args:
        sizes: of the two parts: rows of each head, or columns.
        by_head: whether the sizes are rows of each head.
    """

    def __init__(self, sizes: tuple[int, int], by_head: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.by_head = by_head

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The weight."""
        whole = torch.cat((first, second), dim=1)
        return whole.flatten(0, 1) if self.by_head else whole

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of ``weight``, from which :meth:`forward` makes it again."""
        whole = weight.unflatten(0, (-1, sum(self.sizes))) if self.by_head else weight
        first, second = whole.split(self.sizes, dim=1)
        return first.clone(), second.clone()


class Heads(nn.Module):
    """The weight of an output projection as one matrix for each head, ``[heads, rows, columns]``.

    Args:
        heads: how many there are.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, by_head: torch.Tensor) -> torch.Tensor:
        """The weight."""
        return by_head.transpose(0, 1).flatten(1)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The parts of ``weight``, from which :meth:`forward` makes it again."""
        return weight.unflatten(1, (self.heads, -1)).transpose(0, 1).contiguous()


@contextmanager
def parts_apart(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Split each projection into blocks that get their own learning rate, for the time of a ``with`` block.

    The weights of these blocks differ in scale:

    - of ``q_proj``, the part without RoPE and the rotary part, because their keys differ in scale;
    - of ``kv_b_proj``, the part that makes keys and the part that makes values;
    - with QK-norm, of ``kv_a_proj_with_mqa``, the columns for the keys, which may be hundreds of times larger than the
      layer's input, and the columns for that input;
    - of all of these and ``o_proj``, the heads, each of which is a matrix of its own.

    Args:
        attentions: with ``nope_dim``, ``rope_dim`` and ``v_dim``.
    """
    split = []
    for attention in attentions:
        normed = hasattr(attention, "k_norm")
        nope, rope, value = attention.nope_dim, attention.rope_dim, attention.v_dim
        apart = {
            "q_proj": Apart((value if normed else nope, rope), by_head=True),
            "kv_b_proj": Apart((nope, value), by_head=True),
        }
        if normed:
            keys, hidden = attention.k_proj.weight.shape
            apart["kv_a_proj_with_mqa"] = Apart((keys, hidden), by_head=False)
        parts: dict[str, nn.Module] = {name: part for name, part in apart.items() if min(part.sizes)}
        parts["o_proj"] = Heads(attention.o_proj.in_features // value)
        for name, part in parts.items():
            projection = getattr(attention, name)
            parametrize.register_parametrization(projection, "weight", part)
            split.append(projection)
    yield
    for projection in split:
        parametrize.remove_parametrizations(projection, "weight")
