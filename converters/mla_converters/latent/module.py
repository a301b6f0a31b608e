"""One layer's MLA attention as a torch module, through which calibration text runs and which a refit trains."""

import torch
from torch import nn

from mla_converters.latent.attention import latent_attention, rotate
from mla_converters.latent.maps import ROTARY_MAP
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.query_norm import norm_queries
from vllm_mla_plugin.checkpoint.rotary_query import RotaryQueryMap
from vllm_mla_plugin.latent_packing import mean_at, round_trip, take_mean_out

PROJECTIONS = ("q_proj", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, section 2.1) from a layer's converted projections.

    Args:
        weights: from :func:`mla_converters.latent.maps.mla_weights`, under their names below ``self_attn.``; copied.
        heads: query heads ``H``.
        scale: factor on the scores.
        device, dtype: the device and the dtype of the computation.
        qk_norm_eps: ``eps`` of the norm of queries and keys; None for a model without QK-norm.
        norm_over_heads: whether that norm is of all heads together, not of each.
        cache_format: the packed format through which all tokens are read; None for a cache that rounds nothing.
    """

    rope_freqs: torch.Tensor
    cache_mean: torch.Tensor | None

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        heads: int,
        scale: float,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        qk_norm_eps: float | None = None,
        norm_over_heads: bool = False,
        cache_format: CacheFormat | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.rope_dim = 2 * len(weights["rope_freqs"])
        self.latent_dim = weights["kv_b_proj.weight"].shape[1]
        self.v_dim = weights["o_proj.weight"].shape[1] // heads
        self.nope_dim = len(weights["kv_b_proj.weight"]) // heads - self.v_dim
        self.qk_norm_eps = qk_norm_eps
        self.norm_over_heads = norm_over_heads
        for name in PROJECTIONS:
            if f"{name}.weight" not in weights:
                continue
            tensors = {
                kind: weights[f"{name}.{kind}"].detach().to(device, dtype, copy=True)
                for kind in ("weight", "bias")
                if f"{name}.{kind}" in weights
            }
            rows, columns = tensors["weight"].shape
            projection = nn.Linear(columns, rows, bias="bias" in tensors, device="meta")
            projection.load_state_dict(tensors, assign=True)
            self.add_module(name, projection)
        self.q_rope_map = None
        if ROTARY_MAP in weights:
            with torch.device("meta"):
                self.q_rope_map = RotaryQueryMap(*weights[ROTARY_MAP].shape)
            self.q_rope_map.weight = nn.Parameter(weights[ROTARY_MAP].detach().to(device, dtype, copy=True))
        if qk_norm_eps is not None:
            self.norm_width = len(weights["k_norm.weight"])
            self.k_norm = nn.RMSNorm(self.norm_width, eps=qk_norm_eps, device="meta")
            self.k_norm.weight = nn.Parameter(weights["k_norm.weight"].detach().to(device, dtype, copy=True))
        self.register_buffer("rope_freqs", weights["rope_freqs"].to(device, torch.float32, copy=True))
        self.cache_format = cache_format
        mean = weights.get("cache_mean")
        self.register_buffer("cache_mean", None if mean is None else mean.to(device, torch.float32, copy=True))

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the attention's output from normed inputs ``[windows, tokens, D]``.

        Args:
            x: the inputs.
            positions: ``[queries]``, the tokens whose output is wanted; None for all.

        Returns:
            ``[windows, queries, D]``.
        """
        return self.o_proj(self.heads_output(x, positions))

    def heads_output(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """What ``o_proj`` reads ``[windows, queries, H * d]``; arguments as for :meth:`forward`."""
        q = self.q_proj(x if positions is None else x[:, positions]).unflatten(-1, (self.heads, -1))
        if self.qk_norm_eps is not None:
            kept = self.nope_dim if self.q_rope_map is None else self.v_dim
            q = norm_queries(q.float(), self.v_dim, kept, self.qk_norm_eps, self.norm_over_heads)
        if self.q_rope_map is not None:
            q = self.q_rope_map(q, self.nope_dim)
        q = q.transpose(1, 2)
        latent, k_rope = self._read(self._to_cache(x))
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.nope_dim, self.v_dim], dim=-1)
        output = latent_attention(q, k_nope, k_rope, v, self.rope_freqs, self.scale, positions)
        return output.transpose(1, 2).flatten(2)

    @torch.inference_mode()
    def measure_mean(self, x: torch.Tensor) -> None:
        """Set ``cache_mean`` to the means over normed inputs ``[windows, tokens, D]``, if the format takes one out."""
        if self.cache_format is not None and self.cache_format.mean:
            cached = self._to_cache(x).float()
            others = cached[:, 1:].mean((0, 1)) if cached.shape[1] > 1 else cached[:, 0].mean(0)
            self.cache_mean = torch.stack((cached[:, 0].mean(0), others))

    def _to_cache(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers to cache ``[windows, tokens, R + r]``, before RoPE, with their mean."""
        if self.qk_norm_eps is not None:
            # In float32, as transformers computes norms.
            k = self.k_norm(self.k_proj(x).float().unflatten(-1, (-1, self.norm_width))).flatten(-2)
            x = torch.cat((k, x), dim=-1)
        return self.kv_a_proj_with_mqa(x)

    def _read(self, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latent and the rotated key as attention reads them from the cache."""
        sizes = [self.latent_dim, self.rope_dim]
        if self.cache_format is None:
            latent, k_rope = cached.split(sizes, dim=-1)
            return latent, rotate(k_rope, self.rope_freqs)
        positions = torch.arange(cached.shape[1], device=cached.device)
        numbers = cached.float()
        if self.cache_mean is not None:
            numbers = take_mean_out(numbers, self.cache_mean, positions)
        latent, k_rope = numbers.split(sizes, dim=-1)
        numbers = round_trip(torch.cat((latent, rotate(k_rope, self.rope_freqs)), dim=-1), self.cache_format)
        if self.cache_mean is not None:
            numbers = numbers + mean_at(self.cache_mean, self.rope_freqs, positions)
        latent, k_rope = numbers.to(cached).split(sizes, dim=-1)
        return latent, k_rope

    def weights(self) -> dict[str, torch.Tensor]:
        """The projections and ``rope_freqs`` under the checkpoint's names, detached, on CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
