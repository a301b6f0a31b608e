"""Refitting one converted layer: a few steps of Muon towards what the source's layer gives."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from mla_converters.latent.module import LatentAttention
from mla_converters.streaming.layers import SourceLayer, calibration_autocast
from mla_converters.training.muon import Muon

BATCH = 4  # windows to a step
QUERIES = 128  # consecutive tokens of each window whose outputs are compared in a step
WARMUP = 5  # steps
FLOOR = 1e-3  # of the mean square of the targets, below which a token's error is not magnified further


class Apart(nn.Module):
    """A weight as two parameters, so that each has a step size of its own.

    Args:
        sizes: of the two: of each head's rows, or of the columns.
        by_head: which of these.
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
        """What :meth:`forward` is given for ``weight``."""
        whole = weight.unflatten(0, (-1, sum(self.sizes))) if self.by_head else weight
        first, second = whole.split(self.sizes, dim=1)
        return first.clone(), second.clone()


class Heads(nn.Module):
    """The weight of a projection of what all heads read as a matrix of each head, ``[heads, rows, columns]``.

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
        """What :meth:`forward` is given for ``weight``."""
        return weight.unflatten(1, (self.heads, -1)).transpose(0, 1).contiguous()


@contextmanager
def parts_apart(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Give step sizes of their own to what has scales of its own, for the time of a ``with`` block.

    Queries with and without RoPE, for the keys of these are not of one size. What a latent gives to keys and to values.
    With QK-norm, a latent's map of keys, which may be hundreds of times larger than the layer's input, and of that.
    The heads of each projection are matrices of their own.

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


def relative_weights(targets: torch.Tensor) -> torch.Tensor:
    """What the squared error of each token's target ``[..., D]`` counts, ``[...]``: relative to the target, or the few
    tokens with huge activations (attention sinks) would be all that counts."""
    size = targets.square().sum(-1)
    return 1 / size.clamp(min=FLOOR * size.mean())


def relative_rates(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """An optimizer's groups in which each tensor's learning rate is ``rate`` times its root mean square: the scale of
    what leads into a latent and out of it is arbitrary."""
    return [{"params": [weight], "lr": rate * weight.detach().square().mean().sqrt().item()} for weight in parameters]


@dataclass(frozen=True)
class Refit:
    """How long and how fast.

    Attributes:
        steps: of Muon, on :data:`QUERIES` tokens of each of :data:`BATCH` windows; 0 for the closed form alone.
        rate: of change of a matrix in the first steps, relative to its root mean square, in a layer whose output errs
            by as much as it is; where little was lost, steps that large lose more than they repair.
    """

    steps: int = 96
    rate: float = 0.01


def refit_layer(
    attention: LatentAttention,
    layer: SourceLayer,
    hidden: torch.Tensor,
    expected: torch.Tensor,
    error: float,
    refit: Refit,
    generator: torch.Generator,
    through_mlp: bool,
) -> None:
    """Change all projections of ``attention`` so that the layer turns ``hidden`` into what is close to ``expected``.

    Behind the MLP, which magnifies some errors of the attention more than others, they count for what they cost. The
    error of each token is measured relative to what should be added to it.

    Args:
        attention: the converted attention, changed in place.
        layer: of the source.
        hidden: ``[windows, tokens, D]``, the layer's input in the converted model.
        expected: ``[windows, tokens, D]``, the source's residual stream after the layer, or after its attention.
        error: of the attention's output on the source's inputs, squared and relative to it.
        refit: steps and rate.
        generator: for the order of the windows.
        through_mlp: whether ``expected`` is what comes out of the layer.
    """
    with parts_apart([attention]):
        rate = refit.rate * math.sqrt(min(error, 1))
        optimizer = Muon(relative_rates(attention.parameters(), rate))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / refit.steps)) / 2,
        )
        # All keys before some queries: distances of up to the whole window, at the price of few queries.
        queries = min(QUERIES, hidden.shape[1])
        order = torch.empty(0, dtype=torch.long)
        for _ in range(refit.steps):
            if len(order) < min(BATCH, len(hidden)):
                order = torch.randperm(len(hidden), generator=generator)
            batch, order = order[:BATCH], order[BATCH:]
            # In whole blocks: tensors of ever new sizes fragment the heap to three times what is needed.
            end = queries * int(torch.randint(1, hidden.shape[1] // queries + 1, (), generator=generator))
            inputs = hidden[batch, :end].to(layer.device)
            last, target = inputs[:, -queries:], expected[batch, end - queries : end].to(layer.device)
            if torch.equal(target, last):  # the layer adds nothing: there is nothing to fit
                continue
            with calibration_autocast(layer.device):
                output = last + attention(layer.normed(inputs), torch.arange(end - queries, end))
            if through_mlp:
                output = output + layer.mlp(output)
            loss = ((output - target).square().sum(-1) * relative_weights(target - last)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
