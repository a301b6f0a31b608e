"""The packed cache in transformers: tokens are attended as they are cached, new ones too."""

from dataclasses import dataclass

import torch
from transformers import Cache

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.latent_packing import dequantise, mean_at, quantise, round_trip


@dataclass(frozen=True)
class PackedLayer:
    """One layer's packed cache.

    The cache holds rows ``[batch, 1, tokens, bytes]`` uint8 where transformers keeps keys. Where it keeps values, it
    holds the bytes of the tokens' positions, ``[batch, 1, tokens, 4]`` uint8, because the mean of rotary keys turns
    with them. (vLLM knows them from where a token stands; transformers may pad on the left.) They are bytes because a
    static cache has one dtype for keys and values.

    Attributes:
        format: of the rows.
        mean: ``[2, latent + rope]`` float32, which the numbers lack; None if they have theirs.
        freqs: ``[rope / 2]`` of RoPE.
        layer: index of the layer in the cache.
    """

    format: CacheFormat
    mean: torch.Tensor | None
    freqs: torch.Tensor
    layer: int

    def update(
        self, latent: torch.Tensor, k_rope: torch.Tensor, position_ids: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache new tokens, if there is a cache; return all tokens as they are cached.

        Args:
            latent: ``[batch, 1, tokens, latent]`` without the mean.
            k_rope: ``[batch, 1, tokens, rope]``, rotated, without the mean.
            position_ids: ``[batch or 1, tokens]``.
            cache: earlier tokens; updated. Without one, the result can be trained through.

        Returns:
            Both of all tokens, with the mean, in their dtype.
        """
        new = torch.cat((latent, k_rope), dim=-1)
        positions = position_ids[:, None].expand(latent.shape[:3]).int()
        if cache is None:
            numbers = round_trip(new, self.format)
        else:
            as_bytes = positions[..., None].contiguous().view(torch.uint8)
            rows, held = cache.update(quantise(new, self.format), as_bytes, self.layer)
            numbers, positions = dequantise(rows, self.format), held.contiguous().view(torch.int32)[..., 0]
        if self.mean is not None:
            numbers = numbers + mean_at(self.mean, self.freqs, positions)
        latent, k_rope = numbers.to(latent.dtype).split(list(self.format.sizes), dim=-1)
        return latent, k_rope
