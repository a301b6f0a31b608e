"""MLA for models that normalise each head's query and key before RoPE (QK-norm)."""

from typing import ClassVar

import torch
from transformers import PretrainedConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from vllm_mla_plugin.attention import MLASelfAttention
from vllm_mla_plugin.checkpoint.query_norm import norm_queries


class QKNormMLASelfAttention(MLASelfAttention):
    """MLA whose latent is a linear map of normalised keys and of the layer's input.

    The norm comes before anything is cached, so it is computed as in the source, once for each new token.
    ``kv_a_proj_with_mqa`` maps ``[k; x]`` to what is cached, the source's projection to values folded into its part for
    ``x``. ``q_proj`` gives each head the source's query and, below it, the rotary part, to be divided by the query's
    root mean square like the query itself; the weight of the norm and the map of the part without RoPE are folded into
    ``kv_b_proj``.
    """

    product: ClassVar[str] = "query_key_proj"
    parts: ClassVar[tuple[str, str]] = ("q_proj", "k_proj")

    def make_projections(
        self,
        config: PretrainedConfig,
        num_heads: int,
        bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        hidden, kv_width = config.hidden_size, config.num_key_value_heads * self.v_dim
        # Every rank caches the whole latent, so every rank computes all keys.
        sizes = [num_heads * (self.v_dim + self.rope_dim), kv_width]
        self.make_input_projections(sizes, hidden, bias, quant_config, prefix)
        self.eps = config.rms_norm_eps
        self.k_norm = RMSNorm(self.v_dim, eps=config.rms_norm_eps)
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            kv_width + hidden,
            self.latent_dim + self.rope_dim,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_a_proj_with_mqa",
        )

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.project_input(hidden_states)
        k = self.k_norm(k.unflatten(-1, (-1, self.v_dim))).flatten(1)
        cached = self.kv_a_proj_with_mqa(torch.cat((k, hidden_states), dim=-1))[0]
        return norm_queries(q, self.v_dim, self.nope_dim, self.eps), cached
