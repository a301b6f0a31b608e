"""The attention of a source in one layout, whatever its family: what methods and MLA see of it.

In this layout there are three projections for queries, keys and values. RoPE turns component ``i`` of a head with
component ``i + d / 2``, all of them: components that the source never turns have the frequency 0.
"""

from dataclasses import dataclass

import torch

from mla_converters.latent.maps import ROTARY_MAP

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

    def in_source_order(
        self, weights: dict[str, torch.Tensor], factors: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Converted projections whose ``q_proj`` gives queries as the source stores them, where it gives no others.

        ``q_proj`` is then the source's byte for byte if nothing trained it, and adapters of the source fit. What reads
        the queries takes the order and the factors over.

        Args:
            weights: of :func:`mla_converters.latent.maps.mla_weights` for what :meth:`canonical` returns.
            factors: as for :meth:`canonical`.
        """
        order = self.order()
        plain = factors is None and order.equal(torch.arange(self.head_dim))
        if plain or ROTARY_MAP not in weights:
            return weights
        restored, places = dict(weights), order.argsort()
        normed = "k_norm.weight" in weights  # the factors are then in the norm's weight, which the maps hold already
        ones = torch.ones(self.head_dim, dtype=torch.float64)
        scale = ones if factors is None or normed else factors.double()
        for name in ("q_proj.weight", "q_proj.bias"):
            if name in weights:
                heads = weights[name].unflatten(0, (self.heads, self.head_dim)).double()
                heads = heads / scale.view(-1, *(1,) * (heads.dim() - 2))
                restored[name] = heads[:, places].flatten(0, 1)
        restored[ROTARY_MAP] = (weights[ROTARY_MAP].double() * scale[:, None])[:, places]
        ups = weights["kv_b_proj.weight"].unflatten(0, (self.heads, -1)).double()
        keys, values = ups.split([ups.shape[1] - self.head_dim, self.head_dim], dim=1)
        if keys.shape[1]:
            keys = (keys * scale[:, None])[:, places]
            restored["kv_b_proj.weight"] = torch.cat((keys, values), dim=1).flatten(0, 1)
        return restored
