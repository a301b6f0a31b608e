"""Checksums of a converted checkpoint, so that damage is seen before it is served."""

import hashlib
from pathlib import Path

from mla_converters.errors import ConversionError
from mla_converters.support.json_files import read_json_object, write_json

MANIFEST = "mla_manifest.json"


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file of a folder into :data:`MANIFEST`."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


def update_manifest(folder: Path, changed: list[Path]) -> None:
    """Describe files of a folder again that were changed on purpose; what is said of all others stays.

    Raises:
        ConversionError: there is no manifest, or it is something else.
    """
    files = _described_files(folder) | {path.name: _describe(path) for path in changed}
    write_json(folder / MANIFEST, {"files": files})


def manifest_problems(folder: Path) -> list[str]:
    """What differs from the folder's manifest. Files that were added are no problem.

    Raises:
        ConversionError: there is no manifest, or it is something else.
    """
    problems = []
    for name, described in _described_files(folder).items():
        path = folder / Path(name).name
        if not path.is_file():
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
