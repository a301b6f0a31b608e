"""OLMo-2 with MLA in vLLM: a Llama that normalises the outputs of attention and MLP, not their inputs."""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_mla_plugin.models.llama import LlamaMLADecoderLayer, LlamaMLAForCausalLM


class Olmo2MLADecoderLayer(LlamaMLADecoderLayer):
    """An OLMo-2 layer."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        del self.input_layernorm
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer; vLLM's Llama adds ``hidden_states`` and ``residual`` where it needs the sum."""
        stream = hidden_states if residual is None else hidden_states + residual
        output = self.self_attn(positions=positions, hidden_states=stream)
        stream = stream + self.post_attention_layernorm(output)
        return self.post_feedforward_layernorm(self.mlp(stream)), stream


class Olmo2MLAForCausalLM(LlamaMLAForCausalLM):
    """OLMo-2 with MLA."""

    decoder_layer = Olmo2MLADecoderLayer
