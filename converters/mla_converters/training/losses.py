"""Losses on the predictions at every position, from hidden states, with the logits of one chunk in memory at a time."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

CHUNK = 128  # positions whose logits exist at the same time
UNSCORED = -100  # in the place of a token that follows the last one of a window


class Teaching(Protocol):
    """What a teacher predicts at every position."""

    def divergence(self, logits: torch.Tensor, first: int, temperature: float) -> torch.Tensor:
        """``KL(teacher || student)``, summed over positions, in nats.

        Args:
            logits: the student's, ``[positions, vocabulary]`` float32.
            first: the first of these positions.
            temperature: of both predictions.
        """
        ...


@dataclass(frozen=True)
class WholeVocabulary:
    """A teacher that is in memory.

    Attributes:
        states: its last hidden states ``[positions, D]``.
        head: the weight ``[vocabulary, D]`` of its output head. Rows that only one of the two models has are padding,
            and are left out.
    """

    states: torch.Tensor
    head: torch.Tensor

    def divergence(self, logits: torch.Tensor, first: int, temperature: float) -> torch.Tensor:
        vocabulary = min(len(self.head), logits.shape[1])
        with torch.no_grad():
            expected = F.linear(self.states[first : first + len(logits)], self.head).float()[:, :vocabulary]
            target = _log_probabilities(expected, temperature)
            del expected  # as large as the logits
        predicted = _log_probabilities(logits[:, :vocabulary], temperature)
        return F.kl_div(predicted, target, reduction="sum", log_target=True)


def _log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


@dataclass(frozen=True)
class Weights:
    """What counts how much in the loss.

    Attributes:
        kl: weight of ``KL(teacher || student)`` (arXiv 1503.02531, section 2).
        lm: weight of the loss of a language model on the text.
        temperature: of both predictions in the divergence, whose weight grows with its square, as in that paper.
    """

    kl: float = 1.0
    lm: float = 0.0
    temperature: float = 1.0


def prediction_loss(
    hidden: torch.Tensor, head: torch.Tensor, input_ids: torch.Tensor, teaching: Teaching | None, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its parts ``[2]``: the divergence at ``temperature``, and the loss on the text; all in nats.

    Args:
        hidden: the student's last hidden states ``[windows, tokens, D]``.
        head: the weight of its output head.
        input_ids: ``[windows, tokens]``.
        teaching: the teacher's predictions; None if only the text counts.
        weights: of the parts. A part without weight is computed only if it costs little, and is zero otherwise.
    """
    following = F.pad(input_ids[:, 1:].long(), (0, 1), value=UNSCORED).flatten()
    return _ChunkedLoss.apply(hidden, head, following, teaching, weights)


class _ChunkedLoss(torch.autograd.Function):
    """Logits are by far the largest tensors, so only those of one chunk exist at a time. The gradients to the hidden
    states and to the head are computed while the chunk's logits exist, and kept, because they are small. Nothing is
    therefore computed twice."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        head: torch.Tensor,
        following: torch.Tensor,
        teaching: Teaching | None,
        weights: Weights,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        trains, head_trains = ctx.needs_input_grad[:2]
        positions, scored = len(following), int((following != UNSCORED).sum())
        parts = hidden.new_zeros(2, dtype=torch.float32)
        to_hidden, to_head = [], torch.zeros_like(head) if head_trains else None
        for first in range(0, positions, CHUNK):
            some = slice(first, first + CHUNK)
            with torch.set_grad_enabled(trains):
                states = hidden.detach().flatten(0, 1)[some].requires_grad_(trains)
                matrix = head.detach().requires_grad_(head_trains)
                logits = F.linear(states, matrix).float()
                divergence = logits.new_zeros(())
                if teaching is not None:
                    divergence = teaching.divergence(logits, first, weights.temperature) / positions
                text = logits.new_zeros(())
                if weights.lm:
                    text = F.cross_entropy(logits, following[some], ignore_index=UNSCORED, reduction="sum") / scored
                loss = weights.kl * weights.temperature**2 * divergence + weights.lm * text
            if trains:
                wanted = (states, matrix) if head_trains else (states,)
                gradients = torch.autograd.grad(loss, wanted)
                to_hidden.append(gradients[0])
                if to_head is not None:
                    to_head += gradients[1]
            parts += torch.stack((divergence.detach(), text.detach()))
        if trains:
            ctx.save_for_backward(torch.cat(to_hidden).view(hidden.shape), *([] if to_head is None else [to_head]))
        ctx.mark_non_differentiable(parts)
        factors = parts.new_tensor((weights.kl * weights.temperature**2, weights.lm))
        return (factors * parts).sum(), parts

    @staticmethod
    def backward(ctx: FunctionCtx, outer: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_hidden, *to_head = ctx.saved_tensors
        return outer * to_hidden, outer * to_head[0] if to_head else None, None, None, None
