"""The folder in which a run writes its model. An interrupted run goes on from that folder."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from mla_converters.errors import ConversionError, StoppedError, UnfinishedError
from mla_converters.resume.interruption import interruptible
from mla_converters.resume.layer_pass import Record, Streams
from mla_converters.resume.out_folder import check_out, put_in_place, work_place
from mla_converters.support.json_files import read_json_object, write_json

IDENTITY = "conversion.json"
LOCK = "lock"
MODEL = "model"


class Work:
    """An unfinished model on disk.

    Attributes:
        folder: ``OUT.partial``, beside OUT or in it.
        model: the folder below it that becomes OUT.
        resumed: whether it holds the work of an earlier run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / MODEL
        self.resumed = False

    def record(self, name: str) -> Record:
        """The record of one pass over the layers."""
        return Record(self.folder / f"{name}.safetensors")

    def remembered(self, name: str, compute: Callable[[], Streams]) -> Streams:
        """The result of ``compute``; it is computed only if no earlier run saved it."""
        record = self.record(name)
        streams = record.begin(compute)
        if not record.done:
            record.done = 1
            record.save()
        return streams

    def mapped(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The same for a tensor that may be larger than memory: it stays in its file, and processes share it."""
        path = self.folder / f"{name}.npy"
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, compute().numpy())
            os.replace(partial, path)
        return torch.from_numpy(np.load(path, mmap_mode="c"))

    def remembered_together(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The same for what all processes of a run compute together, and all of them get."""
        state = PartialState()
        state.wait_for_everyone()
        record = self.record(name)
        known = record.path is not None and record.path.exists()
        state.wait_for_everyone()
        streams = record.begin(lambda: {name: compute()})
        if state.is_main_process and not known:
            record.done = 1
            record.save()
        return streams[name]

    def begin(self, identity: dict[str, Any]) -> None:
        """Start, or go on with the work of an earlier run that has the same identity.

        Raises:
            ConversionError: the folder holds work of another identity.
        """
        path = self.folder / IDENTITY
        if path.exists():
            differences = _differences(read_json_object(path), identity)
            if differences:
                raise ConversionError(
                    f"{self.folder} holds unfinished work that differs in {', '.join(differences)}: finish "
                    "it the way it was begun, or delete the folder to start again."
                )
        # Without a model folder, this is a new start, or a run was killed after it had moved the model to its place.
        self.resumed = self.model.is_dir()
        if not self.resumed:
            for entry in self.folder.iterdir():
                if entry.name != LOCK:
                    _remove(entry)
            write_json(path.with_suffix(".partial"), identity)
            os.replace(path.with_suffix(".partial"), path)
            self.model.mkdir()

    def check_space(self, needed: int) -> None:
        """Refuse to begin work that does not fit on the disk.

        Args:
            needed: bytes on disk, including the files of an earlier run.

        Raises:
            ConversionError: the disk has less space.
            UnfinishedError: it has less space for going on with the work of an earlier run, which stays.
        """
        used = sum(512 * path.stat().st_blocks for path in self.folder.rglob("*"))
        available = shutil.disk_usage(self.folder).free + used
        if available < needed:
            sentence = (
                f"This takes {needed / 1e9:,.2f} GB on disk, and {self.folder.parent} has "
                f"{available / 1e9:,.2f} GB free: choose another OUT, or make room."
            )
            raise UnfinishedError(sentence) if self.resumed else ConversionError(sentence)


@contextmanager
def work_folder(out: Path, force: bool, identity: dict[str, Any]) -> Iterator[Work]:
    """A folder beside ``out``, or in it, to work in. Its model gets the name ``out`` when the block succeeds.

    An interruption leaves the folder, so that a later run can go on. A :class:`ConversionError` removes it.

    Args:
        out: the final name.
        force: replace ``out`` if it is a model.
        identity: everything that decides the result; a run goes on with earlier work only if its identity is the same.

    Raises:
        ConversionError: ``out`` exists, its parent cannot be written, another run is writing it, or unfinished work
            of another identity is there.
        UnfinishedError: the run was interrupted or the disk is full; the same command goes on with the work.
    """
    if out.is_symlink() or not out.name:
        out = out.resolve()  # the model goes where a link points to; and the folder "." has a name
    check_out(out, force)
    folder = work_place(out)
    if folder.exists() and not _is_ours(folder):
        raise ConversionError(f"{folder} exists and is no unfinished work: move it away.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConversionError(f"Another run is writing {folder}: wait for it, or choose another OUT.") from error
    except OSError as error:
        raise ConversionError(f"{folder.parent} cannot be written: {error.strerror}.") from error
    with lock:
        check_out(out, force)  # another run may have finished in the meantime
        work = Work(folder)
        work.begin(identity)
        try:
            with interruptible():
                yield work
                put_in_place(work.model, out, folder)
        except KeyboardInterrupt as error:
            raise StoppedError(f"Interrupted. {_go_on(folder)}") from error
        except UnfinishedError as error:
            raise UnfinishedError(f"{error} {_go_on(folder)}") from error
        except ConversionError:
            _remove(folder)
            raise
        except OSError as error:
            raise UnfinishedError(f"{out} could not be written: {error.strerror or error}. {_go_on(folder)}") from error
        _remove(folder)


def joined_work(out: Path) -> Work:
    """The work in which another process of the same run has begun to write ``out``."""
    return Work(work_place(out.resolve() if out.is_symlink() or not out.name else out))


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and ((folder / IDENTITY).exists() or not {e.name for e in folder.iterdir()} - {LOCK})


def _go_on(folder: Path) -> str:
    return f"The same command goes on from {folder}; to give up, delete that folder."


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The entries that differ, as ``name (then, now)``."""
    shown = {name: [_shown(run.get(name)) for run in (then, now)] for name in sorted(then.keys() | now.keys())}
    return [f"{name} ({before} then, {after} now)" for name, (before, after) in shown.items() if before != after]


def _shown(value: object) -> object:
    return "not given" if value is None else value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
