"""Muon: momentum whose steps have the same size in all directions of a matrix (Jordan et al. 2024).

`torch.optim.Muon` takes only two-dimensional tensors. Here a tensor ``[heads, rows, columns]`` holds one matrix for
each head, because orthogonalising the matrix of one head costs little. For a large model, orthogonalising the matrix of
all heads would cost more than its gradient.
"""

from collections.abc import Iterable
from typing import Any

import torch

MOMENTUM = 0.8
ITERATIONS = 5  # iterations of Newton-Schulz, after which singular values are 0.7 to 1.2
# Coefficients of Jordan et al. 2024: the steepest polynomial at zero among those that lead to this range.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Approximate ``U Vᵀ`` of the singular value decomposition ``U S Vᵀ``, scaled to a root mean square near one.

    Args:
        update: ``[..., rows, columns]``, float32 matrices.
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
    """The Muon optimizer.

    The root mean square of each step is 0.7 to 1.2 times the learning rate for matrices of every shape, as in arXiv
    2502.16982, section 2.2.

    Args:
        groups: tensors with their learning rate ``lr``. A tensor ``[heads, rows, columns]`` holds a matrix for each
            head; a vector is a matrix with one row.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step with every tensor that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                ahead = weight.grad.lerp(momentum, MOMENTUM)  # Nesterov momentum
                weight.sub_(orthogonal(torch.atleast_2d(ahead)).view_as(weight), alpha=group["lr"])
