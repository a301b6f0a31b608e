"""Running calibration text through a model layer by layer, one layer's weights in memory at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from mla_converters.source import Source
from mla_converters.statistics import LayerMoments

BATCH = 4  # windows that pass through a layer at once

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From queries ``[windows, H, tokens, d]`` and keys and values ``[windows, g, tokens, d]``, before RoPE,
to outputs ``[windows, H, tokens, d]``."""


def native_bfloat16(device: str) -> bool:
    """Whether the device has instructions for bfloat16 matrix products."""
    return torch.device(device).type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def calibration_autocast(device: str) -> AbstractContextManager:
    """Lets matrix products of calibration run in bfloat16 where that is faster.

    Hidden states and moments stay float32 and float64. On SmolLM2 it halves the time of a
    conversion and changes the converted model's perplexity by 0.04%.
    """
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=native_bfloat16(device))


def source_frequencies(source: Source) -> tuple[torch.Tensor, float]:
    """RoPE of the source: ``[d / 2]`` frequencies in float32, and the attention factor on cos and sin."""
    rotary = type(source.skeleton().model.rotary_emb)(source.config)
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


def embed(source: Source, windows: torch.Tensor) -> torch.Tensor:
    """Token ids ``[windows, tokens]`` to the first layer's input ``[windows, tokens, D]``, float32."""
    return nn.functional.embedding(windows, source.tensor("model.embed_tokens.weight")).float()


class SourceLayer:
    """One layer of the source with its weights.

    Attributes:
        index: its number.
        weights: all its tensors, named as below ``model.layers.N.``, as stored.
    """

    def __init__(self, source: Source, index: int, module: nn.Module, device: str) -> None:
        self.index = index
        self.weights = source.tensors(f"model.layers.{index}.")
        self.kv_heads = source.config.num_key_value_heads
        self.head_dim = source.head_dim
        self.device = device
        self._module = module
        module.load_state_dict({name: t.to(device, torch.float32) for name, t in self.weights.items()}, assign=True)
        module.eval()

    @torch.inference_mode()
    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values before RoPE (shapes as in :data:`Attention`) of a few windows."""
        x = self._module.input_layernorm(hidden.to(self.device))
        attention = self._module.self_attn
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return q, k, v

    def attention_weights(self) -> dict[str, torch.Tensor]:
        """The tensors of the attention, named as below ``self_attn.``, as stored."""
        return {
            name.removeprefix("self_attn."): tensor
            for name, tensor in self.weights.items()
            if name.startswith("self_attn.")
        }

    def moments(self, hidden: torch.Tensor) -> LayerMoments:
        """Second moments over all windows ``[windows, tokens, D]``."""
        moments = LayerMoments(self.kv_heads, self.head_dim)
        for batch in hidden.split(BATCH):
            _, k, v = self.project(batch)
            moments.add(*(x.transpose(1, 2).flatten(2).float() for x in (k, v)))
        return moments

    @torch.inference_mode()
    def advance(self, hidden: torch.Tensor, attend: Attention) -> None:
        """Replace the layer's input by its output, in place.

        Args:
            hidden: ``[windows, tokens, D]``.
            attend: the attention to use, the source's or a converted one.
        """
        for batch in hidden.split(BATCH):
            output = attend(*self.project(batch)).transpose(1, 2).flatten(2)
            residual = batch.to(self.device) + self._module.self_attn.o_proj(output)
            batch.copy_(residual + self._module.mlp(self._module.post_attention_layernorm(residual)))


def source_layers(source: Source, device: str) -> Iterator[SourceLayer]:
    """The layers of the source in order; each is dropped when the next is asked for."""
    with calibration_autocast(device):
        for index, module in enumerate(source.skeleton().model.layers):
            yield SourceLayer(source, index, module, device)
            module.to("meta")
