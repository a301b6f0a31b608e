"""Training a converted model to give its source's predictions (knowledge distillation, arXiv 1503.02531)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from mla_converters.support.devices import calibration_autocast
from mla_converters.training.parametrization import parts_apart

CHUNK = 512  # positions whose logits exist at the same time


class Distillation(nn.Module):
    """A student beside its teacher; the loss is ``KL(teacher || student)`` (arXiv 1503.02531, section 2, at
    temperature 1).

    Only the trained parameters are registered, so that Trainer saves no others and its checkpoints stay small.

    Args:
        student: the converted model; only its ``trained`` parameters change.
        teacher: its source.
        trained: the parameters of the student to train.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self._models = (student, teacher)  # in a tuple, because modules would be registered

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute ``loss``, the mean over all positions of token ids ``[windows, tokens]``, in nats."""
        student, teacher = self._models
        with torch.no_grad():
            expected = teacher.model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = student.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return {"loss": _Divergence.apply(hidden, expected, student.lm_head, teacher.lm_head) / input_ids.numel()}


class _Divergence(torch.autograd.Function):
    """``KL(teacher || student)`` from hidden states ``[windows, tokens, D]``, summed over positions, nats.

    Logits are by far the largest tensors, so only those of one chunk exist at a time. The gradient to the hidden states
    is computed while the chunk's logits exist, and kept, because it is small. Nothing is therefore computed twice.
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
    """Make the student's attentions trainable inside a ``with`` block.

    Tensors that are equal in both models are shared, so that memory holds them only once.
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
            parameter.data = parameter.data.float()  # because steps are smaller than the resolution of bfloat16
        yield Distillation(student, teacher, trained)


@torch.no_grad()
def held_out_kl(model: Distillation, windows: torch.Tensor, device: str) -> float:
    """Mean ``KL(teacher || student)`` over token ids ``[windows, tokens]``, in nats per token."""
    with calibration_autocast(device):
        losses = [model(window[None].to(device))["loss"].item() for window in windows]
    return sum(losses) / len(losses)
