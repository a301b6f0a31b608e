"""A model as it is stored: a Hugging Face folder, or GGUF files."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mla_converters.checkpoints.configuration import Configuration, understand
from mla_converters.checkpoints.gguf.model import GgufModel
from mla_converters.checkpoints.kinds import (
    files_below,
    refuse_no_checkpoint,
    refuse_other_tasks,
    refuse_other_tensors,
)
from mla_converters.checkpoints.quantised.tensors import dequantised
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.tensors import Tensors
from mla_converters.support.json_files import read_json_object


@dataclass(frozen=True)
class Stored:
    """A model as it is stored, whatever the format.

    Attributes:
        configuration: read and checked.
        tensors: the weights.
        folder: ``config.json``, the tokenizer and other files that go beside the weights.
        unpacked: where a copy goes when transformers or vLLM load the model; None where ``folder`` has the weights.
    """

    configuration: Configuration
    tensors: Tensors
    folder: Path
    unpacked: Path | None


def stored_in_folder(folder: Path, name: str, rope_scaling: dict[str, Any] | None) -> Stored:
    """A Hugging Face folder.

    Args:
        folder: where the files are.
        name: as the user gave it.
        rope_scaling: see :func:`mla_converters.checkpoints.configuration.understand`.

    Raises:
        ConversionError: it is none, or cannot be converted.
    """
    config_file = folder / "config.json"
    if not config_file.exists():
        refuse_no_checkpoint(folder, name, files_below(folder))
    raw = read_json_object(config_file)
    refuse_other_tasks(folder, raw)
    configuration = understand(raw, str(config_file), rope_scaling)
    checkpoint = Checkpoint(folder, configuration.family.experts)
    tensors = dequantised(checkpoint, configuration.quantisation, configuration.config)
    refuse_other_tensors(tensors.names())
    return Stored(configuration, tensors, folder, unpacked=None)


def stored_in_gguf(path: Path, scratch: Path, rope_scaling: dict[str, Any] | None) -> Stored:
    """A GGUF model.

    Args:
        path: the file, or any part of a split one.
        scratch: an empty folder, for its tokenizer and configuration as files.
        rope_scaling: see :func:`mla_converters.checkpoints.configuration.understand`.

    Raises:
        ConversionError: it is none, is not whole, or cannot be converted.
    """
    model = GgufModel(path)
    side = scratch / "side"
    side.mkdir()
    model.write_side_files(side)
    configuration = understand(model.config, model.config_name, rope_scaling)
    return Stored(
        replace(configuration, unknown_keys=model.unknown_keys + configuration.unknown_keys),
        model.tensors,
        folder=side,
        unpacked=scratch / "model",
    )
