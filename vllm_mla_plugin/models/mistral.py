"""Mistral with MLA in vLLM."""

from vllm_mla_plugin.models.llama import LlamaMLAForCausalLM


class MistralMLAForCausalLM(LlamaMLAForCausalLM):
    """Without a sliding window, which is never converted, Mistral is Llama."""
