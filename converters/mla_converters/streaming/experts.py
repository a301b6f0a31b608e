"""A mixture of experts whose weights are read when they are needed, one expert at a time."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN


class StreamedExperts(nn.Module):
    """Stands where transformers keeps the stacked weights of all experts, and is called alike.

    Args:
        read: from an expert's number to its gate, up and down weights.
        count: of experts.
        activation: transformers' name of the activation.
        device: where to compute.
    """

    def __init__(
        self, read: Callable[[int], tuple[torch.Tensor, ...]], count: int, activation: str, device: str
    ) -> None:
        super().__init__()
        self.read = read
        self.count = count
        self.activation = ACT2FN[activation]
        self.device = device

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts' outputs.

        Args:
            hidden: ``[tokens, D]``.
            chosen: ``[tokens, experts per token]``, their numbers.
            weights: ``[tokens, experts per token]``, their shares.
        """
        output = torch.zeros_like(hidden)
        for expert in range(self.count):
            token, place = torch.where(chosen == expert)
            if not len(token):
                continue
            gate, up, down = (weight.to(self.device, torch.float32) for weight in self.read(expert))
            inputs = hidden[token]
            inner = self.activation(nn.functional.linear(inputs, gate)) * nn.functional.linear(inputs, up)
            share = weights[token, place, None] * nn.functional.linear(inner, down)
            output.index_add_(0, token, share.to(output.dtype))
        return output
