"""vLLM's own models with MLA in the place of each layer's attention.

A class is made for each row of :data:`vllm_mla_plugin.checkpoint.families.FAMILIES` that names a class of vLLM, when
vLLM asks for it by its name (PEP 562): importing a module of vLLM for every family would take seconds.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig

from vllm_mla_plugin.attention import MLASelfAttention
from vllm_mla_plugin.checkpoint.families import FAMILIES
from vllm_mla_plugin.models.adapters import ChecksAdapters
from vllm_mla_plugin.models.llama import mla_attention

ATTENTION = ".self_attn"


class ReplacedAttention(ChecksAdapters):
    """Mixed into one of vLLM's models: makes MLA where the model would make its attention, and loads its weights.

    The model's own loader gets all other weights. It never sees ``q_proj``, which it would put into ``qkv_proj``.
    """

    source_module: ClassVar[ModuleType]
    """vLLM's module of the model."""
    source_attention: ClassVar[str]
    """The name of the attention's class there."""
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        def make(*_: Any, prefix: str, **__: Any) -> MLASelfAttention:
            return mla_attention(vllm_config, prefix)

        with stand_in(self.source_module, self.source_attention, make):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # the model's
        modules = self.named_modules()  # type: ignore[attr-defined]  # it is a module
        self.mla = {name: module for name, module in modules if isinstance(module, MLASelfAttention)}
        packed = {name: parts for name, parts in self.packed_modules_mapping.items() if name != "qkv_proj"}
        for attention in self.mla.values():
            packed |= attention.packed_modules_mapping
        self.packed_modules_mapping = packed  # for LoRA

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights by the checkpoint's names; returns the names of the parameters that got them."""
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                layer, is_attention, own = name.partition(f"{ATTENTION}.")
                place = f"{layer}{ATTENTION}"
                if not is_attention:
                    yield name, weight
                elif place in self.mla:  # else another pipeline stage has it
                    loaded.update(f"{place}.{got}" for got in self.mla[place].load_weights([(own, weight)]))

        return super().load_weights(others()) | loaded  # type: ignore[misc]  # the model's


@contextmanager
def stand_in(module: ModuleType, name: str, make: Callable[..., Any]) -> Iterator[None]:
    """Let a module's own code call ``make`` for its class ``name``, for the time of the ``with`` block.

    vLLM's layers have no hook for another attention. Making theirs first and replacing it would refuse what only MLA
    can do: head sizes without a kernel, and KV heads that ranks cannot share evenly.
    """
    original = getattr(module, name)
    setattr(module, name, make)
    try:
        yield
    finally:
        setattr(module, name, original)


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values():
        if family.mla_architecture == name and ":" in family.vllm:
            place, _, model = family.vllm.partition(":")
            module = import_module(f"vllm.model_executor.models.{place}")
            base = getattr(module, model)
            names = {
                "__module__": __name__,
                "source_module": module,
                "source_attention": f"{family.name}Attention",
                **_mapper(base),
            }
            globals()[name] = type(name, (ReplacedAttention, base), names)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _mapper(base: Any) -> dict[str, Any]:
    """The mapper of names without the fusion of ``q_proj``, ``k_proj`` and ``v_proj``.

    vLLM also applies it to the names of modules that are not quantised.
    """
    mapper = getattr(base, "hf_to_vllm_mapper", None)
    stacked = getattr(mapper, "orig_to_new_stacked", None)
    if mapper is None or not stacked:
        return {}
    kept = {old: new for old, new in stacked.items() if new[0] != ".qkv_proj"}
    return {"hf_to_vllm_mapper": dataclasses.replace(mapper, orig_to_new_stacked=kept)}
