"""A model as it is stored: a Hugging Face folder, or GGUF files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from mla_converters.checkpoints.gguf.model import GgufModel
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.tensors import Tensors
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import read_json_object


@dataclass(frozen=True)
class Stored:
    """A model as it is stored, whatever the format.

    Attributes:
        config: as in ``config.json``.
        config_name: the place of the configuration, for messages.
        tensors: the weights.
        folder: ``config.json``, the tokenizer and other files that go beside the weights.
        unpacked: where a copy goes when transformers or vLLM load the model; None where ``folder`` has the weights.
        unknown_keys: keys of a GGUF header that were not understood, and may or may not matter.
    """

    config: dict[str, Any]
    config_name: str
    tensors: Tensors
    folder: Path
    unpacked: Path | None
    unknown_keys: list[str]


def stored_in_folder(folder: Path) -> Stored:
    """A Hugging Face folder.

    Raises:
        ConversionError: it is none.
    """
    config_file = folder / "config.json"
    return Stored(
        config=read_json_object(config_file),
        config_name=str(config_file),
        tensors=Checkpoint(folder),
        folder=folder,
        unpacked=None,
        unknown_keys=[],
    )


def stored_in_gguf(path: Path, scratch: Path) -> Stored:
    """A GGUF model.

    Args:
        path: the file, or any part of a split one.
        scratch: an empty folder, for its tokenizer and configuration as files.

    Raises:
        ConversionError: it is none, is not whole, or cannot be converted.
    """
    model = GgufModel(path)
    side = scratch / "side"
    side.mkdir()
    model.write_side_files(side)
    return Stored(
        config=model.config,
        config_name=model.config_name,
        tensors=model.tensors,
        folder=side,
        unpacked=scratch / "model",
        unknown_keys=model.unknown_keys,
    )


def config_from_dict(config: dict[str, Any], name: str) -> PretrainedConfig:
    """The transformers configuration of a ``config.json`` of a supported family.

    Args:
        config: its content.
        name: the file or header that it is from, for messages.

    Raises:
        ConversionError: it is not valid.
    """
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # transformers validates with many exception types
        raise ConversionError(f"{name} is not a valid configuration: {error}") from error
