"""Splitting projections for training, so that blocks of different scale have their own learning rates."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize


class Apart(nn.Module):
    """A weight that is split into two parameters, so that each has its own learning rate.

    Args:
        sizes: sizes of the two parts.
        by_head: whether the sizes count rows of each head; if not, they count columns.
    """

    def __init__(self, sizes: tuple[int, int], by_head: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.by_head = by_head

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The weight that the parts form."""
        whole = torch.cat((first, second), dim=1)
        return whole.flatten(0, 1) if self.by_head else whole

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of ``weight``; :meth:`forward` puts them together again."""
        whole = weight.unflatten(0, (-1, sum(self.sizes))) if self.by_head else weight
        first, second = whole.split(self.sizes, dim=1)
        return first.clone(), second.clone()


class Heads(nn.Module):
    """A weight as one matrix for each head, ``[heads, rows, columns]``.

    Args:
        heads: number of heads.
        rows: whether a head has some of the weight's rows; if not, it has some of its columns.
    """

    def __init__(self, heads: int, rows: bool) -> None:
        super().__init__()
        self.heads = heads
        self.rows = rows

    def forward(self, by_head: torch.Tensor) -> torch.Tensor:
        """The weight that the parts form."""
        return by_head.flatten(0, 1) if self.rows else by_head.transpose(0, 1).flatten(1)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The parts of ``weight``; :meth:`forward` puts them together again."""
        if self.rows:
            return weight.unflatten(0, (self.heads, -1)).clone()
        return weight.unflatten(1, (self.heads, -1)).transpose(0, 1).contiguous()


@contextmanager
def parts_apart(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Split the projections of attentions inside a ``with`` block; see :func:`split_projections`."""
    split = split_projections(attentions)
    yield
    for projection in split:
        parametrize.remove_parametrizations(projection, "weight")


def split_projections(attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """Split each projection into blocks that get their own learning rate.

    The weights of these blocks differ in scale:

    - ``q_proj`` is split into the part without RoPE and the rotary part, because their keys differ in scale. Where
      ``q_rope_map`` makes the rotary part, the two are apart already.
    - ``kv_b_proj`` is split into the part that makes keys and the part that makes values.
    - ``kv_a_proj_with_mqa``, with QK-norm, is split into the columns for the keys and the columns for the layer's
      input, because the keys may be hundreds of times larger than the input.
    - ``q_proj``, ``kv_b_proj`` and ``o_proj`` are also split into heads, and each head is a matrix of its own.

    Args:
        attentions: modules with ``nope_dim``, ``rope_dim``, ``v_dim``, and ``q_rope_map`` or None.

    Returns:
        The projections that were split.
    """
    split = []
    for attention in attentions:
        normed = hasattr(attention, "k_norm")
        nope, rope, value = attention.nope_dim, attention.rope_dim, attention.v_dim
        apart = {"kv_b_proj": Apart((nope, value), by_head=True)}
        if attention.q_rope_map is None:
            apart["q_proj"] = Apart((value if normed else nope, rope), by_head=True)
        if normed:
            keys, hidden = attention.k_proj.weight.shape
            apart["kv_a_proj_with_mqa"] = Apart((keys, hidden), by_head=False)
        parts: dict[str, nn.Module] = {name: part for name, part in apart.items() if min(part.sizes)}
        heads = attention.o_proj.in_features // value
        parts["o_proj"] = Heads(heads, rows=False)
        if attention.q_rope_map is not None:
            parts["q_proj"] = Heads(heads, rows=True)
        for name, part in parts.items():
            projection = getattr(attention, name)
            parametrize.register_parametrization(projection, "weight", part)
            split.append(projection)
    return split
