"""Running calibration text through a model layer by layer, one layer's weights in memory at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from mla_converters.attention import gqa_attention
from mla_converters.latent_attention import LatentAttention
from mla_converters.source import Source
from mla_converters.statistics import LayerMoments

BATCH = 4  # windows that pass through a layer at once

Attention = Callable[[torch.Tensor], torch.Tensor]
"""From normed inputs ``[windows, tokens, D]`` to the attention's output, same shape."""


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


def softmax_scale(source: Source) -> float:
    """Factor on the scores, the RoPE attention factor included."""
    _, attention_factor = source_frequencies(source)
    return source.head_dim**-0.5 * attention_factor**2


def embed(source: Source, windows: torch.Tensor) -> torch.Tensor:
    """Token ids ``[windows, tokens]`` to the first layer's input ``[windows, tokens, D]``, float32."""
    return nn.functional.embedding(windows, source.tensor("model.embed_tokens.weight")).float()


class SourceLayer:
    """One layer of the source with its weights.

    Attributes:
        index: its number.
        weights: all its tensors, named as below ``model.layers.N.``, as stored.
        freqs: ``[d / 2]`` RoPE frequencies, float32 on ``device``.
        scale: factor on the scores.
        heads, kv_heads, head_dim: ``H``, ``g`` and ``d``.
    """

    def __init__(
        self, source: Source, index: int, module: nn.Module, freqs: torch.Tensor, scale: float, device: str
    ) -> None:
        self.index = index
        self.weights = source.tensors(f"model.layers.{index}.")
        self.freqs = freqs.to(device)
        self.scale = scale
        self.heads = source.config.num_attention_heads
        self.kv_heads = source.config.num_key_value_heads
        self.head_dim = source.head_dim
        self.device = device
        self._module = module
        module.load_state_dict({name: t.to(device, torch.float32) for name, t in self.weights.items()}, assign=True)
        module.eval()

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the attention reads of the layer's input ``[windows, tokens, D]``."""
        return self._module.input_layernorm(hidden.to(self.device))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[windows, H, tokens, d]``, keys and values ``[windows, g, tokens, d]``, before RoPE,
        of normed inputs."""
        attention = self._module.self_attn
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return q, k, v

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """The source's attention, an :data:`Attention`."""
        output = gqa_attention(*self.project(x), self.freqs, self.scale)
        return self._module.self_attn.o_proj(output.transpose(1, 2).flatten(2))

    def converted(self, weights: dict[str, torch.Tensor]) -> LatentAttention:
        """The attention that converted projections give, an :data:`Attention`."""
        return LatentAttention(weights, self.heads, self.scale, self.device)

    def attention_weights(self) -> dict[str, torch.Tensor]:
        """The tensors of the attention, named as below ``self_attn.``, as stored."""
        return {
            name.removeprefix("self_attn."): tensor
            for name, tensor in self.weights.items()
            if name.startswith("self_attn.")
        }

    @torch.inference_mode()
    def moments(self, hidden: torch.Tensor) -> LayerMoments:
        """Second moments over all windows ``[windows, tokens, D]``."""
        moments = LayerMoments(self.kv_heads, self.head_dim)
        for batch in hidden.split(BATCH):
            with calibration_autocast(self.device):
                _, k, v = self.project(self.normed(batch))
            moments.add(*(x.transpose(1, 2).flatten(2).float() for x in (k, v)))
        return moments

    @torch.inference_mode()
    def errors(self, hidden: torch.Tensor, attentions: Iterable[Attention]) -> list[float]:
        """Relative squared errors of attentions' outputs against the source's, on ``[windows, tokens, D]``."""
        x = self.normed(hidden)
        with calibration_autocast(self.device):
            expected = self.attend(x).float()
            outputs = (attention(x).float() for attention in attentions)
            size = expected.square().sum()
            return [((output - expected).square().sum() / size).item() for output in outputs]

    @torch.inference_mode()
    def add_attention(self, hidden: torch.Tensor, attention: Attention) -> None:
        """First half of the layer: add the attention's output to ``hidden`` ``[windows, tokens, D]``, in place."""
        for batch in hidden.split(BATCH):
            with calibration_autocast(self.device):
                output = attention(self.normed(batch))
            batch += output.to(batch)

    @torch.inference_mode()
    def add_mlp(self, hidden: torch.Tensor) -> None:
        """Second half of the layer: add the MLP's output to ``hidden`` ``[windows, tokens, D]``, in place."""
        for batch in hidden.split(BATCH):
            x = self._module.post_attention_layernorm(batch.to(self.device))
            with calibration_autocast(self.device):
                output = self._module.mlp(x)
            batch += output.to(batch)

    def advance(self, hidden: torch.Tensor, attention: Attention) -> None:
        """Replace the layer's input ``[windows, tokens, D]`` by its output, in place."""
        self.add_attention(hidden, attention)
        self.add_mlp(hidden)


@torch.inference_mode()
def logits(source: Source, hidden: torch.Tensor, device: str) -> torch.Tensor:
    """From the last layer's output ``[..., D]`` to the source's logits ``[..., vocabulary]``, float32."""
    skeleton = source.skeleton()
    norm = skeleton.model.norm
    norm.load_state_dict({"weight": source.tensor("model.norm.weight").to(device, torch.float32)}, assign=True)
    tied = source.config.tie_word_embeddings
    head = source.tensor("model.embed_tokens.weight" if tied else "lm_head.weight").to(device)
    with calibration_autocast(device):
        return nn.functional.linear(norm(hidden.to(device)), head.float()).float()


def source_layers(source: Source, device: str) -> Iterator[SourceLayer]:
    """The layers of the source in order; each is dropped when the next is asked for."""
    # Once for all layers: both build the whole model's skeleton.
    freqs, scale = source_frequencies(source)[0], softmax_scale(source)
    for index, module in enumerate(source.skeleton().model.layers):
        yield SourceLayer(source, index, module, freqs, scale, device)
        module.to("meta")
