"""Reading and writing the JSON files of a model folder."""

import json
from pathlib import Path

from mla_converters.errors import ConversionError


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` in the format in which Hugging Face writes its JSON files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json_object(path: Path) -> dict:
    """Read a JSON file of a model folder.

    Raises:
        ConversionError: the file is missing, or does not hold a JSON object.
    """
    if not path.exists():
        raise ConversionError(f"{path.parent} is not a model folder: it has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} does not hold a JSON object.")
    return content
