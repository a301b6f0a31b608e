"""The MLA models in transformers: the source's class, whose every ``self_attn`` :class:`MLAModel` replaces by MLA."""

from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from vllm_mla_plugin.checkpoint import config
from vllm_mla_plugin.hf.attention import MLAModel


class LlamaMLAForCausalLM(MLAModel, LlamaForCausalLM):
    """Llama with MLA."""

    config_class = config.LlamaMLAConfig


class MistralMLAForCausalLM(MLAModel, MistralForCausalLM):
    """Mistral with MLA."""

    config_class = config.MistralMLAConfig


class Qwen2MLAForCausalLM(MLAModel, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with MLA."""

    config_class = config.Qwen2MLAConfig


class Qwen3MLAForCausalLM(MLAModel, Qwen3ForCausalLM):
    """Qwen3 with MLA."""

    config_class = config.Qwen3MLAConfig


class Qwen3MoeMLAForCausalLM(MLAModel, Qwen3MoeForCausalLM):
    """Qwen3-MoE with MLA."""

    config_class = config.Qwen3MoeMLAConfig


class MixtralMLAForCausalLM(MLAModel, MixtralForCausalLM):
    """Mixtral with MLA."""

    config_class = config.MixtralMLAConfig
