"""The measures of a report, computed from the loss and the likeliest token at every position."""

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenScores:
    """Scores of one model on all windows; index ``t`` of the second axis belongs to token ``t + 1`` of a window.

    Attributes:
        losses: ``-log p(token | tokens before it in the window)`` in nats, ``[windows, length - 1]`` float32.
        top1: the token that the model finds likeliest, ``[windows, length - 1]`` int64.
        kl: ``KL(reference || model)`` over the whole vocabulary in nats, shaped like ``losses``; None if there is no
            reference, or if the engine does not give all logits.
    """

    losses: torch.Tensor
    top1: torch.Tensor
    kl: torch.Tensor | None = None

    @property
    def loss(self) -> float:
        """Mean over all scored tokens, in nats."""
        return self.losses.double().mean().item()


def measures(scores: TokenScores, scored_bytes: int | None) -> dict[str, Any]:
    """The measures of one model that need no reference.

    Args:
        scores: the model's scores, with finite losses.
        scored_bytes: UTF-8 bytes of the text of the scored tokens; None if unknown.

    Returns:
        ``perplexity`` (``exp`` of the mean loss), ``bits_per_byte`` (None if the bytes are unknown) and
        ``loss_by_position`` (mean nats for each range of positions).
    """
    total_bits = scores.loss * scores.losses.numel() / math.log(2)
    return {
        "perplexity": math.exp(scores.loss),
        "bits_per_byte": total_bits / scored_bytes if scored_bytes else None,
        "loss_by_position": by_position(scores.losses),
    }


def by_position(values: torch.Tensor) -> dict[str, float]:
    """Means for ranges of positions that double in size: 1-63, 64-127, 128-255, …

    A position is the index of a token in its window. It is therefore also the number of tokens before it.

    Args:
        values: ``[windows, length - 1]``, one value for each of the tokens 1 to ``length - 1``.
    """
    length = values.shape[1] + 1
    starts = [1]
    while (following := max(64, 2 * starts[-1])) < length:
        starts.append(following)
    ranges = zip(starts, [*starts[1:], length], strict=True)
    return {f"{start}-{end - 1}": values[:, start - 1 : end - 1].double().mean().item() for start, end in ranges}


def comparison(scores: TokenScores, reference: TokenScores) -> dict[str, Any]:
    """Compare a model with the reference on the same windows.

    Returns:
        - ``perplexity_ratio``: model / reference.
        - ``perplexity_ratio_stderr``: its standard error, from the differences between windows; None with one window.
        - ``kl``: mean ``KL(reference || model)`` per token in nats, or None.
        - ``kl_by_position``: the same for each range of positions, or None.
        - ``top1_agreement``: share of positions, 0 to 1, at which both find the same token likeliest.
    """
    ratio = math.exp(scores.loss - reference.loss)
    of_windows = (scores.losses - reference.losses).double().mean(1)
    spread = of_windows.std().item() / math.sqrt(len(of_windows)) if len(of_windows) > 1 else None
    return {
        "perplexity_ratio": ratio,
        # The spread is that of the ratio's logarithm, so it is relative to the ratio.
        "perplexity_ratio_stderr": None if spread is None else ratio * spread,
        "kl": None if scores.kl is None else scores.kl.double().mean().item(),
        "kl_by_position": None if scores.kl is None else by_position(scores.kl),
        "top1_agreement": (scores.top1 == reference.top1).double().mean().item(),
    }
