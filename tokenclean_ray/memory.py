"""The memory of this process: kept between operations, and how much there has been. Needs neither Ray nor torch."""

import ctypes
import functools
import re
import resource
import sys
from pathlib import Path

import pyarrow as pa

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc, and Arrow by it, keep what is freed for the next arrays.

    They give large pieces back to the kernel, which then zeroes and maps them page by page, at every operation: half of
    the time of a small model, a third of reading and counting losses.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        pa.set_memory_pool(pa.system_memory_pool())


def process_memory() -> int:
    """Most bytes that this process has had so far."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux's getrusage includes the process that started it
    (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(peak)
