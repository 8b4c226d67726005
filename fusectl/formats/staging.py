"""Where a checkpoint is written before it appears: a temporary sibling, which becomes the output with one rename.

A killed run leaves at most a directory whose name ends with .fusectl-tmp, which no trainer takes for a checkpoint. The
next run to the same output goes on with it if it is told to, and replaces it if not. In a bucket, which knows no
rename, upload.py does the same.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from fusectl.errors import FusectlError, NotEnoughSpace, OutputExists, StorageError
from fusectl.formats import upload
from fusectl.formats.locate import JOURNAL, LEASE, TEMPORARY_SUFFIX
from fusectl.formats.objects import ObjectPath, Place
from fusectl.formats.store import walk
from fusectl.formats.upload import Staging


REMOVALS = 200
# It names what stands at the top of the output.
LARGEST_HEAD_BYTES = 64 << 20
FLUSHES_AT_ONCE = 8


def _nothing() -> None:
    pass


def _silent(_: str) -> None:
    pass


@contextmanager
def staged(
    final: Place,
    *,
    force: bool,
    sync: bool = True,
    resume: bool = False,
    names: Collection[str] = (),
    kept: Callable[[], None] = _nothing,
    note: Callable[[str], None] = _silent,
) -> Iterator[Staging]:
    """A temporary sibling of `final`, which becomes `final` when the body ends; in a bucket `final` itself.

    There `force` and `sync` mean nothing: what exists is never replaced, what is written is stored.

    When the body fails it is removed, with the directories that were made for it, unless it has a journal and the
    failure is one that may pass: an interrupt, a full disk, storage that refuses; then `kept` is called. With `resume`
    it begins with what such a run has left. With `sync` all of it is on the disk before it appears.

    Raises OutputExists when `final` exists and `force` is not given, or when another process is writing it.
    """
    if isinstance(final, ObjectPath):
        with upload.uploaded(final, resume=resume, names=names, kept=kept, note=note) as opened:
            yield opened
        return
    if os.path.lexists(final) and not force:
        raise OutputExists(f"{final}: exists", hint="choose another -o, or --force to replace it")
    temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
    if temporary.is_symlink():
        raise OutputExists(f"{temporary}: a symbolic link, where the checkpoint would be written first")
    # The directories that hold it, the nearest first.
    new = [parent for parent in final.parents if not parent.exists()]
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        require_alone(lock, f"{final}: another process is writing it")
        if (final.exists() and not force) or not _is_open_as(temporary, lock):
            raise OutputExists(f"{final}: another process has just written it")
        try:
            with storage_errors(final):
                if resume:
                    _remove_strange(temporary)
                else:
                    _empty(temporary)
                yield Staging(temporary)
                if sync:
                    _sync(temporary)
                with undisturbed():
                    _publish(temporary, final)
        except BaseException as error:
            may_pass = not isinstance(error, Exception) or isinstance(error, StorageError | NotEnoughSpace)
            if may_pass and can_be_resumed(final):
                kept()
            else:
                with undisturbed():
                    _remove(temporary)
                    _remove_empty(new)
            raise
    finally:
        os.close(lock)


def require_alone(directory: int, says: str) -> None:
    """Locks an open directory for as long as it is open; raises OutputExists with these words where another one has."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputExists(says) from error


def staging_of(final: Place) -> Place:
    """Where a checkpoint is written before it appears."""
    return final.with_name(final.name + TEMPORARY_SUFFIX) if isinstance(final, Path) else final


def can_be_resumed(final: Place) -> bool:
    """Whether an interrupted run to this output has left something to go on with."""
    return journal_head(staging_of(final)).endswith(b"\n")


def clear_journal(final: Place) -> None:
    """Removes the journal that a run has left whose output had appeared."""
    if isinstance(final, ObjectPath):
        upload.clear_journal(final)
        (final / LEASE).remove()
    else:
        (final / JOURNAL).unlink(missing_ok=True)


def journal_head(at: Place) -> bytes:
    """The first line of the journal in a staging directory, which says of which plan it is; empty without one."""
    journal = at / JOURNAL
    try:
        if isinstance(journal, Path):
            if journal.is_symlink() or not journal.is_file():
                return b""
            with journal.open("rb") as file:
                return file.readline(LARGEST_HEAD_BYTES)
        return journal.read_bytes()
    except OSError:
        return b""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores the signals that would end the process, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove(at: Path) -> None:
    """Removes a directory; a file that a thread was still creating must not keep it."""
    for _ in range(REMOVALS):
        shutil.rmtree(at, ignore_errors=True)
        if not at.exists():
            return
        time.sleep(0.01)


def _remove_empty(directories: Sequence[Path]) -> None:
    """Removes directories, the inner ones first, up to one that something else is in."""
    with suppress(OSError):
        for each in directories:
            each.rmdir()


@contextmanager
def storage_errors(where: Place) -> Iterator[None]:
    """Turns the operating system's errors into fusectl's: a full disk, permissions, a read-only target."""
    try:
        yield
    except FusectlError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise NotEnoughSpace(f"{where}: the disk is full", details=(str(error),)) from error
        raise StorageError(f"{where}: cannot be written", details=(str(error),)) from error


def check_space(final: Path, needed_bytes: int) -> None:
    """Raises NotEnoughSpace when the file system of `final` has less than `needed_bytes` left."""
    existing = next(parent for parent in final.parents if parent.exists())
    total, _, free = shutil.disk_usage(existing)
    # A file system without a size of its own, such as /proc or some network ones, says nothing.
    if total and free < needed_bytes:
        raise NotEnoughSpace(
            f"{final}: not enough disk",
            details=(f"up to {needed_bytes:,} bytes needed, {free:,} bytes free in {existing}",),
        )


def _is_open_as(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove_strange(at: Path) -> None:
    """Removes what no run has left: links, which lead anywhere, pipes and devices, which have no end."""
    entries = list(walk(str(at)))
    for entry in entries:
        regular = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
        if not regular:
            Path(entry.path).unlink()


def _empty(at: Path) -> None:
    for child in at.iterdir():
        remove_any(child)


def remove_any(at: Path) -> None:
    """Removes a file, a link, or a directory with all that is in it."""
    if at.is_dir() and not at.is_symlink():
        shutil.rmtree(at)
    else:
        at.unlink()


def _sync(at: Path) -> None:
    """Flushes all files and directories to the disk; for those that are linked there is nothing left to do."""
    pool = ThreadPoolExecutor(FLUSHES_AT_ONCE)
    try:
        for parent, _, names in os.walk(at):
            flushed = pool.map(_fsync, [Path(parent, name) for name in names])
            list(flushed)
            _fsync(Path(parent))
    finally:
        # An interrupt waits for none of them.
        pool.shutdown(wait=False, cancel_futures=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(temporary: Path, final: Path) -> None:
    if final.exists():
        _exchange(temporary, final)
        shutil.rmtree(temporary)
    else:
        temporary.rename(final)
    clear_journal(final)
    _fsync(final.parent)


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _exchange(a: Path, b: Path) -> None:
    """Swaps two directories in one step where Linux can; elsewhere in two renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b))
    if renameat2 is not None and renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return
    aside = b.with_name(b.name + ".old" + TEMPORARY_SUFFIX)
    b.rename(aside)
    a.rename(b)
    aside.rename(a)


_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
