"""The MLA models in transformers: the source's class, whose every ``self_attn`` :class:`MLAModel` replaces by MLA."""

import transformers
from transformers import PreTrainedModel

from vllm_mla_plugin.checkpoint.config import CONFIG_CLASSES
from vllm_mla_plugin.checkpoint.families import FAMILIES, Family
from vllm_mla_plugin.hf.attention import MLAModel


def _model_class(family: Family) -> type[PreTrainedModel]:
    names = {
        "__module__": __name__,
        "__doc__": f"{family.name} with MLA.",
        "config_class": CONFIG_CLASSES[family.mla_model_type],
    }
    return type(family.mla_architecture, (MLAModel, getattr(transformers, family.architecture)), names)


MODEL_CLASSES = {family.mla_model_type: _model_class(family) for family in FAMILIES.values()}
"""The class of every family, by its ``model_type``."""
globals().update({model_class.__name__: model_class for model_class in MODEL_CLASSES.values()})
