"""Writing a model as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from mla_converters.checkpoints.side_files import copy_side_files
from mla_converters.checkpoints.tensors import Tensors
from mla_converters.checkpoints.writer import Shards
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import write_json


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors, side_folder: Path) -> None:
    """Write a model as transformers and vLLM load it, one tensor at a time and each in its own dtype.

    Args:
        folder: to create.
        config: becomes ``config.json``.
        tensors: all that the model needs; none is invented.
        side_folder: has the tokenizer and other files to copy.

    Raises:
        ConversionError: there is no room.
    """
    shards = Shards(folder, {name: tensors.meta(name) for name in tensors.names()})
    try:
        folder.mkdir()
        write_json(folder / "config.json", config)
        copy_side_files(side_folder, folder, trust_remote_code=False)
        shards.allocate()
        for name in tensors.names():
            shards.write(name, tensors.tensor(name))
        shards.finish()
    except OSError as error:
        raise ConversionError(
            f"{folder} takes {shards.total_bytes / 1e9:,.2f} GB and cannot be written ({error.strerror or error}): "
            "make room there, or set TMPDIR to where there is some."
        ) from error
