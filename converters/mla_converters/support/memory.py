"""Keeping the memory of a process to what it uses, and measuring it."""

import ctypes
import ctypes.util
import re
import resource
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGE = 2**23  # bytes; lower, and the system clears pages for every tensor of a small model anew


def return_freed_memory() -> None:
    """Let large blocks go back to the system when they are freed, where the C library is glibc.

    By default glibc raises the size from which it does so to that of the blocks freed so far, up to 32 MiB; the holes
    that tensors of ever new sizes leave then cost a third of a conversion's peak.
    """
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, 4 * LARGE)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    # Linux says it here: unlike its ru_maxrss, without what the process that started this one used. Sandboxes may not.
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
