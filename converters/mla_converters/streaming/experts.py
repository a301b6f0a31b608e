"""A mixture of experts that reads the weights of one expert at a time, when they are needed."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN


class StreamedExperts(nn.Module):
    """Replaces transformers' module that holds the stacked weights of all experts; it is called in the same way.

    Args:
        read: returns the gate, up and down weights of an expert, by its number.
        count: number of experts.
        activation: transformers' name of the activation.
        device: the device that computes.
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
            chosen: ``[tokens, experts per token]``, the numbers of the chosen experts.
            weights: ``[tokens, experts per token]``, the weights of their outputs.
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
