"""Qwen2 with MLA in transformers."""

from transformers import Qwen2ForCausalLM

from vllm_mla_plugin.checkpoint.config import Qwen2MLAConfig
from vllm_mla_plugin.hf.attention import MLAModel


class Qwen2MLAForCausalLM(MLAModel, Qwen2ForCausalLM):
    """transformers' Qwen2, each ``self_attn`` replaced by MLA."""

    config_class = Qwen2MLAConfig
