"""Arcee with MLA in vLLM: a Llama whose MLP has no gate."""

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.utils import WeightsMapper

from vllm_mla_plugin.models.llama import LlamaMLAForCausalLM, LlamaMLAModel, mla_attention


class ArceeMLP(nn.Module):
    """``down(act(up(x)))``."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        sizes, quant_config = (config.hidden_size, config.intermediate_size), vllm_config.quant_config
        self.up_proj = ColumnParallelLinear(
            *sizes, bias=config.mlp_bias, quant_config=quant_config, prefix=f"{prefix}.up_proj"
        )
        self.act_fn = get_act_fn(config.hidden_act)
        self.down_proj = RowParallelLinear(
            *sizes[::-1], bias=config.mlp_bias, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[tokens, D]`` to ``[tokens, D]``."""
        return self.down_proj(self.act_fn(self.up_proj(x)[0]))[0]


class ArceeMLADecoderLayer(LlamaDecoderLayer):
    """An Arcee layer. It runs as Llama's layers do."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # Llama's would make its own MLP, which must have a gate
        config = vllm_config.model_config.hf_config
        self.hidden_size = config.hidden_size
        self.self_attn = mla_attention(vllm_config, f"{prefix}.self_attn")
        self.mlp = ArceeMLP(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


@support_torch_compile
class ArceeMLAModel(LlamaMLAModel):
    """Arcee's decoder stack, of which no weights are fused."""

    hf_to_vllm_mapper = WeightsMapper()


class ArceeMLAForCausalLM(LlamaMLAForCausalLM):
    """Arcee with MLA."""

    hf_to_vllm_mapper = ArceeMLAModel.hf_to_vllm_mapper
    packed_modules_mapping = {}  # noqa: RUF012
    decoder_layer = ArceeMLADecoderLayer
    model_class = ArceeMLAModel
