"""Qwen3-MoE with MLA in transformers."""

from transformers import Qwen3MoeForCausalLM

from vllm_mla_plugin.checkpoint.config import Qwen3MoeMLAConfig
from vllm_mla_plugin.hf.attention import MLAModel


class Qwen3MoeMLAForCausalLM(MLAModel, Qwen3MoeForCausalLM):
    """transformers' Qwen3-MoE, each ``self_attn`` replaced by MLA."""

    config_class = Qwen3MoeMLAConfig
