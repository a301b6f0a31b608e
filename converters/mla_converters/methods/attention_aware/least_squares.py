"""The output projection by least squares: from what the heads read of the cache, as close as a linear map comes.

The source's projection expects what the source's heads read. On what converted ones read, another does better, and the
best follows from second moments alone, as in layer-wise reconstruction of pruned and quantised layers (arXiv
2208.11580, section 3). On the inputs that the converted layer will get, it makes up for what earlier layers lost, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla_converters.latent.module import LatentAttention
from mla_converters.methods.attention_aware.refit import relative_weights
from mla_converters.streaming.layers import SourceLayer
from mla_converters.support.devices import calibration_autocast

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of what is read: how strongly the projection is held in place
HELD_OUT = 4  # the last one of so many tokens tells which
SKETCH = 256  # random directions of the output on which ridges are compared


class _Moments:
    """Sums over tokens that least squares of maps from ``[n]`` to ``[k]`` need, float32.

    Attributes:
        gram: ``[n, n]``, of what is read.
        cross: ``[n, k]``, of what is read and what is missing.
    """

    def __init__(self, n: int, k: int, device: str) -> None:
        self.gram = torch.zeros(n, n, device=device)
        self.cross = torch.zeros(n, k, device=device)

    def add(self, read: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor) -> None:
        """Take in tokens: ``[tokens, n]``, ``[tokens, k]`` and what each counts, ``[tokens]``."""
        weighted = (read * weights[:, None]).mT
        self.gram += weighted @ read
        self.cross += weighted @ missing


@dataclass(frozen=True)
class Examples:
    """What a layer's attention is given, and what it should make of it.

    Attributes:
        hidden: ``[windows, tokens, D]``, the layer's input.
        expected: ``[windows, tokens, D]``, the residual stream after the attention.
        share: what they count of all examples.
    """

    hidden: torch.Tensor
    expected: torch.Tensor
    share: float


@torch.inference_mode()
def fit_output(attention: LatentAttention, layer: SourceLayer, examples: Sequence[Examples], seed: int) -> None:
    """Change ``o_proj`` so that the attention adds to its input what comes closest to what is expected.

    Errors are relative to each token's target, as in a refit. How strongly the projection is held in place, or whether
    it stays as it is, is what is best for tokens that were held out.

    Args:
        attention: the converted attention, changed in place.
        layer: of the source.
        examples: text in the converted model, and what else counts.
        seed: of the directions on which ridges are compared.
    """
    d, n = attention.o_proj.weight.shape
    sketch = torch.randn(d, SKETCH, generator=torch.Generator().manual_seed(seed)).to(layer.device)
    fitted, held_out = (_Moments(n, SKETCH, layer.device) for _ in range(2))
    cross = torch.zeros(n, d, device=layer.device)  # of all tokens, and all of the output
    reads: list[torch.Tensor] = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, inputs: reads.append(inputs[0]))
    for some in examples:
        tokens = some.hidden.shape[0] * some.hidden.shape[1]
        left = tokens - tokens // HELD_OUT
        for hidden, expected in zip(some.hidden.split(1), some.expected.split(1), strict=True):
            target = (expected - hidden)[0].to(layer.device)
            with calibration_autocast(layer.device):
                output = attention(layer.normed(hidden))[0].float()
            read = reads.pop()[0].float()
            if target.any():
                missing, weights = target - output, some.share / tokens * relative_weights(target)
                cross += (read * weights[:, None]).mT @ missing
                parts = (read, missing @ sketch, weights)
                fitted.add(*(part[:left] for part in parts))
                held_out.add(*(part[left:] for part in parts))
            left = max(0, left - len(read))
    hook.remove()
    ridge = _best_ridge(fitted, held_out)
    if ridge is not None:
        attention.o_proj.weight += _solved(fitted.gram + held_out.gram, cross, ridge).mT


def _best_ridge(fitted: _Moments, held_out: _Moments) -> float | None:
    """The ridge whose change repairs most on tokens held out; None if none repairs anything."""
    lost: dict[float | None, float] = {None: 0.0}
    for ridge in RIDGES if fitted.gram.any() else ():
        change = _solved(fitted.gram, fitted.cross, ridge)
        lost[ridge] = (change * (held_out.gram @ change - 2 * held_out.cross)).sum().item()
    return min(lost, key=lambda ridge: lost[ridge])


def _solved(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """The change ``[n, k]`` that least squares ask for, held to nothing by a ridge relative to the mean square;
    float32, computed in float64."""
    held = gram.double()
    held.diagonal().add_(ridge * held.diagonal().mean())
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(held)).float()
