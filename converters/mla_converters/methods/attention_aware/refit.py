"""The refit of one converted layer: a few steps of Muon towards the output of the source's layer."""

import math
from dataclasses import dataclass

import torch

from mla_converters.latent.module import LatentAttention
from mla_converters.options.methods import REFIT_STEPS
from mla_converters.streaming.layers import SourceLayer
from mla_converters.support.devices import calibration_autocast
from mla_converters.training.muon import Muon
from mla_converters.training.parametrization import parts_apart
from mla_converters.training.relative import relative_rates, relative_weights

BATCH = 4  # windows in a step
QUERIES = 128  # consecutive tokens of each window whose outputs are compared in a step
WARMUP = 5  # steps


@dataclass(frozen=True)
class Refit:
    """Steps and rate of a refit.

    Attributes:
        steps: number of steps of Muon, each on :data:`QUERIES` tokens of :data:`BATCH` windows; 0 for no refit.
        rate: learning rate as a fraction of each matrix's root mean square, for a layer that lost everything. It is
            scaled by the square root of the layer's error, because where little was lost, steps this large lose more
            than they repair.
    """

    steps: int = REFIT_STEPS
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
    """Train all projections of ``attention`` so that the layer's output for ``hidden`` comes close to ``expected``.

    Errors are measured after the MLP, because the MLP magnifies some of them more than others. The error of a token is
    relative to the size of the change that the layer should make to that token.

    Args:
        attention: the converted attention, changed in place.
        layer: the source's layer.
        hidden: ``[windows, tokens, D]``, the layer's input in the converted model.
        expected: ``[windows, tokens, D]``, the source's residual stream after the layer, or after its attention.
        error: relative squared error of the attention's output on the source's inputs, before the refit.
        refit: steps and rate.
        generator: draws the order of the windows.
        through_mlp: whether ``expected`` is the stream after the whole layer, not after its attention.
    """
    with parts_apart([attention]):
        rate = refit.rate * math.sqrt(min(error, 1))
        optimizer = Muon(relative_rates(attention.parameters(), rate))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / refit.steps)) / 2,
        )
        # Each step compares few queries but lets them see every earlier key, so that long distances are trained.
        queries = min(QUERIES, hidden.shape[1])
        order = torch.empty(0, dtype=torch.long)
        for _ in range(refit.steps):
            if len(order) < min(BATCH, len(hidden)):
                order = torch.randperm(len(hidden), generator=generator)
            batch, order = order[:BATCH], order[BATCH:]
            # The end is a multiple of `queries`, because tensors of ever new sizes fragment the heap, which then takes
            # three times the memory.
            end = queries * int(torch.randint(1, hidden.shape[1] // queries + 1, (), generator=generator))
            inputs = hidden[batch, :end].to(layer.device)
            last, target = inputs[:, -queries:], expected[batch, end - queries : end].to(layer.device)
            if torch.equal(target, last):  # the layer adds nothing, so there is nothing to fit
                continue
            with calibration_autocast(layer.device):
                output = layer.plus(last, attention(layer.normed(inputs), torch.arange(end - queries, end)))
            if through_mlp:
                output = output + layer.mlp(output)
            loss = ((output - target).square().sum(-1) * relative_weights(target - last)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
