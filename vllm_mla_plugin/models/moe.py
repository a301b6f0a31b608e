"""What mixtures of experts share: a decoder layer with MLA, and the family's own mixture."""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaDecoderLayer

from vllm_mla_plugin.models.llama import attention_type


class MoEMLADecoderLayer(LlamaDecoderLayer):
    """A layer whose ``self_attn`` is MLA and whose ``mlp`` is a subclass's; run as Llama's layers are."""

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
        """The second half of the layer, from ``[tokens, D]`` to the same."""
        raise NotImplementedError
