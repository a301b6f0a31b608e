"""Qwen3 with MLA in vLLM."""

from vllm_mla_plugin.models.llama import LlamaMLAForCausalLM


class Qwen3MLAForCausalLM(LlamaMLAForCausalLM):
    """Qwen3 is Llama with QK-norm, which its configuration says."""
