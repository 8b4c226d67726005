"""Where a checkpoint is written before it appears: a temporary sibling, which becomes the output with one rename.

A killed run leaves at most a directory whose name ends with .fusectl-tmp, which no trainer takes for a checkpoint. The
next run to the same output goes on with it if it is told to, and replaces it if not. A file in it, the journal, says
that fusectl has made it. In a bucket, which knows no rename, upload.py does the same.

What stands in the output's place is looked at again when the output appears: hours have passed since the first time.
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
from fusectl.formats.locate import is_checkpoint
from fusectl.formats.names import JOURNAL, LEASE, TEMPORARY_SUFFIX
from fusectl.formats.objects import ObjectPath, Place
from fusectl.formats.store import walk
from fusectl.formats.upload import Staging


REMOVALS = 200
# It names what stands at the top of the output.
LARGEST_HEAD_BYTES = 64 << 20
FLUSHES_AT_ONCE = 8
# What somebody can put an end to, so that the same command goes on.
_PASSING = (StorageError, NotEnoughSpace, OutputExists)


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
    failure is one that may pass: an interrupt, a full disk, storage that refuses, an output's place that is taken; then
    `kept` is called. With `resume` it begins with what such a run has left. With `sync` all of it is on the disk before
    it appears.

    Raises OutputExists when `final` exists and `force` is not given, when it is no checkpoint, when another process is
    writing it, and when the temporary sibling is not of fusectl's making.
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
        if (os.path.lexists(final) and not force) or not _is_open_as(temporary, lock):
            raise OutputExists(f"{final}: another process has just written it")
        _require_own(temporary)
        try:
            with storage_errors(final):
                if resume:
                    _remove_strange(temporary)
                else:
                    _empty(temporary)
                staging = Staging(temporary)
                yield staging
                if sync:
                    _sync(temporary)
                staging.require_whole()
                with undisturbed():
                    _publish(temporary, final, force=force)
                if os.path.lexists(temporary):
                    note(f"{temporary}: what was replaced; it could not be removed")
        except BaseException as error:
            if not _is_open_as(temporary, lock):
                # It has appeared, or somebody has put something else in its place.
                raise
            may_pass = not isinstance(error, Exception) or isinstance(error, _PASSING)
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
        with suppress(OSError):
            # As long as it is not gone it is known for fusectl's own.
            _empty(at)
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


def _require_own(temporary: Path) -> None:
    """Raises OutputExists for a directory with something in it that no run of fusectl has begun."""
    if not os.path.lexists(temporary / JOURNAL) and any(temporary.iterdir()):
        raise OutputExists(
            f"{temporary}: not of fusectl's making, and the checkpoint would be written there first",
            hint="move it away, or choose another -o",
        )


def _empty(at: Path) -> None:
    """Removes all that is in a directory, but for the sign that it is fusectl's: an empty journal."""
    _mark(at)
    for child in at.iterdir():
        if child.name != JOURNAL:
            remove_any(child)


def _mark(at: Path) -> None:
    """Makes a directory one that fusectl has begun, with nothing to go on with."""
    journal = at / JOURNAL
    if os.path.lexists(journal):
        remove_any(journal)
    journal.touch(exist_ok=False)


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


def _publish(temporary: Path, final: Path, *, force: bool) -> None:
    """Makes the temporary directory the output; raises OutputExists for what may not be replaced, which stays."""
    if force and os.path.lexists(final):
        require_replaceable(final)
        _exchange(temporary, final)
        if not _is_replaceable(temporary):
            # It has come in between.
            _exchange(temporary, final)
            require_replaceable(final)
        clear_journal(final)
        _remove(temporary)
    else:
        _rename_anew(temporary, final)
        clear_journal(final)
    _fsync(final.parent)


def require_replaceable(at: Path) -> None:
    """Raises OutputExists for what is neither a checkpoint nor an empty directory."""
    if not _is_replaceable(at):
        raise OutputExists(f"{at}: exists and is no checkpoint; --force replaces nothing else")


def _is_replaceable(at: Path) -> bool:
    return not at.is_symlink() and at.is_dir() and (is_checkpoint(at) or not any(at.iterdir()))


_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# What file systems answer that have no such flags, and what stands for a call that there is not, or that is forbidden.
_NO_FLAGS = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})


def _renameat2(a: Path, b: Path, flags: int) -> int:
    """Renames as Linux's call of this name does; 0, or the number of the error."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return errno.ENOSYS
    return ctypes.get_errno() if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), flags) else 0


def _rename_anew(a: Path, b: Path) -> None:
    """Renames a directory; raises OutputExists where there is anything by the new name.

    Where the file system cannot refuse it by itself, an empty directory that appears in between is replaced: POSIX's
    rename replaces no other thing by a directory.
    """
    number = _renameat2(a, b, _RENAME_NOREPLACE)
    if number in _NO_FLAGS and not os.path.lexists(b):
        a.rename(b)
        return
    if number and os.path.lexists(b):
        hint = "move it away; the same command with --resume then goes on"
        raise OutputExists(f"{b}: has appeared while it was being written, and is left as it is", hint=hint)
    if number:
        raise OSError(number, os.strerror(number), str(b))


def _exchange(a: Path, b: Path) -> None:
    """Swaps two directories in one step where Linux can; elsewhere in three renames."""
    number = _renameat2(a, b, _RENAME_EXCHANGE)
    if number and number not in _NO_FLAGS:
        raise OSError(number, os.strerror(number), str(b))
    if not number:
        return
    aside = b.with_name(b.name + ".old" + TEMPORARY_SUFFIX)
    _rename_anew(b, aside)
    try:
        _rename_anew(a, b)
    except BaseException:
        _rename_anew(aside, b)
        raise
    _rename_anew(aside, a)


_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
