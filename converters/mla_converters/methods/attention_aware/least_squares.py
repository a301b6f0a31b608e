"""Fitting the output projection of a converted layer by least squares.

The source's projection was trained for the outputs of the source's heads. The heads of a converted layer give other
outputs, and another projection suits these better. The best one follows from second moments alone, as in layer-wise
reconstruction of pruned and quantised layers (arXiv 2208.11580, section 3). It is fitted on the inputs that the
converted layer will get, so it also repairs losses of earlier layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla_converters.latent.module import LatentAttention
from mla_converters.methods.attention_aware.refit import relative_weights
from mla_converters.streaming.layers import SourceLayer
from mla_converters.support.devices import calibration_autocast

# Penalties on a change of the projection, relative to the mean square of the heads' outputs.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 4  # the last 1/4 of the tokens is held out, to choose among the ridges
SKETCH = 256  # random directions of the output on which ridges are compared


class _Moments:
    """The sums over tokens that a least-squares fit of a map from ``[n]`` to ``[k]`` needs, float32.

    Attributes:
        gram: ``[n, n]``, products of the inputs of the map with each other.
        cross: ``[n, k]``, products of the inputs with the errors that the map should correct.
    """

    def __init__(self, n: int, k: int, device: str) -> None:
        self.gram = torch.zeros(n, n, device=device)
        self.cross = torch.zeros(n, k, device=device)

    def add(self, read: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens: inputs ``[tokens, n]``, errors ``[tokens, k]``, and a weight for each token ``[tokens]``."""
        weighted = (read * weights[:, None]).mT
        self.gram += weighted @ read
        self.cross += weighted @ missing


@dataclass(frozen=True)
class Examples:
    """Inputs of a layer's attention, with the results that it should give.

    Attributes:
        hidden: ``[windows, tokens, D]``, the layer's input.
        expected: ``[windows, tokens, D]``, the residual stream after the attention.
        share: the weight of these examples, as a share of the weight of all examples.
    """

    hidden: torch.Tensor
    expected: torch.Tensor
    share: float


@torch.inference_mode()
def fit_output(
    attention: LatentAttention, layer: SourceLayer, examples: Sequence[Examples], seed: int
) -> list[list[torch.Tensor]]:
    """Change ``o_proj`` so that the residual stream after the attention comes as close as possible to the expected one.

    Errors are relative to the size of each token's target, as in a refit. Tokens that are held out decide how strongly
    the ridge holds the projection in place, and whether the projection changes at all.

    Args:
        attention: the converted attention, changed in place.
        layer: the source's layer, without a norm between its attention and the residual stream.
        examples: text as it passes through the converted model, and possibly random tokens.
        seed: the seed of the directions on which ridges are compared.

    Returns:
        For each of the examples, what ``o_proj`` reads in each window, ``[1, tokens, H * d]``, because computing it
        again would take most of the time that a layer takes.
    """
    d, n = attention.o_proj.weight.shape
    sketch = torch.randn(d, SKETCH, generator=torch.Generator().manual_seed(seed)).to(layer.device)
    fitted, held_out = (_Moments(n, SKETCH, layer.device) for _ in range(2))
    cross = torch.zeros(n, d, device=layer.device)  # over all tokens, and for the whole output
    outputs: list[list[torch.Tensor]] = []
    for some in examples:
        tokens = some.hidden.shape[0] * some.hidden.shape[1]
        left = tokens - tokens // HELD_OUT
        outputs.append([])
        for hidden, expected in zip(some.hidden.split(1), some.expected.split(1), strict=True):
            target = (expected - hidden)[0].to(layer.device) / layer.residual_multiplier
            with calibration_autocast(layer.device):
                heads = attention.heads_output(layer.normed(hidden))
                output = attention.o_proj(heads)[0].float()
            outputs[-1].append(heads.to(hidden.device))
            read = heads[0].float()
            if target.any():
                missing, weights = target - output, some.share / tokens * relative_weights(target)
                cross += (read * weights[:, None]).mT @ missing
                parts = (read, missing @ sketch, weights)
                fitted.add(*(part[:left] for part in parts))
                held_out.add(*(part[left:] for part in parts))
            left = max(0, left - len(read))
    ridge = _best_ridge(fitted, held_out)
    if ridge is not None:
        attention.o_proj.weight += _solved(fitted.gram + held_out.gram, cross, ridge).mT
    return outputs


def _best_ridge(fitted: _Moments, held_out: _Moments) -> float | None:
    """The ridge whose change repairs most on the held-out tokens; None if no change repairs anything."""
    lost: dict[float | None, float] = {None: 0.0}
    for ridge in RIDGES if fitted.gram.any() else ():
        change = _solved(fitted.gram, fitted.cross, ridge)
        lost[ridge] = (change * (held_out.gram @ change - 2 * held_out.cross)).sum().item()
    return min(lost, key=lambda ridge: lost[ridge])


def _solved(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """The change ``[n, k]`` of the map by least squares, kept small by a ridge relative to the mean square of inputs.

    It is computed in float64 and returned in float32.
    """
    held = gram.double()
    held.diagonal().add_(ridge * held.diagonal().mean())
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(held)).float()
