"""vLLM's own models with MLA in the place of each layer's attention.

A class is made for each row of :data:`vllm_mla_plugin.checkpoint.families.FAMILIES` that names a class of vLLM, when
vLLM asks for it by its name (PEP 562): importing a module of vLLM for every family would take seconds.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_mla_plugin.attention import MLASelfAttention
from vllm_mla_plugin.checkpoint.families import FAMILIES
from vllm_mla_plugin.models.adapters import ChecksAdapters
from vllm_mla_plugin.models.llama import attention_type

ATTENTION = ".self_attn."


class ReplacedAttention(ChecksAdapters):
    """Mixed into one of vLLM's models: replaces the attention of each layer, and loads its weights.

    The model's own loader gets all other weights. It never sees ``q_proj``, which it would put into ``qkv_proj``.
    """

    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # the model's
        packed = {name: parts for name, parts in self.packed_modules_mapping.items() if name != "qkv_proj"}
        self.mla: dict[str, MLASelfAttention] = {}
        config = vllm_config.model_config.hf_config
        for name, layer in list(self.named_modules()):  # type: ignore[attr-defined]  # a module
            if not isinstance(getattr(layer, "self_attn", None), nn.Module):
                continue
            place = f"{name}{ATTENTION}".removesuffix(".")
            where = f"{prefix}.{place}" if prefix else place
            # The layer that is replaced was registered to get a cache.
            del vllm_config.compilation_config.static_forward_context[f"{where}.attn"]
            layer.self_attn = self.mla[place] = attention_type(vllm_config)(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                quant_config=vllm_config.quant_config,
                cache_config=vllm_config.cache_config,
                prefix=where,
            )
            packed |= self.mla[place].packed_modules_mapping
        self.packed_modules_mapping = packed  # for LoRA

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights by the checkpoint's names; returns the names of the parameters that got them."""
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                layer, is_attention, own = name.partition(ATTENTION)
                place = f"{layer}{ATTENTION}".removesuffix(".")
                if not is_attention:
                    yield name, weight
                elif place in self.mla:  # else another pipeline stage has it
                    loaded.update(f"{place}.{got}" for got in self.mla[place].load_weights([(own, weight)]))

        return super().load_weights(others()) | loaded  # type: ignore[misc]  # the model's


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values():
        if family.mla_architecture == name and ":" in family.vllm:
            module, _, model = family.vllm.partition(":")
            base = getattr(import_module(f"vllm.model_executor.models.{module}"), model)
            globals()[name] = type(name, (ReplacedAttention, base), {"__module__": __name__} | _names_kept(base))
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _names_kept(base: Any) -> dict[str, Any]:
    """The mapper of names without the fusion of ``q_proj``, ``k_proj`` and ``v_proj``.

    vLLM also applies it to the names of modules that are not quantised.
    """
    mapper = getattr(base, "hf_to_vllm_mapper", None)
    stacked = getattr(mapper, "orig_to_new_stacked", None)
    if mapper is None or not stacked:
        return {}
    kept = {old: new for old, new in stacked.items() if new[0] != ".qkv_proj"}
    return {"hf_to_vllm_mapper": dataclasses.replace(mapper, orig_to_new_stacked=kept)}
