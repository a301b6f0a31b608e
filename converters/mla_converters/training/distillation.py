"""Training a converted model: on a teacher's predictions (knowledge distillation, arXiv 1503.02531), or on text."""

import torch
from torch import nn
from transformers import PreTrainedModel

from mla_converters.streaming.whole_model import scaled_logits
from mla_converters.training.losses import Teaching, Weights, WholeVocabulary, prediction_loss
from mla_converters.training.processes import mean_over_windows
from mla_converters.training.teachers import BothAttentions, as_teacher
from mla_converters.training.trained import trained_parameters


class Distillation(nn.Module):
    """A student beside its teacher.

    All weights of both are registered, so that they can be sharded. Tensors that both have are there once.

    Args:
        student: the converted model; only its trainable weights change.
        weights: of the loss.
        attentions: the layers' attentions, if the teacher is the student with the attentions of its source.
        teacher: another model that teaches.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        weights: Weights | None = None,
        *,
        attentions: list[BothAttentions] | None = None,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.weights = weights or Weights()
        self._attentions = attentions or []
        for module in self.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0  # the teacher has none, and the same steps must give the same weights

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that training changes."""
        return trained_parameters(self.student)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of all models."""
        return [layer for model in (self.student, self.teacher) if model is not None for layer in model.model.layers]

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute ``loss`` on token ids ``[windows, tokens]``, in nats, and its ``parts``: divergence, loss on text."""
        teaching = self._teaching(input_ids) if self.weights.kl else None
        hidden = _last_hidden(self.student, input_ids)
        loss, parts = prediction_loss(hidden, self.student.lm_head.weight, input_ids, teaching, self.weights)
        return {"loss": loss, "parts": parts}

    @torch.no_grad()
    def _teaching(self, input_ids: torch.Tensor) -> Teaching:
        teacher = self.student if self.teacher is None else self.teacher
        with as_teacher(self._attentions):
            states = _last_hidden(teacher, input_ids)
        return WholeVocabulary(states.flatten(0, 1), teacher.lm_head.weight)

    def train(self, mode: bool = True) -> "Distillation":
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def _last_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """What the output head reads ``[windows, tokens, D]``. Where a model scales its logits, these are scaled instead,
    which is the same, because the head is linear."""
    return scaled_logits(model.model(input_ids=input_ids, use_cache=False).last_hidden_state, model.config)


@torch.no_grad()
def held_out_loss(model: Distillation, windows: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """The loss, the divergence and the loss on the text, means over token ids ``[windows, tokens]`` in nats, float64.

    All processes compute them together.

    Args:
        model: the model; sharded or not.
        windows: equal in all processes.
        device: the device of this process.
        dtype: of matrix products.
    """

    def measure(window: torch.Tensor) -> torch.Tensor:
        result = model(window[None].to(device))
        return torch.cat((result["loss"][None], result["parts"]))

    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        return mean_over_windows(windows, measure)
