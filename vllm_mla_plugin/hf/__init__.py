"""The MLA models in transformers.

After ``import vllm_mla_plugin.hf``, ``AutoModelForCausalLM.from_pretrained`` loads a converted checkpoint, and the
trainers of TRL and PEFT take it. No remote code is involved.
"""

import sys

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from vllm_mla_plugin.checkpoint.families import FAMILIES
from vllm_mla_plugin.hf import xformers_attention
from vllm_mla_plugin.hf.models import MODEL_CLASSES

xformers_attention.register()
for family in FAMILIES.values():
    model_class = MODEL_CLASSES[family.mla_model_type]
    AutoConfig.register(family.mla_model_type, model_class.config_class, exist_ok=True)
    AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
    # TRL looks a model's class up by its name among those of transformers.
    # (`import transformers` would not do: loading its models replaces its module.)
    setattr(sys.modules["transformers"], family.mla_architecture, model_class)
    # transformers stacks a checkpoint's experts; ours are stacked as the source's are.
    stacking = get_checkpoint_conversion_mapping(family.model_type)
    if stacking is not None:
        register_checkpoint_conversion_mapping(family.mla_model_type, stacking, overwrite=True)
