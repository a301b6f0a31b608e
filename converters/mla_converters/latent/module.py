"""One layer's MLA attention as a torch module, through which calibration text runs and which a refit trains."""

import torch
from torch import nn

from mla_converters.latent.attention import latent_attention
from vllm_mla_plugin.checkpoint.query_norm import norm_queries

PROJECTIONS = ("q_proj", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, section 2.1) from a layer's converted projections.

    Args:
        weights: from :func:`mla_converters.latent.maps.mla_weights`, under their names below ``self_attn.``; copied.
        heads: query heads ``H``.
        scale: factor on the scores.
        device, dtype: the device and the dtype of the computation.
        qk_norm_eps: ``eps`` of the norm of queries and keys; None for a model without QK-norm.
    """

    rope_freqs: torch.Tensor

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        heads: int,
        scale: float,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.rope_dim = 2 * len(weights["rope_freqs"])
        self.latent_dim = weights["kv_b_proj.weight"].shape[1]
        self.v_dim = weights["o_proj.weight"].shape[1] // heads
        self.nope_dim = len(weights["kv_b_proj.weight"]) // heads - self.v_dim
        self.qk_norm_eps = qk_norm_eps
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
        if qk_norm_eps is not None:
            self.k_norm = nn.RMSNorm(self.v_dim, eps=qk_norm_eps, device="meta")
            self.k_norm.weight = nn.Parameter(weights["k_norm.weight"].detach().to(device, dtype, copy=True))
        self.register_buffer("rope_freqs", weights["rope_freqs"].to(device, torch.float32, copy=True))

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the attention's output from normed inputs ``[windows, tokens, D]``.

        Args:
            x: the inputs.
            positions: ``[queries]``, the tokens whose output is wanted; None for all.

        Returns:
            ``[windows, queries, D]``.
        """
        q = self.q_proj(x if positions is None else x[:, positions]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.qk_norm_eps is not None:
            # In float32, as transformers computes norms.
            k = self.k_norm(self.k_proj(x).float().unflatten(-1, (-1, self.v_dim))).flatten(-2)
            x = torch.cat((k, x), dim=-1)
            q = norm_queries(q.float(), self.v_dim, self.nope_dim, self.qk_norm_eps)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent_dim, self.rope_dim], dim=-1)
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.nope_dim, self.v_dim], dim=-1)
        output = latent_attention(q, k_nope, k_rope, v, self.rope_freqs, self.scale, positions)
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def weights(self) -> dict[str, torch.Tensor]:
        """The projections and ``rope_freqs`` under the checkpoint's names, detached, on CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
