"""Training a converted model to predict what its source predicts (knowledge distillation, arXiv 1503.02531)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from mla_converters.support.devices import calibration_autocast
from mla_converters.training.parametrization import parts_apart

CHUNK = 512  # positions whose logits exist at a time


class Distillation(nn.Module):
    """A student beside its teacher; the loss is ``KL(teacher || student)`` (arXiv 1503.02531, section 2, at
    temperature 1).

    Only what is trained is registered, so that is all that Trainer saves and that a checkpoint holds.

    Args:
        student: the converted model; of it, only ``trained`` changes.
        teacher: its source.
        trained: parameters of the student.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self._models = (student, teacher)  # a tuple, for modules would be registered

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """``loss``: the mean over all positions of ``[windows, tokens]`` token ids, nats."""
        student, teacher = self._models
        with torch.no_grad():
            expected = teacher.model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = student.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return {"loss": _Divergence.apply(hidden, expected, student.lm_head, teacher.lm_head) / input_ids.numel()}


class _Divergence(torch.autograd.Function):
    """``KL(teacher || student)`` from hidden states ``[windows, tokens, D]``, summed over positions, nats.

    Logits are by far the largest tensors. So there are only those of a chunk at a time, and while they are there, the
    gradient to the hidden states is computed too: it is small enough to be kept, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, expected: torch.Tensor, student: nn.Module, teacher: nn.Module
    ) -> torch.Tensor:
        trains = ctx.needs_input_grad[0]
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        chunks = (tensor.flatten(0, 1).split(CHUNK) for tensor in (hidden, expected))
        for states, target_states in zip(*chunks, strict=True):
            target = teacher(target_states).float().log_softmax(-1)
            with torch.set_grad_enabled(trains):
                states = states.detach().requires_grad_(trains)
                predicted = student(states).float().log_softmax(-1)
                loss = F.kl_div(predicted, target, reduction="sum", log_target=True)
            if trains:
                gradients += torch.autograd.grad(loss, states)
            total += loss.detach()
        if trains:
            ctx.save_for_backward(torch.cat(gradients).view(hidden.shape))
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None, None


@contextmanager
def distillation(student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[Distillation]:
    """The student's attentions ready to be trained, for the time of a ``with`` block.

    The teacher gets the student's tensors where both have the same, so that they are in memory once.
    """
    own = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        if name in own and torch.equal(parameter, own[name]):
            parameter.data = own[name].data
    attentions = [layer.self_attn for layer in student.model.layers]
    for model in (student, teacher):
        model.requires_grad_(False).eval()
    with parts_apart(attentions):
        trained = [parameter.requires_grad_() for attention in attentions for parameter in attention.parameters()]
        for parameter in trained:
            parameter.data = parameter.data.float()  # steps are smaller than what bfloat16 can tell apart
        yield Distillation(student, teacher, trained)


@torch.no_grad()
def held_out_kl(model: Distillation, windows: torch.Tensor, device: str) -> float:
    """Mean ``KL(teacher || student)`` over ``[windows, tokens]``, nats per token."""
    with calibration_autocast(device):
        losses = [model(window[None].to(device))["loss"].item() for window in windows]
    return sum(losses) / len(losses)
