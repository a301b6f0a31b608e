"""Mixtral with MLA in transformers."""

from transformers import MixtralForCausalLM

from vllm_mla_plugin.checkpoint.config import MixtralMLAConfig
from vllm_mla_plugin.hf.attention import MLAModel


class MixtralMLAForCausalLM(MLAModel, MixtralForCausalLM):
    """transformers' Mixtral, each ``self_attn`` replaced by MLA."""

    config_class = MixtralMLAConfig
