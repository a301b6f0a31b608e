"""Errors and learning rates relative to the size of what they are about."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

FLOOR = 1e-3  # of the mean square of the targets, below which a token's error is not magnified further


def relative_weights(targets: torch.Tensor) -> torch.Tensor:
    """Weights ``[...]`` of the squared errors of targets ``[..., D]``.

    Each is one over the target's squared size, because otherwise the few tokens with huge activations (attention sinks)
    would decide everything.
    """
    size = targets.square().sum(-1)
    return 1 / size.clamp(min=FLOOR * size.mean())


def relative_rates(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """An optimizer's groups in which each tensor's learning rate is ``rate`` times its root mean square, because the
    scales of the projections into a latent and out of it are arbitrary."""
    return [{"params": [weight], "lr": rate * weight.detach().square().mean().sqrt().item()} for weight in parameters]
