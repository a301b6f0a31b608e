"""Llama with MLA in vLLM: vLLM's Llama with another self-attention.

It also serves the families that are a Llama to vLLM once MLA is in the place of their attention: Mistral, Qwen2, Qwen3,
Seed-OSS and SmolLM3 (whose layers without RoPE have frequencies of zero).
"""

from typing import ClassVar

from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper

from vllm_mla_plugin.attention import MLASelfAttention
from vllm_mla_plugin.models.adapters import ChecksAdapters
from vllm_mla_plugin.qk_norm_attention import QKNormMLASelfAttention


def attention_type(vllm_config: VllmConfig) -> type[MLASelfAttention]:
    """The self-attention that a model's configuration asks for."""
    return QKNormMLASelfAttention if vllm_config.model_config.hf_config.qk_norm else MLASelfAttention


def mla_attention(vllm_config: VllmConfig, prefix: str) -> MLASelfAttention:
    """The self-attention of one layer, as its configuration asks for it; ``prefix`` is its own name."""
    config = vllm_config.model_config.hf_config
    return attention_type(vllm_config)(
        config,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        quant_config=vllm_config.quant_config,
        cache_config=vllm_config.cache_config,
        prefix=prefix,
    )


class LlamaMLADecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose ``self_attn`` is MLA."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, attn_layer_type=attention_type(vllm_config))


@support_torch_compile
class LlamaMLAModel(LlamaModel):
    """Llama's decoder stack. Llama's own mapper folds ``q_proj`` into ``qkv_proj``; this one leaves it as it is."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        },
    )


class LlamaMLAForCausalLM(ChecksAdapters, LlamaForCausalLM):
    """``LlamaForCausalLM`` with MLA, for checkpoints that ``vllm-mla convert`` writes."""

    hf_to_vllm_mapper = LlamaMLAModel.hf_to_vllm_mapper
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012
    decoder_layer: ClassVar[type[nn.Module]] = LlamaMLADecoderLayer
    model_class: ClassVar[type[LlamaMLAModel]] = LlamaMLAModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.decoder_layer)
        self.packed_modules_mapping = dict(self.packed_modules_mapping)  # for LoRA
        for module in self.modules():
            if isinstance(module, MLASelfAttention):
                self.packed_modules_mapping.update(module.packed_modules_mapping)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = LlamaMLADecoderLayer
    ) -> LlamaMLAModel:
        return self.model_class(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
