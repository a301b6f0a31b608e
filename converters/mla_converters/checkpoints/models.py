"""The models to evaluate: where they are, and what their configuration says of their size."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.checkpoints.families import architecture_names, source_head_dim
from mla_converters.checkpoints.loadable import from_pretrained
from mla_converters.checkpoints.locate import local_path, not_on_the_hub
from mla_converters.checkpoints.rope_scaling import context_length
from mla_converters.checkpoints.source import open_source
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import read_json_object
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.families import FAMILIES


@dataclass(frozen=True)
class Model:
    """A model that exists.

    Attributes:
        name: as the user gave it.
        path: folder or hub id, for ``from_pretrained`` and for vLLM.
        config: its transformers configuration.
        trust_remote_code: whether code that it brings may run.
    """

    name: str
    path: str
    config: PretrainedConfig
    trust_remote_code: bool = False

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens; None if the configuration sets no limit."""
        limited = getattr(self.config, "max_position_embeddings", None) is not None
        return context_length(self.config) if limited else None

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    @property
    def cached_numbers(self) -> float | None:
        """Numbers cached per token and layer, the mean where layers differ; None for a model without attention."""
        if cached_sizes := getattr(self.config, "cached_sizes", None):
            layers = self.config.num_hidden_layers
            total = sum(sum(cached_sizes(layer)) for layer in range(layers))
            return total / layers if total % layers else total // layers
        if getattr(self.config, "kv_lora_rank", None):  # a DeepSeek model
            return self.config.kv_lora_rank + self.config.qk_rope_head_dim
        heads = getattr(self.config, "num_attention_heads", None)
        kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        return 2 * kv_heads * source_head_dim(self.config) if kv_heads else None

    @property
    def cache_format(self) -> str | list[str] | None:
        """How the cache is packed, as :meth:`CacheFormat.parse` reads it; one text a layer where layers differ.

        None for a cache of numbers.
        """
        specs = [format.spec for format in self._cache_formats]
        return (specs[0] if len(set(specs)) == 1 else specs) if specs else None

    @property
    def cached_bytes(self) -> float | None:
        """Bytes that vLLM allocates per token and layer, with numbers of 16 bits in a cache that is not packed.

        The mean where layers differ; None for a model without attention.
        """
        if formats := self._cache_formats:
            return sum(format.bytes_per_token for format in formats) / len(formats)
        return None if self.cached_numbers is None else 2 * self.cached_numbers

    @property
    def _cache_formats(self) -> list[CacheFormat]:
        """Each layer's format; none for a cache of numbers."""
        if getattr(self.config, "latent_cache", None) is None:
            return []
        return [self.config.cache_format(layer) for layer in range(self.config.num_hidden_layers)]


def find_models(names: list[str], stack: ExitStack, trust_remote_code: bool = False) -> list[Model]:
    """Find models and read their configurations.

    Args:
        names: folders, hub ids, or ``.gguf`` files.
        stack: GGUF files are unpacked until it closes.
        trust_remote_code: whether code that models bring may run.

    Raises:
        ConversionError: one does not exist or is no model, or is named twice.
    """
    models: dict[str, Model] = {}
    for name in names:
        identity = str(Path(name).resolve()) if Path(name).exists() else name
        if identity in models:
            raise ConversionError(f"{name} is given twice: name each model once.")
        models[identity] = find_model(name, stack, trust_remote_code)
    return list(models.values())


def find_model(name: str, stack: ExitStack, trust_remote_code: bool = False) -> Model:
    """Find one model; see :func:`find_models`."""
    path = local_path(name)
    if path is not None and path.is_file():
        folder = stack.enter_context(open_source(name)).model_folder
        return Model(name, str(folder), read_config(folder, trust_remote_code), trust_remote_code)
    try:
        if path is None:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        else:
            config = read_config(path, trust_remote_code)
    except OSError as error:
        raise not_on_the_hub(name, error) from error
    return Model(name, name, config, trust_remote_code)


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """A folder's transformers configuration.

    Raises:
        ConversionError: it is none.
    """
    read_json_object(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers validates with many exception types
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(f"{folder / 'config.json'} is not a valid configuration: {reason}") from error


def converted_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder that ``vllm-mla convert`` wrote.

    Raises:
        ConversionError: it is none.
    """
    description = read_json_object(folder / "config.json")
    architectures = {family.mla_architecture for family in FAMILIES.values()}
    if not architectures.intersection(architecture_names(description)):
        raise ConversionError(f"{folder} is not a checkpoint that vllm-mla convert wrote: its architecture is another.")
    return description


def load_model(model: Model, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Load a model for inference.

    Raises:
        ConversionError: there are no safetensors weights, or they do not fill the model.
    """
    try:
        network, info = from_pretrained(
            model.path,
            model.config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=model.trust_remote_code,
        )
        network.to(device)
    except Exception as error:  # transformers raises whatever the files provoke
        reason = str(error).strip().split("\n")[0]
        if "ignore_mismatched_sizes" in reason:  # an argument of transformers, and no help to the user
            reason = "shapes differ from what its config.json asks for."
        raise ConversionError(f"The weights of {model.name} cannot be loaded: {reason}") from error
    # transformers would fill them with random numbers, and the score would be of another model.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConversionError(
            f"The weights of {model.name} lack {len(missing)} tensors, such as {missing[0]}: convert or download again."
        )
    return network.eval()
