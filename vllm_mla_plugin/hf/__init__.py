"""The MLA models in transformers.

``import vllm_mla_plugin.hf`` is all that ``AutoModelForCausalLM.from_pretrained`` needs to load a
converted checkpoint; no remote code is involved.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from vllm_mla_plugin.hf.llama import LlamaMLAForCausalLM
from vllm_mla_plugin.hf.mistral import MistralMLAForCausalLM
from vllm_mla_plugin.hf.qwen2 import Qwen2MLAForCausalLM

for model_class in (LlamaMLAForCausalLM, MistralMLAForCausalLM, Qwen2MLAForCausalLM):
    config_class = model_class.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)

__all__ = ["LlamaMLAForCausalLM", "MistralMLAForCausalLM", "Qwen2MLAForCausalLM"]
