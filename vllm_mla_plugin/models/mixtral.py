"""Mixtral with MLA in vLLM."""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.mixtral import MixtralMoE

from vllm_mla_plugin.models.llama import LlamaMLAForCausalLM
from vllm_mla_plugin.models.moe import MoEMLADecoderLayer


class MixtralMLADecoderLayer(MoEMLADecoderLayer):
    """A Mixtral layer whose ``self_attn`` is MLA."""

    def make_mlp(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        config = vllm_config.model_config.hf_config
        return MixtralMoE(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )


class MixtralMLAForCausalLM(LlamaMLAForCausalLM):
    """Mixtral without a sliding window, which is never converted; experts are not balanced over ranks (EPLB)."""

    decoder_layer = MixtralMLADecoderLayer
