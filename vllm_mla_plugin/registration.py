"""What vLLM has to be told about our checkpoints: config classes, architectures, and that they are MLA."""

from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from vllm_mla_plugin.checkpoint.config import CONFIG_CLASSES

# Lazy "module:class" strings: vLLM imports a model's module only when it serves that model.
ARCHITECTURES = {
    "LlamaMLAForCausalLM": "vllm_mla_plugin.models.llama:LlamaMLAForCausalLM",
    "MistralMLAForCausalLM": "vllm_mla_plugin.models.mistral:MistralMLAForCausalLM",
    "Qwen2MLAForCausalLM": "vllm_mla_plugin.models.qwen2:Qwen2MLAForCausalLM",
    "Qwen3MLAForCausalLM": "vllm_mla_plugin.models.qwen3:Qwen3MLAForCausalLM",
    "Qwen3MoeMLAForCausalLM": "vllm_mla_plugin.models.qwen3_moe:Qwen3MoeMLAForCausalLM",
    "MixtralMLAForCausalLM": "vllm_mla_plugin.models.mixtral:MixtralMLAForCausalLM",
}


class MLAModelArchConfigConvertor(ModelArchConfigConvertorBase):
    """Switches vLLM's MLA path on, which it decides from a fixed list of model types otherwise."""

    def is_deepseek_mla(self) -> bool:
        return True


def register_with_vllm() -> None:
    """Register every MLA family. Idempotent."""
    registered = ModelRegistry.get_supported_archs()
    for architecture, location in ARCHITECTURES.items():
        if architecture not in registered:
            ModelRegistry.register_model(architecture, location)
    for config_class in CONFIG_CLASSES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        MODEL_ARCH_CONFIG_CONVERTORS[config_class.model_type] = MLAModelArchConfigConvertor
