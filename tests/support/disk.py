"""Small disks, and disks that fill up."""

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system at ``folder``, with these options of ``mount``. Without the right to mount, the test is skipped."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(disk: Path, process: subprocess.Popen[str]) -> None:
    """Take all space on a disk, while a process is running."""
    block = bytes(1024)
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while process.poll() is None:
            filler.write(block)
