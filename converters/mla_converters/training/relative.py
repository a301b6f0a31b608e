"""Errors relative to the size of their targets, and learning rates relative to the size of their weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mla_converters.training.sharding import whole

# Least squared size by which a token's error is divided, relative to the mean over all tokens.
FLOOR = 1e-3


def relative_weights(targets: torch.Tensor) -> torch.Tensor:
    """Weights ``[...]`` for the squared errors of targets ``[..., D]``.

    Each weight is one over the target's squared size. Otherwise the few tokens with huge activations (attention sinks)
    would decide everything.
    """
    size = targets.square().sum(-1)
    return 1 / size.clamp(min=FLOOR * size.mean())


def root_mean_square(weight: torch.Tensor) -> float:
    """The root mean square of a tensor, which may be sharded."""
    return whole(weight.detach().float().square().mean()).sqrt().item()


def relative_rates(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Groups for an optimizer in which each tensor's learning rate is ``rate`` times its root mean square.

    Rates are relative because the scales of the projections into a latent and out of it are arbitrary.
    """
    return [{"params": [weight], "lr": rate * root_mean_square(weight)} for weight in parameters]
