"""Mistral with MLA in transformers."""

from transformers import MistralForCausalLM

from vllm_mla_plugin.checkpoint.config import MistralMLAConfig
from vllm_mla_plugin.hf.attention import MLAModel


class MistralMLAForCausalLM(MLAModel, MistralForCausalLM):
    """transformers' Mistral, each ``self_attn`` replaced by MLA."""

    config_class = MistralMLAConfig
