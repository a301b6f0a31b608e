"""Phi-3 with MLA in vLLM: a Llama whose checkpoints have one tensor for the MLP's gate and up projection."""

from vllm_mla_plugin.models.llama import LlamaMLAForCausalLM


class Phi3MLAForCausalLM(LlamaMLAForCausalLM):
    """Phi-3 with MLA. The mapping says by which names adapters and quantised checkpoints call that tensor."""

    packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"]}  # noqa: RUF012
