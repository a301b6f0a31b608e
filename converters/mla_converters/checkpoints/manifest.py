"""Checksums of a converted checkpoint, so that damage is seen before it is served."""

import hashlib
from pathlib import Path

from mla_converters.errors import ConversionError
from mla_converters.support.json_files import read_json_object, write_json

MANIFEST = "mla_manifest.json"


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file of a folder and of its sub-folders into :data:`MANIFEST`."""
    files = {name: _describe(folder / name) for name in all_files(folder) if name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


def all_files(folder: Path) -> list[str]:
    """The files of a folder and of its sub-folders, as POSIX paths below it, sorted; nothing of hidden sub-folders,
    in which download tools and git keep files of their own."""
    below = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parent.parts))


def update_manifest(folder: Path, changed: list[Path]) -> None:
    """Describe files of a folder again that were changed on purpose; what is said of all others stays.

    Raises:
        ConversionError: there is no manifest, or it is something else.
    """
    changes = {path.relative_to(folder).as_posix(): _describe(path) for path in changed}
    files = _described_files(folder) | changes
    write_json(folder / MANIFEST, {"files": files})


def manifest_problems(folder: Path) -> list[str]:
    """What differs from the folder's manifest. Files that were added are no problem.

    Raises:
        ConversionError: there is no manifest, or it is something else.
    """
    problems = []
    for name, described in _described_files(folder).items():
        path = folder / name
        if ".." in path.parts or Path(name).is_absolute() or not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != described["bytes"]:
            problems.append(f"{name} has {path.stat().st_size:,} bytes where {described['bytes']:,} were written")
        elif _describe(path) != described:
            problems.append(f"{name} was changed: its checksum differs")
    return problems


def _described_files(folder: Path) -> dict[str, dict]:
    files = read_json_object(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) for file in files.values()
    ):
        raise ConversionError(f"{folder / MANIFEST} is not a manifest that vllm-mla convert wrote.")
    return files


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
