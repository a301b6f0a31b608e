"""Qwen2 with MLA in vLLM."""

from vllm_mla_plugin.models.llama import LlamaMLAForCausalLM


class Qwen2MLAForCausalLM(LlamaMLAForCausalLM):
    """Qwen2 is Llama with biases on queries, keys and values, which its configuration says."""
