"""Finding what the user named: a folder, a file, or a model on the hub."""

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


def model_file(path: Path) -> Path:
    """A file that holds a model.

    Raises:
        ConversionError: it is of another kind.
    """
    if path.suffix != ".gguf":
        raise ConversionError(f"{path} is a file but not a .gguf: give a model folder or a hub id.")
    return path


def not_on_the_hub(name: str, error: Exception) -> ConversionError:
    """The refusal of a name that is no folder, for what the hub said."""
    reason = str(error).strip().splitlines()[0]
    return ConversionError(
        f"{name!r} is neither a folder here nor a model that can be fetched from the hub ({reason})."
    )
