"""Tells vLLM about our checkpoints: their architectures, their config classes, and that they use MLA."""

from typing import Any

from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from vllm_mla_plugin.checkpoint.config import CONFIG_CLASSES
from vllm_mla_plugin.checkpoint.families import FAMILIES


class MLAModelArchConfigConvertor(ModelArchConfigConvertorBase):
    """Switches vLLM's MLA path on. Without it, vLLM decides this from a fixed list of model types.

    vLLM makes it as soon as it has applied ``--hf-overrides``, before it starts any other process.

    Raises:
        ValueError: an override changes the RoPE.
    """

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        hf_config.check_rope()
        super().__init__(hf_config, *args, **kwargs)

    def is_deepseek_mla(self) -> bool:
        return True


def register_with_vllm() -> None:
    """Register every MLA family. Calling it again changes nothing."""
    registered = ModelRegistry.get_supported_archs()
    for family in FAMILIES.values():
        if family.mla_architecture not in registered:
            ModelRegistry.register_model(family.mla_architecture, family.vllm_model)
    for model_type, config_class in CONFIG_CLASSES.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = MLAModelArchConfigConvertor
