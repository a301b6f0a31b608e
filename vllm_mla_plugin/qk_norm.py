"""MLA for models that normalise each head's query and key before RoPE (QK-norm)."""

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from vllm_mla_plugin.attention import MLASelfAttention


class QKNormMLASelfAttention(MLASelfAttention):
    """MLA whose latent is a linear map of normalised keys and of the layer's input.

    The norm comes before anything is cached, so it is computed as in the source, once for each new token.
    ``kv_a_proj_with_mqa`` maps ``[k; x]`` to what is cached, the source's projection to values folded into its part for
    ``x``, and ``q_rope_proj`` each head's query to its rotary part; the part without RoPE is the query itself, its map
    folded into ``kv_b_proj``.
    """

    def make_projections(
        self,
        config: PretrainedConfig,
        num_heads: int,
        bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        hidden, kv_width = config.hidden_size, config.num_key_value_heads * self.v_dim
        self.q_proj = ColumnParallelLinear(
            hidden, num_heads * self.v_dim, bias=bias, quant_config=quant_config, prefix=f"{prefix}.q_proj"
        )
        # Every rank caches the whole latent, so every rank computes all keys.
        self.k_proj = ReplicatedLinear(
            hidden, kv_width, bias=bias, quant_config=quant_config, prefix=f"{prefix}.k_proj"
        )
        self.q_norm = RMSNorm(self.v_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.v_dim, eps=config.rms_norm_eps)
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            kv_width + hidden,
            self.latent_dim + self.rope_dim,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_a_proj_with_mqa",
        )
        self.q_rope_proj = nn.Parameter(torch.empty(self.num_heads, self.rope_dim, self.v_dim), requires_grad=False)
        set_weight_attrs(self.q_rope_proj, {"weight_loader": self._load_q_rope_proj})

    def _load_q_rope_proj(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        first = get_tensor_model_parallel_rank() * self.num_heads
        param.data.copy_(loaded[first : first + self.num_heads])

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q_norm(self.q_proj(hidden_states)[0].view(-1, self.num_heads, self.v_dim))
        k = self.k_norm(self.k_proj(hidden_states)[0].view(hidden_states.shape[0], -1, self.v_dim)).flatten(1)
        cached = self.kv_a_proj_with_mqa(torch.cat((k, hidden_states), dim=-1))[0]
        q_rope = torch.bmm(q.transpose(0, 1), self.q_rope_proj.mT).transpose(0, 1)
        return torch.cat((q[..., : self.nope_dim], q_rope), dim=-1), cached
