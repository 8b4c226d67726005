"""Every failure that fusectl expects, each with the exit code of its branch.

    FusectlError                1  unexpected
    ├── UsageError              2  the command line makes no sense
    ├── VerificationFailed      3  the checkpoint is not what it should be
    ├── NotFound                4  there is nothing there, or no checkpoint
    ├── Corrupt                 5  a checkpoint, but incomplete or damaged
    ├── Incompatible            6  sound inputs that do not fit together
    ├── OutputExists            7  the output is there already
    ├── StorageError            8  permission, credentials, network: may work later
    └── NotEnoughSpace          9  not enough disk or memory

An error's first line says what and where; `details` hold both values and the next step. The command line prints
the first few of them, those of a UsageError with all their lines, and ends with `exit_code`; library users catch the
classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


MOST_LISTED = 20


class FusectlError(Exception):
    """A failure with a message for people (`str(error)`), `details`, a `hint` and an `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, *, details: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)
        self.hint = hint

    @property
    def code(self) -> str:
        """The class name in snake case, as `--json` prints it."""
        name = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


class UsageError(FusectlError):
    """The request itself makes no sense: K < 2, weights that do not sum to one, options that exclude each other."""

    exit_code = 2


class VerificationFailed(FusectlError):
    """A verification ran and found a difference."""

    exit_code = 3


class NotFound(FusectlError):
    """There is nothing at the path, or what is there is no checkpoint."""

    exit_code = 4


class Corrupt(FusectlError):
    """A checkpoint with missing, truncated, undecodable or non-finite parts, or one that was never committed."""

    exit_code = 5


class Incompatible(FusectlError):
    """Sound checkpoints that cannot be fused with each other, or a tree that no family's table describes."""

    exit_code = 6


class OutputExists(FusectlError):
    """The output path is taken, or is part of an input."""

    exit_code = 7


class StorageError(FusectlError):
    """Permissions, credentials or a network said no; the same call may work later."""

    exit_code = 8


class NotEnoughSpace(FusectlError):
    """The disk is too small for the output, or the memory budget too small for one unit of work."""

    exit_code = 9


def shorten(lines: Iterable[str], most: int = MOST_LISTED) -> tuple[str, ...]:
    """The first `most` lines, then one that counts the rest.

    >>> shorten(["a", "b", "c"], most=2)
    ('a', 'b', '... and 1 more')
    """
    every = list(lines)
    if len(every) <= most:
        return tuple(every)
    return (*every[:most], f"... and {len(every) - most} more")


def counted(n: int, noun: str) -> str:
    """A count with its noun and verb.

    >>> counted(1, "chunk"), counted(2, "chunk")
    ('1 chunk is', '2 chunks are')
    """
    return f"{n:,} {noun} is" if n == 1 else f"{n:,} {noun}s are"
