"""OUT: where the work that makes it goes on, and how the finished model gets there.

An OUT that does not exist, or that ``--force`` replaces, is made in a folder beside it and appears with one rename:
whole or not at all. With two kinds of OUT that is not possible:

- a mount point, for instance ``docker run -v "$PWD/out:/out"``: it cannot be renamed, and what is beside it may be
  another file system, too small or gone when the container ends;
- an empty folder: it may be such a mount without showing it, or all of the disk that this user may write.

There the work goes on in a folder inside OUT. In the end each file is renamed into OUT, ``config.json`` last, without
which no program takes a folder for a model.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from mla_converters.errors import ConversionError

CONFIG = "config.json"
MOUNTS = Path("/proc/self/mountinfo")
OF_THE_DISK = "lost+found"  # in the root of every ext4 file system


def work_place(out: Path) -> Path:
    """The folder in which the model for ``out`` is put together."""
    inside = out / f"{out.name}.partial"
    if out.is_dir() and (inside.exists() or not _entries(out) or is_mount_point(out)):
        return inside
    return out.with_name(inside.name)


def check_out(out: Path, force: bool) -> None:
    """Refuse an ``out`` that would have to be replaced, unless it is a model and that was asked for.

    Raises:
        ConversionError: it exists and is not empty.
    """
    work = work_place(out)
    if not out.exists() or (out.is_dir() and not _entries(out) - {work.name}):
        return
    if out.is_dir() and work.parent == out and work.exists() and not (out / CONFIG).exists():
        return  # killed while the files of a finished model were moved into it
    if not force:
        raise ConversionError(f"{out} exists: choose another OUT, or replace it with --force.")
    if not (out.is_dir() and (out / CONFIG).exists()):
        raise ConversionError(f"{out} exists and is no model folder, so --force will not replace it.")


def check_apart(out: Path, files: Iterable[Path], name: str) -> None:
    """Refuse an ``out`` that holds files of a model that is read, which ``--force`` would delete.

    Args:
        out: the folder to create.
        files: of the model.
        name: what the command calls the model.

    Raises:
        ConversionError: some of them are in ``out`` or below it.
    """
    places = {place for file in files for place in (file.parent.resolve(), file.resolve().parent)}
    if any(place.is_relative_to(out.resolve()) for place in places):
        raise ConversionError(f"OUT is {out}, which holds files of {name}: give a folder of its own.")


def put_in_place(model: Path, out: Path, work: Path) -> None:
    """Give a finished model its final name.

    Args:
        model: the folder that holds it, below ``work``.
        out: the name.
        work: as :func:`work_place` gave it; what was in ``out`` before is below it afterwards.
    """
    replaced = work / "replaced"
    if work.parent != out:
        if out.exists():
            out.rename(replaced)
        model.rename(out)
        return
    replaced.mkdir(exist_ok=True)
    there = _entries(out) - {work.name}
    if not (out / CONFIG).exists():
        there &= _entries(model)  # no model that is replaced: what else came into the folder meanwhile stays
    for name in _config_first(there):
        shutil.move(out / name, replaced / name)
    for name in reversed(_config_first(_entries(model))):
        os.rename(model / name, out / name)


def _config_first(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (name != CONFIG, name))


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {OF_THE_DISK}


def is_mount_point(folder: Path) -> bool:
    """Whether a file system is mounted on a folder, also one that is bound there from elsewhere on the same device."""
    if os.path.ismount(folder):
        return True
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return False
    points = {re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4]) for line in lines}
    return str(folder.resolve()) in points
