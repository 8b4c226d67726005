"""The process's memory: the allocator's settings for large buffers and many threads, and what is used and free."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path


# glibc's names for them; see mallopt(3).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_ARENA_MAX = -8

ARENAS = 2
MMAP_FROM_BYTES = 64 << 20
KEPT_BYTES = 64 << 20


def prepare_process() -> None:
    """Sets what libraries read when they are loaded: the allocator gives memory back, BLAS starts no threads."""
    # For the sums of small arrays they would spin beside the threads that have work.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return_memory()


def return_memory() -> None:
    """Makes malloc, where it is glibc's, give large buffers back; to be called before threads are started.

    By default every thread gets an arena, and each keeps most of what it has freed: fusing 1.3 GB with a budget of
    256 MiB took 570 MB, and takes 230 to 390 MB with few arenas and with pages of their own for large buffers. What is
    smaller stays: fresh pages for every temporary array cost more than most of what is computed in them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, ARENAS)
        mallopt(_MMAP_THRESHOLD, MMAP_FROM_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident, in bytes.

    Linux's VmHWM; ru_maxrss, the fallback, starts at what the parent had before it forked.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", _text("/proc/self/status"))
    return (int(found.group(1)) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def available_bytes() -> int:
    """The memory that this process may still take: what the machine has free, or the container if that is less."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))
    free = [int(found.group(1)) * 1024] if found else []
    for limit, used in _CGROUPS:
        numbers = [_text(path).strip() for path in (limit, used)]
        if all(number.isdecimal() for number in numbers):
            free.append(max(0, int(numbers[0]) - int(numbers[1])))
    return min(free, default=sys.maxsize)


# Limit and use of memory of a container's own group, in versions 2 and 1.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
