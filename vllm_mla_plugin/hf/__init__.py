"""The MLA models in transformers.

``import vllm_mla_plugin.hf`` is all that ``AutoModelForCausalLM.from_pretrained`` needs to load a
converted checkpoint; no remote code is involved.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from vllm_mla_plugin.hf.llama import LlamaMLAForCausalLM
from vllm_mla_plugin.hf.mistral import MistralMLAForCausalLM
from vllm_mla_plugin.hf.mixtral import MixtralMLAForCausalLM
from vllm_mla_plugin.hf.qwen2 import Qwen2MLAForCausalLM
from vllm_mla_plugin.hf.qwen3 import Qwen3MLAForCausalLM
from vllm_mla_plugin.hf.qwen3_moe import Qwen3MoeMLAForCausalLM

for model_class in (
    LlamaMLAForCausalLM,
    MistralMLAForCausalLM,
    Qwen2MLAForCausalLM,
    Qwen3MLAForCausalLM,
    Qwen3MoeMLAForCausalLM,
    MixtralMLAForCausalLM,
):
    config_class = model_class.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    # How a checkpoint's experts become transformers' stacked ones, as for the source.
    stacking = get_checkpoint_conversion_mapping(config_class.model_type.removesuffix("_mla"))
    if stacking is not None:
        register_checkpoint_conversion_mapping(config_class.model_type, stacking, overwrite=True)

__all__ = [
    "LlamaMLAForCausalLM",
    "MistralMLAForCausalLM",
    "MixtralMLAForCausalLM",
    "Qwen2MLAForCausalLM",
    "Qwen3MLAForCausalLM",
    "Qwen3MoeMLAForCausalLM",
]
