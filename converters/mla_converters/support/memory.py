"""Returning unused memory of a process to the system, and measuring its memory."""

import ctypes
import ctypes.util
import re
import resource
import sys
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # constants of malloc.h
LARGE = 2**23  # bytes; with a lower limit, the system would clear new pages for every tensor of a small model
SHARDED_LARGE = 2**21  # bytes, for those who share weights because memory is short; a step takes a tenth longer


def return_freed_memory(large: int = LARGE) -> None:
    """Make glibc return large blocks to the system when they are freed; do nothing with other C libraries.

    By default, glibc returns only blocks above a limit, and it raises that limit to the size of the largest block freed
    so far, up to 32 MiB. Tensors of ever new sizes then leave holes, which cost a third of a conversion's peak memory.

    Args:
        large: the limit in bytes.
    """
    if hasattr(_c_library(), "mallopt"):
        _c_library().mallopt(M_MMAP_THRESHOLD, large)
        _c_library().mallopt(M_TRIM_THRESHOLD, 4 * large)


def return_holes() -> None:
    """Return to the system what lies free between glibc's small blocks; do nothing with other C libraries."""
    if hasattr(_c_library(), "malloc_trim"):
        _c_library().malloc_trim(0)


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library("c"))


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    # On Linux, ru_maxrss may include the memory of the process that started this one; VmHWM does not. A sandbox may
    # lack the file or the entry.
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
