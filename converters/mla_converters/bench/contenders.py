"""What a benchmark measures: each model as it is and, where models are compared, with the other caches it can have.

Without a conversion, vLLM keeps the source's cache in fewer bits by a flag. These caches are the conversion's rivals.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from mla_converters.checkpoints.families import source_head_dim
from mla_converters.checkpoints.models import Model
from mla_converters.checkpoints.vllm_caches import FP8, VLLM_CACHES, WIDE_CPU
from mla_converters.options import BenchOptions
from vllm_mla_plugin.checkpoint.layouts import A100, BLACKWELL, HOPPER, OTHER_GPU

CPU = "CPU"
BITS_16 = "16 bits"
UNPACKED = {"hf_overrides": {"latent_cache": None}}
CAPABILITIES = {(8, 0): A100, (9, 0): HOPPER, (10, 0): BLACKWELL, (10, 3): BLACKWELL}


@dataclass(frozen=True)
class Contender:
    """One engine of a benchmark.

    Attributes:
        model: what it serves.
        cache: how it keeps the cache, if not as the model's configuration says.
        arguments: of ``vllm.LLM`` that make it do so.
    """

    model: Model
    cache: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables."""
        return self.model.name if self.cache is None else f"{self.model.name}, {self.cache}"


def contenders(models: list[Model], options: BenchOptions) -> tuple[list[Contender], list[str]]:
    """The engines to measure, and a sentence for each rival that this device does not serve.

    The rivals of ``options`` are caches of the first model. A conversion is also measured with 16 bits, if its cache is
    packed, and in fp8 where its device serves that. With one model, or with a cache dtype among the engine's arguments,
    only the models as they are count.
    """
    found, notes, device = [], [], this_device()
    compared = len(models) > 1 and "kv_cache_dtype" not in options.engine and options.rivals
    for model in models:
        found.append(Contender(model))
        if not compared:
            continue
        if is_mla(model):
            found += _conversions(model, device)
        elif model is models[0]:
            for rival in options.rivals:
                if _serves(rival, model, device):
                    found.append(Contender(model, f"{rival} cache", {"kv_cache_dtype": rival}))
                else:
                    heads = f"heads of {source_head_dim(model.config)} numbers"
                    notes.append(f"{model.name} has no {rival} cache here: vLLM serves none for {heads} on {device}.")
    return found, notes


def this_device() -> str:
    """The hardware that serves here, by the names of :mod:`mla_converters.checkpoints.vllm_caches`."""
    if torch.cuda.is_available():
        if torch.version.hip is not None:
            return "ROCm"
        capability = torch.cuda.get_device_capability()
        return CAPABILITIES.get(capability, OTHER_GPU)
    return WIDE_CPU if "AVX512" in torch.backends.cpu.get_cpu_capability() else CPU


def is_mla(model: Model) -> bool:
    """Whether a model caches latents."""
    return getattr(model.config, "kv_lora_rank", None) is not None


def _serves(rival: str, model: Model, device: str) -> bool:
    (cache,) = (cache for cache in VLLM_CACHES if cache.name == rival)
    return device in cache.served_on(source_head_dim(model.config))


def _conversions(model: Model, device: str) -> list[Contender]:
    """The caches that a converted model can have beside its own."""
    packed = model.cache_format is not None
    found = [Contender(model, BITS_16, UNPACKED)] if packed else []
    if device in (HOPPER, BLACKWELL, OTHER_GPU):  # the A100 has no fp8, and CPUs keep no latents in it
        found.append(Contender(model, f"{FP8} cache", {"kv_cache_dtype": FP8, **(UNPACKED if packed else {})}))
    return found
