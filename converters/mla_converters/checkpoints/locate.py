"""Finding what the user named: a folder, a file, or a model on the hub."""

import re
from pathlib import Path

from mla_converters.errors import ConversionError, OptionError

HUB_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[^/?#\s]+/[^/?#\s]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#\s]+)(?:/(?P<file>[^?#\s]+))?)?"
)


def local_path(name: str) -> Path | None:
    """The folder or file of that name; None if it can only be a hub id.

    Raises:
        ConversionError: it looks like a path, and nothing is there; or it is a web address.
    """
    path = Path(name)
    if path.exists():
        return path
    if address := HUB_ADDRESS.match(name):
        raise ConversionError(_hub_address_refusal(name, address))
    if "://" in name:
        raise ConversionError(
            f"{name} is a web address, which is not fetched: download the model and give its folder, or give an id on "
            "the Hugging Face hub."
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConversionError(f"{name} does not exist.")
    return None


def check_revision(name: str, revision: str | None) -> None:
    """Refuse a revision of a model that is not on the hub, because it would have no effect.

    Raises:
        OptionError: the model is a folder or a file, and a revision is given.
    """
    if revision is not None and local_path(name) is not None:
        raise OptionError(f"--revision is {revision}, but {name} is on this machine, not on the hub: leave it out.")


def _hub_address_refusal(name: str, address: re.Match[str]) -> str:
    repo, revision, file = address["id"], address["revision"], address["file"]
    if file and file.endswith(".gguf"):
        return f"{name} is a web address: download the file with hf download {repo} {file}, and give its path."
    at = f", and --revision {revision}" if revision and revision != "main" else ""
    return f"{name} is a web address: give the model's id on the hub, {repo}{at}."


def model_file(path: Path) -> Path:
    """A file that holds a model.

    Raises:
        ConversionError: it is of another kind.
    """
    if path.suffix != ".gguf":
        raise ConversionError(f"{path} is a file but not a .gguf: give a model folder or a hub id.")
    return path


def not_on_the_hub(name: str, error: Exception) -> ConversionError:
    """The refusal of a name that is no folder; quotes the hub's reason."""
    reason = str(error).strip().splitlines()[0]
    return ConversionError(
        f"{name!r} is neither a folder here nor a model that can be fetched from the hub ({reason})."
    )
