"""Llama with MLA in transformers."""

from typing import ClassVar

from transformers import LlamaForCausalLM

from vllm_mla_plugin.config import LlamaMLAConfig
from vllm_mla_plugin.hf.attention import MLASelfAttention


class LlamaMLAForCausalLM(LlamaForCausalLM):
    """transformers' Llama, each ``self_attn`` replaced by MLA."""

    config_class = LlamaMLAConfig
    # Rounded to bfloat16, a frequency is off by whole turns after a few hundred tokens.
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"rope_freqs"}
    _supports_flash_attn = False  # keys and values differ in head size
    _supports_flex_attn = False

    def __init__(self, config: LlamaMLAConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = MLASelfAttention(
                config, index, bias=config.attention_bias, bias_o_proj=config.attention_bias
            )
        self.post_init()
