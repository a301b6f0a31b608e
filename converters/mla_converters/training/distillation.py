"""Training a converted model: on a teacher's predictions (knowledge distillation, arXiv 1503.02531), or on text."""

from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mla_converters.support.logits import scaled_logits
from mla_converters.support.memory import return_holes
from mla_converters.training.losses import Teaching, Weights, WholeVocabulary, prediction_loss
from mla_converters.training.processes import mean_over_windows
from mla_converters.training.relative import relative_weights
from mla_converters.training.stored import Examples, TopTokens
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

    Attributes:
        learns_hidden: whether the hidden states of all layers are learnt, instead of predictions.
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
        self.learns_hidden = False
        self._attentions = attentions or []
        for module in self.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0  # the teacher has none, and the same steps must give the same weights

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that training changes."""
        return trained_parameters(self.student)

    @property
    def in_turn(self) -> list[nn.Module]:
        """What runs one after another: the layers of all models, and embeddings that are no output head as well."""
        models = [model for model in (self.student, self.teacher) if model is not None]
        layers = [layer for model in models for layer in model.model.layers]
        embeddings = [(model.get_input_embeddings(), model.lm_head) for model in models]
        return layers + [embedding for embedding, head in embeddings if embedding.weight is not head.weight]

    def forward(
        self,
        input_ids: torch.Tensor,
        top_ids: torch.Tensor | None = None,
        top_logprobs: torch.Tensor | None = None,
        weights: Weights | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input_ids: token ids ``[windows, tokens]``.
            top_ids, top_logprobs: ``[windows, tokens, k]``, a teacher's predictions that were written down; see
                :class:`mla_converters.training.stored.TopTokens`.
            weights: of the loss; None for those of training.

        Returns:
            ``loss`` in nats, and its ``parts``: divergence, loss on the text. While hidden states are learnt, ``loss``
            is their relative squared error.
        """
        if input_ids.device.type == "cpu":
            return_holes()
        if self.learns_hidden:
            return {"loss": self._hidden_error(input_ids)}
        weights = weights or self.weights
        teaching: Teaching | None = None
        if top_ids is not None and top_logprobs is not None:
            teaching = TopTokens(top_ids.flatten(0, 1), top_logprobs.flatten(0, 1))
        elif weights.kl:
            teaching = self._teaching(input_ids)
        hidden = _read_by_head(self.student, self.student.model(input_ids=input_ids, use_cache=False))
        if hidden.device.type == "cpu":
            return_holes()  # the layers leave some, and the loss needs the most memory
        loss, parts = prediction_loss(hidden, self.student.lm_head.weight, input_ids, teaching, weights)
        return {"loss": loss, "parts": parts}

    def _teaching(self, input_ids: torch.Tensor) -> Teaching:
        teacher = self.student if self.teacher is None else self.teacher
        states = _read_by_head(teacher, self._taught(input_ids))
        return WholeVocabulary(states.flatten(0, 1), teacher.lm_head.weight)

    def _hidden_error(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Squared error of the hidden states after each layer, relative to the teacher's; the mean over layers."""
        expected = self._taught(input_ids, output_hidden_states=True).hidden_states[1:]
        found = self.student.model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states[1:]
        errors = [
            (relative_weights(target.float()) * (states.float() - target.float()).square().sum(-1)).mean()
            for states, target in zip(found, expected, strict=True)
        ]
        return torch.stack(errors).mean()

    @torch.no_grad()
    def _taught(self, input_ids: torch.Tensor, **wanted: bool) -> BaseModelOutputWithPast:
        """What the teacher's layers give."""
        teacher = self.student if self.teacher is None else self.teacher
        with as_teacher(self._attentions):
            return teacher.model(input_ids=input_ids, use_cache=False, **wanted)

    def train(self, mode: bool = True) -> "Distillation":
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def _read_by_head(model: PreTrainedModel, output: BaseModelOutputWithPast) -> torch.Tensor:
    """What the output head reads ``[windows, tokens, D]``.

    Where a model scales its logits, this is scaled instead, which gives the same, because the head is linear.
    """
    return scaled_logits(output.last_hidden_state, model.config)


@torch.no_grad()
def held_out_loss(model: Distillation, examples: Examples, device: str, dtype: torch.dtype) -> torch.Tensor:
    """The loss, the divergence and the loss on the text, means over windows in nats, float64.

    Predictions are taken at temperature 1, as they will be used, whatever the temperature of training. All processes
    compute them together.

    Args:
        model: the model; sharded or not.
        examples: equal in all processes.
        device: the device of this process.
        dtype: of matrix products.
    """

    weights = replace(model.weights, temperature=1.0)

    def measure(example: dict[str, torch.Tensor]) -> torch.Tensor:
        result = model(**{name: values[None].to(device) for name, values in example.items()}, weights=weights)
        return torch.cat((result["loss"][None], result["parts"]))

    model.learns_hidden = False
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        loss = mean_over_windows(examples, measure)
    if isinstance(model, FSDPModule):
        model.reshard()  # an optimizer made now would otherwise get the gathered weights, which have no gradients
    return loss
