"""Mixtures of experts with MLA in vLLM: Llama's decoder, with MLA and the family's own mixture in each layer.

Experts are not balanced over ranks (EPLB).
"""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.mixtral import MixtralMoE
from vllm.model_executor.models.qwen3_moe import Qwen3MoeMLP, Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import extract_layer_index

from vllm_mla_plugin.models.llama import LlamaMLAForCausalLM, attention_type


class MoEMLADecoderLayer(LlamaDecoderLayer):
    """A layer whose ``self_attn`` is MLA and whose ``mlp`` a subclass makes. It runs as Llama's layers do."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # Llama's would make its own MLP
        config = vllm_config.model_config.hf_config
        bias, bias_o_proj = config.attention_biases
        self.hidden_size = config.hidden_size
        self.self_attn = attention_type(vllm_config)(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            quant_config=vllm_config.quant_config,
            bias=bias,
            bias_o_proj=bias_o_proj,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = self.make_mlp(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def make_mlp(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """The second half of the layer, which maps ``[tokens, D]`` to ``[tokens, D]``."""
        raise NotImplementedError


class Qwen3MoeMLADecoderLayer(MoEMLADecoderLayer):
    """A Qwen3-MoE layer. Some layers may have an ordinary MLP."""

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
    """Qwen3-MoE with MLA."""

    decoder_layer = Qwen3MoeMLADecoderLayer


class MixtralMLADecoderLayer(MoEMLADecoderLayer):
    """A Mixtral layer."""

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
    """Mixtral with MLA; its sliding window, if it has one, is never converted."""

    decoder_layer = MixtralMLADecoderLayer
