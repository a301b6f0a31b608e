"""The models to evaluate: where they are, and what their configuration says of their size."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.errors import ConversionError
from mla_converters.families import source_head_dim
from mla_converters.source import unpack_gguf


@dataclass(frozen=True)
class Model:
    """A model that exists.

    Attributes:
        name: as the user gave it.
        path: folder or hub id, for ``from_pretrained`` and for vLLM.
        config: its transformers configuration.
    """

    name: str
    path: str
    config: PretrainedConfig

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens; None if the configuration sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

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


def find_models(names: list[str], stack: ExitStack) -> list[Model]:
    """Find models and read their configurations.

    Args:
        names: folders, hub ids, or ``.gguf`` files.
        stack: GGUF files are unpacked until it closes.

    Raises:
        ConversionError: one does not exist or is no model, or is named twice.
    """
    models: dict[str, Model] = {}
    for name in names:
        identity = str(Path(name).resolve()) if Path(name).exists() else name
        if identity in models:
            raise ConversionError(f"{name} is given twice: name each model once.")
        models[identity] = find_model(name, stack)
    return list(models.values())


def find_model(name: str, stack: ExitStack) -> Model:
    """Find one model; see :func:`find_models`."""
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-mla-gguf-")))
        unpack_gguf(path, folder)
        return Model(name, str(folder), _config(name, folder))
    if path.is_dir() and not (path / "config.json").exists():
        raise ConversionError(f"{name} is not a model folder: it has no config.json.")
    if path.is_file():
        raise ConversionError(f"{name} is a file but not a .gguf: give a model folder or a hub id.")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ConversionError(f"{name} does not exist.")
    return Model(name, name, _config(name, path))


def _config(name: str, folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name)
    except Exception as error:  # transformers validates with many exception types
        reason = str(error).strip().split("\n")[0]
        if folder.is_dir():
            raise ConversionError(f"{folder / 'config.json'} is not a valid configuration: {reason}") from error
        raise ConversionError(
            f"{name!r} is neither a folder here nor a model that can be fetched from the hub ({reason})."
        ) from error
