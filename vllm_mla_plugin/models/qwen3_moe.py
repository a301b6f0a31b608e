"""Qwen3-MoE with MLA in vLLM."""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_moe import Qwen3MoeMLP, Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import extract_layer_index

from vllm_mla_plugin.models.llama import LlamaMLAForCausalLM
from vllm_mla_plugin.models.moe import MoEMLADecoderLayer


class Qwen3MoeMLADecoderLayer(MoEMLADecoderLayer):
    """A Qwen3-MoE layer whose ``self_attn`` is MLA; some layers may have an ordinary MLP."""

    def make_mlp(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        config, layer = vllm_config.model_config.hf_config, extract_layer_index(prefix)
        sparse = layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        if sparse and config.num_experts > 0:
            return Qwen3MoeSparseMoeBlock(vllm_config=vllm_config, prefix=prefix)
        return Qwen3MoeMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )


class Qwen3MoeMLAForCausalLM(LlamaMLAForCausalLM):
    """Qwen3-MoE with MLA; experts are not balanced over ranks (EPLB)."""

    decoder_layer = Qwen3MoeMLADecoderLayer
