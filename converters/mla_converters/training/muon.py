"""Muon: steps of momentum in which all directions of a matrix count alike (Jordan et al. 2024).

`torch.optim.Muon` takes matrices alone, where here each head is one: a head's costs little, where the matrix of all
heads would cost a large model more than its gradient.
"""

from collections.abc import Iterable
from typing import Any

import torch

MOMENTUM = 0.8
ITERATIONS = 5  # of Newton-Schulz, after which singular values are 0.7 to 1.2
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at zero, of those that end there


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """``U Vᵀ`` of the singular value decomposition ``U S Vᵀ``, nearly, times what makes its root mean square one.

    Args:
        update: ``[..., rows, columns]``, matrices of float32.
    """
    rows, columns = update.shape[-2:]
    x = update if rows <= columns else update.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    linear, cubic, quintic = QUINTIC
    for _ in range(ITERATIONS):
        squares = x @ x.mT
        x = linear * x + (cubic * squares + quintic * squares @ squares) @ x
    return (x if rows <= columns else x.mT) * max(rows, columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """The root mean square of each step is 0.7 to 1.2 times the learning rate, whatever a matrix's shape (as in arXiv
    2502.16982, section 2.2).

    Args:
        groups: tensors with their learning rate ``lr``. ``[heads, rows, columns]`` is a matrix for each head, a vector
            a matrix of one row.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step on the gradients that there are."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                ahead = weight.grad.lerp(momentum, MOMENTUM)  # Nesterov's
                weight.sub_(orthogonal(torch.atleast_2d(ahead)).view_as(weight), alpha=group["lr"])
