"""Llama with MLA in transformers."""

from transformers import LlamaForCausalLM

from vllm_mla_plugin.checkpoint.config import LlamaMLAConfig
from vllm_mla_plugin.hf.attention import MLAModel


class LlamaMLAForCausalLM(MLAModel, LlamaForCausalLM):
    """transformers' Llama, each ``self_attn`` replaced by MLA."""

    config_class = LlamaMLAConfig
