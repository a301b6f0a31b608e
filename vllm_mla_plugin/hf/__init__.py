"""The MLA models in transformers.

``import vllm_mla_plugin.hf`` is all that ``AutoModelForCausalLM.from_pretrained`` needs to load a
converted checkpoint; no remote code is involved.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from vllm_mla_plugin.config import LlamaMLAConfig
from vllm_mla_plugin.hf.llama import LlamaMLAForCausalLM

MODELS = {LlamaMLAConfig: LlamaMLAForCausalLM}

for config_class, model_class in MODELS.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)

__all__ = ["LlamaMLAConfig", "LlamaMLAForCausalLM"]
