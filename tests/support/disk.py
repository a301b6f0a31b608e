"""Small disks, and disks that fill up."""

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path | None]:
    """A file system of ``size`` (as ``mount`` takes it) at ``folder``; None without the right to mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
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
