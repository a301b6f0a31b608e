"""Running the source layer by layer, so that only one layer's weights are in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mla_converters.source import Source
from mla_converters.statistics import LayerMoments

BATCH = 4  # windows that pass through a layer at once


@dataclass
class RunningLayer:
    """A source layer that has seen the calibration text.

    Attributes:
        index: its number.
        weights: its attention projections, named as below ``self_attn.``.
        moments: of its keys and values, before RoPE.
        queries, keys, values: ``[windows, tokens, heads * d]`` float32 of the first windows, before RoPE.
    """

    index: int
    weights: dict[str, torch.Tensor]
    moments: LayerMoments
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def source_frequencies(source: Source) -> tuple[torch.Tensor, float]:
    """RoPE of the source: ``[d / 2]`` frequencies in float32, and the attention factor on cos and sin."""
    rotary = type(source.skeleton().model.rotary_emb)(source.config)
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


@torch.inference_mode()
def run_layers(source: Source, windows: torch.Tensor, device: str, keep: int = 0) -> Iterator[RunningLayer]:
    """Pass calibration windows through the source, one layer after the other.

    Args:
        source: the model.
        windows: ``[windows, tokens]`` ids.
        device: where layers run.
        keep: of how many windows to keep queries, keys and values.

    Yields:
        Every layer in order. Between two of them, only the hidden states
        (``[windows, tokens, D]`` float32) are in memory.
    """
    model = source.skeleton().model
    embedding = source.tensor("model.embed_tokens.weight")
    hidden = nn.functional.embedding(windows, embedding).float()
    del embedding
    rotary = type(model.rotary_emb)(source.config).to(device)
    positions = torch.arange(windows.shape[1], device=device)[None]
    rope = rotary(torch.empty(0, device=device), positions)
    for index, layer in enumerate(model.layers):
        tensors = source.tensors(f"model.layers.{index}.")
        layer.load_state_dict({n: t.to(device, torch.float32) for n, t in tensors.items()}, assign=True)
        layer.eval()
        moments = LayerMoments(source.config.num_key_value_heads, source.config.head_dim)
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            getattr(layer.self_attn, f"{part}_proj").register_forward_hook(
                lambda _module, _args, output, part=part: seen.update({part: output})
            )
            for part in "qkv"
        ]
        kept: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
        for start in range(0, len(hidden), BATCH):
            batch = slice(start, start + BATCH)
            hidden[batch] = layer(
                hidden[batch].to(device), position_embeddings=rope, position_ids=positions
            ).to(hidden.device)
            moments.add(seen["k"], seen["v"])
            if start < keep:
                for part, outputs in kept.items():
                    outputs.append(seen[part][: keep - start].cpu())
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        attention = {
            n.removeprefix("self_attn."): t for n, t in tensors.items() if n.startswith("self_attn.")
        }
        q, k, v = (torch.cat(kept[part]) if keep else hidden.new_empty(0) for part in "qkv")
        yield RunningLayer(index, attention, moments, q, k, v)
