"""Running a whole model through transformers, with the weights of one layer in memory at a time."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mla_converters.checkpoints.shape import has_experts
from mla_converters.streaming.experts import StreamedExperts
from mla_converters.support.logits import scaled_logits
from vllm_mla_plugin.checkpoint.families import ExpertNames

HEAD_ROWS = 8192  # rows of the output head that are in float32 at the same time


class Tensors(Protocol):
    """The tensors of a checkpoint, which are read one at a time."""

    def names(self) -> list[str]:
        """Names of all tensors."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        ...


Watch = Callable[[int, nn.Module, dict[str, Any], torch.Tensor], None]
"""A function that gets a layer's number, its attention, the arguments of that attention, and its output."""


def layer_weights(
    names: list[str],
    read: Callable[[str], torch.Tensor],
    experts: ExpertNames | None,
    layer: nn.Module,
    device: str,
) -> dict[str, torch.Tensor]:
    """The tensors of a layer under their names in transformers' module.

    Experts are left out: ``layer`` gets a :class:`StreamedExperts` in their place.

    Args:
        names: names of the layer's tensors, below ``model.layers.N.``.
        read: reads a tensor by its name.
        experts: how the checkpoint names experts; None for a family without experts.
        layer: transformers' layer.
        device: the device on which experts compute.
    """
    if experts is None or not has_experts(layer):
        return {name: read(name) for name in names}

    def read_expert(expert: int) -> tuple[torch.Tensor, ...]:
        return tuple(read(experts.weight(expert, projection)) for projection in experts.projections)

    activation, count = layer.mlp.experts.config.hidden_act, layer.mlp.experts.num_experts
    layer.mlp.experts = StreamedExperts(read_expert, count, activation, device)
    others = (name for name in names if not experts.is_expert(name))
    return {name.replace(f"{experts.block}.", "mlp."): read(name) for name in others}


@torch.inference_mode()
def final_hidden(
    model: PreTrainedModel,
    tensors: Tensors,
    experts: ExpertNames | None,
    ids: torch.Tensor,
    device: str,
    watch: Watch | None = None,
) -> torch.Tensor:
    """The last hidden states ``[windows, tokens, D]`` in float32, as transformers computes them.

    Args:
        model: transformers' model on the meta device; it cannot be used again.
        tensors: its weights.
        experts: see :func:`layer_weights`.
        ids: ``[windows, tokens]`` token ids.
        device: the device on which layers run.
        watch: called with the attention of each layer, after it ran.
    """
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(model.config).to(device)
    for index, layer in enumerate(body.layers):
        prefix = f"model.layers.{index}."
        names = [name.removeprefix(prefix) for name in tensors.names() if name.startswith(prefix)]

        def load(module: nn.Module, *_: object, names: list[str] = names, prefix: str = prefix) -> None:
            weights = layer_weights(names, lambda name: tensors.tensor(prefix + name), experts, module, device)
            module.load_state_dict(
                {name: tensor.to(device, torch.float32) for name, tensor in weights.items()}, assign=True
            )

        layer.register_forward_pre_hook(load)
        if watch is not None:

            def show(module: nn.Module, _: object, given: dict[str, Any], output: Any, index: int = index) -> None:
                watch(index, module, given, output[0].float())

            layer.self_attn.register_forward_hook(show, with_kwargs=True)
        layer.register_forward_hook(_drop)
    embedded = nn.functional.embedding(ids.to(device), tensors.tensor("model.embed_tokens.weight").to(device)).float()
    norm = tensors.tensor("model.norm.weight").to(device, torch.float32)
    body.norm.load_state_dict({"weight": norm}, assign=True)
    return body.eval()(inputs_embeds=embedded, use_cache=False).last_hidden_state


def _drop(module: nn.Module, *_: object) -> None:
    """Free a layer's weights."""
    module.to("meta")


@torch.inference_mode()
def log_probabilities(hidden: torch.Tensor, head: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """``[tokens, vocabulary]`` float32 from hidden states ``[1, tokens, D]`` and the output head's weight."""
    parts = [nn.functional.linear(hidden[0], rows.to(hidden)) for rows in head.split(HEAD_ROWS)]
    return scaled_logits(torch.cat(parts, dim=-1), config).log_softmax(-1)


def output_head(config: PretrainedConfig, tensors: Tensors) -> torch.Tensor:
    """The output head's weight ``[vocabulary, D]``, as stored."""
    return tensors.tensor("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
