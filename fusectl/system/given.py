"""Files from outside: what options name, and the small ones of a checkpoint. None may hang a process or fill memory.

Only regular files are read: pipes and devices, which may have no end, are not.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fusectl.errors import NotFound, StorageError, UsageError


_PIECE_BYTES = 1 << 20


def read_given(path: str | Path, most_bytes: int, what: str) -> bytes:
    """The contents of a file that a user has named for `what`, such as tokens; `~` is the home directory.

    Raises NotFound where there is none, UsageError for what is no file or has more than `most_bytes`, StorageError.
    """
    file = Path(os.path.expanduser(path))  # noqa: PTH111
    try:
        there = not file.is_dir() and bool(file.stat())
        raw = read_local(file, most_bytes) if there else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        there = False
    except OSError as error:
        raise StorageError(f"{path}: cannot be read", details=(str(error),)) from error
    if not there:
        raise NotFound(f"{path}: no file of {what}")
    if raw is None:
        raise UsageError(f"{path}: no file that ends: a pipe or a device", hint="write it into a file first")
    if isinstance(raw, int):
        raise UsageError(f"{path}: {raw:,} bytes, more than the {most_bytes:,} that {what} may have")
    return raw


def read_local(file: Path, most_bytes: int) -> bytes | int | None:
    """The contents of a file on this machine, its size where that is more than `most_bytes`, None where it is none."""
    try:
        # One that waits for somebody to write into it is opened at once.
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ELOOP}:
            return None
        raise
    try:
        told = os.fstat(handle)
        if not stat.S_ISREG(told.st_mode):
            return None
        if told.st_size > most_bytes:
            return told.st_size
        raw = b""
        # What it says of its size need not be so: files of /proc have none.
        while piece := os.read(handle, max(told.st_size + 1 - len(raw), _PIECE_BYTES)):
            raw = raw + piece if raw else piece
            if len(raw) > most_bytes:
                return len(raw)
        return raw
    finally:
        os.close(handle)
