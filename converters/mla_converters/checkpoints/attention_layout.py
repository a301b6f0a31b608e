"""The attention of a source in one layout, whatever its family: what methods and MLA see of it.

In this layout there are three projections for queries, keys and values. RoPE turns component ``i`` of a head with
component ``i + d / 2``, all of them: components that the source never turns have the frequency 0.
"""

from dataclasses import dataclass

import torch

FUSED = "qkv_proj"


@dataclass(frozen=True)
class AttentionLayout:
    """How a source lays out its attention.

    Attributes:
        heads, kv_heads, head_dim: ``H``, ``g`` and ``d``.
        rotary_dim: how many components of a head RoPE turns; they come first.
        interleaved: whether components ``2 i`` and ``2 i + 1`` turn together, not the halves of the rotary part.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool

    def order(self) -> torch.Tensor:
        """``[d]``: which component of the source each component is."""
        turned, still = torch.arange(self.rotary_dim), torch.arange(self.rotary_dim, self.head_dim)
        pairs = turned.view(-1, 2).mT if self.interleaved else turned.view(2, -1)
        return torch.cat((pairs, still.view(2, -1)), dim=1).flatten()

    def frequencies(self, turned: torch.Tensor) -> torch.Tensor:
        """``[d / 2]`` frequencies from those of the rotary part."""
        return torch.nn.functional.pad(turned, (0, self.head_dim // 2 - len(turned)))

    def canonical(
        self, weights: dict[str, torch.Tensor], factors: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """A layer's attention in the common layout.

        Args:
            weights: as stored, under their names below ``self_attn.``.
            factors: ``[d]``, multiplied to the components of queries and keys in the common layout; None for no factor.

        Returns:
            ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, and norms if there are some; what is multiplied is float64.
        """
        canonical: dict[str, torch.Tensor] = {}
        for name, tensor in weights.items():
            module, _, kind = name.partition(".")
            if module == FUSED:
                sizes = [count * self.head_dim for count in (self.heads, self.kv_heads, self.kv_heads)]
                parts = zip("qkv", tensor.split(sizes), strict=True)
                canonical |= {f"{letter}_proj.{kind}": part for letter, part in parts}
            else:
                canonical[name] = tensor
        order = self.order()
        if factors is None and order.equal(torch.arange(self.head_dim)):
            return canonical
        # The norm divides by the size of its input, so that a factor before it would have no effect.
        multiplied = ("q_norm.", "k_norm.") if "k_norm.weight" in canonical else ("q_", "k_")
        for name, tensor in canonical.items():
            if not name.startswith(("q_", "k_")):
                continue
            heads = tensor.unflatten(0, (-1, self.head_dim))[:, order]
            if factors is not None and name.startswith(multiplied):
                heads = heads.double() * factors.view(-1, *(1,) * (heads.dim() - 2))
            canonical[name] = heads.flatten(0, 1)
        return canonical
