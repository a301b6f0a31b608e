"""Qwen3 with MLA in transformers."""

from transformers import Qwen3ForCausalLM

from vllm_mla_plugin.checkpoint.config import Qwen3MLAConfig
from vllm_mla_plugin.hf.attention import MLAModel


class Qwen3MLAForCausalLM(MLAModel, Qwen3ForCausalLM):
    """transformers' Qwen3, each ``self_attn`` replaced by MLA."""

    config_class = Qwen3MLAConfig
