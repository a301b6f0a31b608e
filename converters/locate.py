"""Finding what the user named: a folder, a file, or a model on the hub."""

import json
from pathlib import Path

from mla_converters.errors import ConversionError


def local_path(name: str) -> Path | None:
    """The folder or file of that name; None if it can only be a hub id.

    Raises:
        ConversionError: it looks like a path, and nothing is there.
    """
    path = Path(name)
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConversionError(f"{name} does not exist.")
    return None


def not_a_model_file(name: str) -> ConversionError:
    """The refusal of a file of another kind."""
    return ConversionError(f"{name} is a file but not a .gguf: give a model folder or a hub id.")


def not_on_the_hub(name: str, error: Exception) -> ConversionError:
    """The refusal of a name that is no folder, for what the hub said."""
    reason = str(error).strip().splitlines()[0]
    return ConversionError(
        f"{name!r} is neither a folder here nor a model that can be fetched from the hub ({reason})."
    )


def read_json_object(path: Path) -> dict:
    """Read one of a model folder's JSON files.

    Raises:
        ConversionError: it is missing or holds something else.
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
