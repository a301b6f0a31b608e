"""A source layer's attention with RoPE on only some components of its keys."""

import torch

from mla_converters.latent.attention import latent_attention, rotate
from mla_converters.methods.transmla.map import KeyRotation
from mla_converters.streaming.layers import SourceLayer


class PartialRope:
    """A source layer after RoRoPE (arXiv 2502.07864, section 4.2): an
    :class:`mla_converters.streaming.layers.Attention`.

    RoPE turns the components of the keys that the rotation keeps, and leaves each KV head's other components alone.
    The result is that of a converted layer of full rank, but takes only three fifths of its products on SmolLM2.

    Args:
        layer: the source's layer.
        rotation: the rotation of its keys.
    """

    def __init__(self, layer: SourceLayer, rotation: KeyRotation) -> None:
        self.layer = layer
        self.freqs = layer.freqs[rotation.frequency.to(layer.freqs.device)]
        self.kept = rotation.matrix[: 2 * len(self.freqs)].to(layer.freqs)  # [r, g * d]

    def __call__(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the attention's output ``[windows, queries, D]`` from normed inputs ``[windows, tokens, D]``."""
        layer = self.layer
        q = layer.queries(x if positions is None else x[:, positions])
        k, v = layer.keys_values(x)
        k_rope = k.transpose(1, 2).flatten(2) @ self.kept.mT
        k_nope = k - (k_rope @ self.kept).view(x.shape[0], x.shape[1], layer.kv_heads, -1).transpose(1, 2)
        by_head = self.kept.view(len(self.kept), layer.kv_heads, -1).permute(1, 2, 0)  # [g, d, r]
        q_rope = q @ by_head.repeat_interleave(layer.heads // layer.kv_heads, dim=0)
        q, k_rope = torch.cat((q, q_rope), dim=-1), rotate(k_rope, self.freqs)
        return layer.output(latent_attention(q, k_nope, k_rope, v, self.freqs, layer.scale, positions))
