"""Muon: steps of the same size in all directions of a matrix."""

import pytest
import torch

from mla_converters.training.muon import Muon, orthogonal


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (3, 16, 64), (1, 64)])
def test_directions_count_alike(shape: tuple[int, ...]) -> None:
    """All singular values become nearly equal, for every size of update. The singular vectors stay the same."""
    update = 1e-6 * random(*shape) * torch.logspace(0, -1, shape[-1])
    made = orthogonal(update)
    values = torch.linalg.svdvals(made) / max(shape[-2:]) ** 0.5
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    between = left.mT @ made @ right.mT
    assert (between - between.diagonal(dim1=-2, dim2=-1).diag_embed()).abs().max() < 1e-3 * between.abs().max()


def test_nothing_is_made_of_nothing() -> None:
    """A gradient of zero gives no step."""
    assert not orthogonal(torch.zeros(4, 8)).any()


def test_heads_are_matrices_of_their_own() -> None:
    """A batch of heads takes the same steps as each head alone, also in the second step."""
    together = torch.nn.Parameter(random(3, 8, 32))
    alone = [torch.nn.Parameter(head.clone()) for head in together.detach()]
    optimizers = [Muon([{"params": [weight], "lr": 0.1}]) for weight in (together, *alone)]
    for scale in (1.0, 3.0):
        together.grad = scale * random(3, 8, 32).cos()
        for head, gradient in zip(alone, together.grad, strict=True):
            head.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together.detach(), torch.stack([head.detach() for head in alone]))


def test_a_step_is_as_long_as_its_rate() -> None:
    """This holds for a matrix and for a vector. A weight without a gradient does not move."""
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((16, 64), (64,), (8,))]
    optimizer = Muon([{"params": [weight], "lr": 0.1} for weight in weights])
    for weight in weights[:2]:
        weight.grad = 1e4 * random(*weight.shape)
    optimizer.step()
    matrix, vector, still = (weight.detach().square().mean().sqrt().item() for weight in weights)
    assert 0.06 < matrix < 0.13 and 0.06 < vector < 0.13 and still == 0
    assert all((weight.detach() * weight.grad).sum() < 0 for weight in weights[:2])
