"""The MLA self-attention in vLLM for models with QK-norm.

QK-norm normalises queries and keys before RoPE: each head alone, or all heads of a token together.
"""

from typing import ClassVar

import torch
from transformers import PretrainedConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from vllm_mla_plugin.attention import MLASelfAttention
from vllm_mla_plugin.checkpoint.query_norm import norm_queries


def mean_over_ranks(mean: torch.Tensor) -> torch.Tensor:
    """The mean of a number of all tensor-parallel ranks, each of which has as many heads."""
    ranks = get_tensor_model_parallel_world_size()
    return mean if ranks == 1 else tensor_model_parallel_all_reduce(mean) / ranks


class QKNormMLASelfAttention(MLASelfAttention):
    """MLA for models with QK-norm: the latent is a linear map of normalised keys and of the layer's input.

    The norm comes before anything is cached, so it is computed as in the source, once for each new token.

    - ``kv_a_proj_with_mqa`` maps ``[k; x]`` to the row to cache. The source's projection to values is folded into the
      part for ``x``.
    - ``q_proj`` gives each head the source's query and, below it, the rotary part, if ``q_rope_map`` does not make
      that. Both are divided by the root mean square of the query.
    - The weight of the query's norm, and the map of the part without RoPE, are folded into ``kv_b_proj``.
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
        sizes = [num_heads * self.query_dim(self.v_dim), kv_width]
        self.make_input_projections(sizes, hidden, bias, quant_config, prefix)
        self.eps = config.rms_norm_eps
        self.over_heads = config.qk_norm == "all"
        self.norm_width = kv_width if self.over_heads else self.v_dim
        self.k_norm = RMSNorm(self.norm_width, eps=config.rms_norm_eps)
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            kv_width + hidden,
            self.latent_dim + self.rope_dim,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_a_proj_with_mqa",
        )

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.project_input(hidden_states)
        k = self.k_norm(k.unflatten(-1, (-1, self.norm_width))).flatten(1)
        cached = self.kv_a_proj_with_mqa(torch.cat((k, hidden_states), dim=-1))[0]
        kept = self.nope_dim if self.q_rope_map is None else self.v_dim
        return norm_queries(q, self.v_dim, kept, self.eps, self.over_heads, mean_over_ranks), cached
