"""From a path that somebody typed to the checkpoint that is meant: a step, an item of one, or a root of steps.

    runs/a/                      root      the newest committed step, as with runs/a/latest
    runs/a/checkpoint_1000/      step      legacy T5X: its index is `checkpoint`
    runs/b/1000/                 step      Orbax: `_CHECKPOINT_METADATA` beside one directory per item
    runs/b/1000/state/           item      Orbax: `_METADATA` beside the arrays

Paths that are one level too high or too deep are answered with the path to use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fusectl.errors import Corrupt, FusectlError, NotFound, StorageError, UsageError
from fusectl.formats.foreign import refuse_directory, refuse_file, refuse_files_in
from fusectl.formats.kinds import FormatName
from fusectl.formats.names import (
    COMMITTED,
    JOURNAL,
    LEASE,
    ORBAX_INDEX,
    PACKED_INDEX,
    PREFIXED,
    STEP,
    STEP_METADATA,
    T5X_INDEX,
    TEMPORARY_SUFFIX,
    step_of,
)
from fusectl.formats.objects import ObjectPath, Place, head, read_small
from fusectl.formats.registry import COMPLETING, FORMATS
from fusectl.formats.store import MANIFEST, Files, ocdbt
from fusectl.formats.t5x import is_t5x
from fusectl.formats.tree import Location
from fusectl.system.jsontree import parsed


# It may hold a user's metrics.
LARGEST_STEP_BYTES = 16 << 20

_TEMPORARY = re.compile(rf"\.orbax-checkpoint-tmp|\.tmp-\d+$|{re.escape(TEMPORARY_SUFFIX)}$")
# How Orbax's old index begins: a dictionary, a list or a tuple.
_PACKED = re.compile(rb"[\x80-\x9f\xc7-\xc9\xd4-\xd8\xdc-\xdf]")
# Of several items in a step, the ones that hold the model, best first.
_ITEMS = ("state", "default", "items", "params", "model_params")


def place(path: str) -> Place:
    """Where a path or a gs:// or s3:// URL that a user typed leads."""
    return ObjectPath.parse(path) or local(path)


def local(path: str) -> Path:
    """An absolute Path for what a user typed: `~`, `file://`, relative paths and trailing slashes are fine."""
    if re.match(r"(?!file:)[a-z0-9]+://", path):
        raise UsageError(f"{path}: no such kind of URL", hint="gs://, s3://, file:// and local paths")
    if not path:
        raise UsageError("the path of the checkpoint is empty")
    try:
        path.encode()
        return Path(os.path.abspath(os.path.expanduser(path.removeprefix("file://"))))  # noqa: PTH100, PTH111
    except UnicodeEncodeError as error:
        raise UsageError(f"{path!r}: not UTF-8, which the stores need") from error
    except FileNotFoundError as error:
        raise NotFound("the current directory has gone", hint="cd to one that exists") from error


def locate(path: str) -> Location:
    """The Location of the checkpoint that `path` means.

    Raises NotFound for paths that hold no checkpoint, with the nearest one that does; Corrupt for temporary,
    uncommitted and half-written ones.
    """
    at = place(path)
    try:
        if at.name == "latest" and not at.exists():
            return _newest(at.parent)
        if not at.exists():
            raise NotFound(f"{at}: no such directory", hint=_similar(at))
        if not at.is_dir():
            refuse_file(at)
            raise NotFound(f"{at}: a file; a checkpoint is a directory", hint=_checkpoint_above(at))
        return _at_directory(at)
    except PermissionError as error:
        raise StorageError(f"{at}: permission denied", details=(str(error),)) from error
    except OSError as error:
        raise NotFound(f"{at}: cannot be opened", details=(str(error),)) from error


def _at_directory(at: Place, *, or_root: bool = True) -> Location:
    names = names_in(at)
    _refuse_uncommitted(at, names)
    if _is_item(at):
        return _item(at)
    for each in FORMATS.values():
        if (found := each.find(at, names)) is not None:
            return found
    if or_root and STEP_METADATA not in names and _steps(at, names):
        # Whatever else lies next to them.
        return _newest(at)
    items = _items(at, names)
    if items:
        return _step_directory(at, items)
    refuse_directory(at, names)
    _refuse_bare_array(at, names)
    if STEP_METADATA in names or _half_written(at, names):
        raise Corrupt(f"{at}: a checkpoint without its index", details=(_what_lacks(at, names),))
    refuse_files_in(at, names)
    raise NotFound(f"{at}: no checkpoint", hint=_checkpoint_above(at) or _checkpoints_below(at))


def _refuse_bare_array(at: Place, names: set[str]) -> None:
    """Raises Incompatible for a database of one array, which Orbax's ArrayCheckpointHandler calls `checkpoint`."""
    if MANIFEST in names:
        keys = Files(ocdbt(str(at)), str(at)).names
        if keys and all(key.startswith("checkpoint/") for key in keys):
            refuse_directory(at, {"checkpoint"})


def _refuse_uncommitted(at: Place, names: set[str]) -> None:
    if unfinished(names):
        hint = "run the command that was writing it again, with --resume"
        raise Corrupt(f"{at}: never committed", details=("a write of fusectl that did not finish",), hint=hint)
    if _TEMPORARY.search(at.name):
        raise Corrupt(f"{at}: the temporary directory of a write that did not finish", hint="use a committed step")
    if STEP_METADATA in names:
        try:
            times = parsed(read_small(at / STEP_METADATA, LARGEST_STEP_BYTES))
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{at / STEP_METADATA}: not JSON", details=(str(error),)) from error
        if isinstance(times, dict) and times.get("init_timestamp_nsecs") and not times.get("commit_timestamp_nsecs"):
            raise Corrupt(f"{at}: never committed", details=(f"{STEP_METADATA} has no commit timestamp",))
        if COMMITTED not in names and any((at / n / COMMITTED).is_file() for n in _items(at, names)):
            # Orbax >= 0.12.3 marks items first and the step last. What has no metadata of a step is none.
            raise Corrupt(f"{at}: never committed", details=(f"its items have {COMMITTED}, the step has not",))
    if "manifest.ocdbt" not in names and any(n.startswith("ocdbt.process_") for n in names):
        raise Corrupt(f"{at}: never committed", details=("the OCDBT databases of its writers were not merged",))


def _is_item(at: Place) -> bool:
    """Whether a directory has one of Orbax's indexes: `_METADATA`, or before 0.4.3 a tree in `checkpoint`."""
    if (at / ORBAX_INDEX).is_file():
        return True
    return _PACKED.match(head(at / PACKED_INDEX, 1)) is not None and not is_t5x(at)


def _items(at: Place, names: set[str]) -> list[str]:
    """The items of a step; in a root, what looks like one is a step that was saved without items."""
    in_root = STEP_METADATA not in names
    return [n for n in sorted(names) if not (in_root and STEP.fullmatch(n)) and _is_item(at / n)]


def _chosen(items: list[str]) -> str | None:
    """The item that is meant where a step is named: the best known one, or the only one."""
    return next((name for name in _ITEMS if name in items), items[0] if len(items) == 1 else None)


def _item(at: Place) -> Location:
    home, own = at.parent, (at / STEP_METADATA).is_file()
    if not (home / STEP_METADATA).is_file() and (own or not STEP.fullmatch(home.name)):
        # Saved by itself; also into the directory of a step, as `DIR/0/items`.
        return Location(
            at,
            at,
            FormatName.ORBAX,
            step=step_of(at.name) if STEP.fullmatch(at.name) or not own else step_of(home.name),
        )
    _refuse_uncommitted(home, names_in(home))
    by_home = _chosen(_items(home, names_in(home))) == at.name
    return Location(at, home, FormatName.ORBAX, item=at.name, step=_numbered(home.name), by_home=by_home)


def _step_directory(at: Place, items: list[str]) -> Location:
    chosen = _chosen(items)
    if chosen is None:
        raise NotFound(f"{at}: several items: {', '.join(items)}", hint=f"name one, such as {at / items[0]}")
    _refuse_uncommitted(at / chosen, names_in(at / chosen))
    if (at / chosen / STEP_METADATA).is_file() and not (at / STEP_METADATA).is_file():
        return _item(at / chosen)
    return Location(at / chosen, at, FormatName.ORBAX, item=chosen, step=_numbered(at.name))


def _steps(root: Place, names: set[str]) -> dict[str, int]:
    """The steps in a root, by the names of their directories: `20`, `checkpoint_20`, or all with one `step_prefix`."""
    steps = {name: int(found.group(1)) for name in names if (found := STEP.fullmatch(name))}
    if steps:
        return steps
    prefixed = {name: found for name in names if (found := PREFIXED.fullmatch(name)) and _is_step(root / name)}
    one = len({found.group(1) for found in prefixed.values()}) == 1
    return {name: int(found.group(2)) for name, found in prefixed.items()} if one else {}


def _is_step(at: Place) -> bool:
    """Whether a directory is a step of a manager's: it has items. What has an index itself was saved without one."""
    return at.is_dir() and not _is_item(at) and bool(_items(at, names_in(at)))


def _newest(root: Place) -> Location:
    if not root.is_dir():
        raise NotFound(f"{root}: no such directory")
    found = _steps(root, names_in(root))
    steps = sorted(((number, root / name) for name, number in found.items() if (root / name).is_dir()), reverse=True)
    notes: list[str] = []
    for _, step in steps:
        try:
            location = _at_directory(step, or_root=False)
        except FusectlError as error:
            notes.append(f"skipped {step.name}: {'; '.join(error.details) or error.message}")
            continue
        notes.append(f"{root}: using {step.name}, the newest committed step")
        return replace(location, notes=tuple(notes))
    refuse_files_in(root, names_in(root))
    raise NotFound(f"{root}: no committed step", details=tuple(notes), hint=_checkpoints_below(root))


def names_in(at: Place) -> set[str]:
    """The names of what is in a directory."""
    return {child.name for child in at.iterdir()}


def unfinished(names: set[str]) -> bool:
    """Whether a directory with these names in it is one that fusectl has not written to the end.

    >>> unfinished({"fusectl-journal.jsonl", "0.0"}), unfinished({"fusectl-journal.jsonl", "checkpoint"})
    (True, False)
    """
    return not names.isdisjoint({JOURNAL, LEASE}) and names.isdisjoint(COMPLETING)


def _numbered(name: str) -> int | None:
    """The number of a step that a manager has named, with a prefix or without."""
    found = PREFIXED.fullmatch(name)
    return int(found.group(2)) if found else int(name) if name.isdecimal() else None


def _half_written(at: Place, names: set[str]) -> bool:
    arrays = {".zarray", "zarr.json"}
    inside_array = bool(names & arrays)
    return not inside_array and (
        "manifest.ocdbt" in names
        or any(n.startswith("target.") for n in names)
        or any((at / n / "manifest.ocdbt").is_file() for n in names if not STEP.fullmatch(n))
    )


def _what_lacks(at: Place, names: set[str]) -> str:
    if any(n.startswith("target.") for n in names):
        return f"arrays of T5X, but no file `{T5X_INDEX}`"
    return f"no `{ORBAX_INDEX}` in {at} or its items"


def is_checkpoint(at: Place) -> bool:
    """Whether a directory has the looks of a checkpoint: a step or an item, sound or not."""
    return (
        (at / ORBAX_INDEX).is_file()
        or any((at / name).is_file() for name in COMPLETING - {COMMITTED})
        or (at / STEP_METADATA).is_file()
        or any(child.is_dir() and (child / ORBAX_INDEX).is_file() for child in at.iterdir())
    )


def _checkpoint_above(at: Place) -> str | None:
    """The hint at the checkpoint that a path leads into; another one that lies there by chance is not meant."""
    above: list[Place] = list(at.parents)
    for parent in above[:3]:
        if _is_item(parent) or is_t5x(parent) or (parent / STEP_METADATA).is_file():
            return f"one level too deep? the checkpoint is {parent}"
    return None


def _directories(at: Place) -> list[Place]:
    try:
        return sorted((p for p in at.iterdir() if p.is_dir()), key=str)[:100]
    except OSError:
        return []


def _below(at: Place) -> Iterator[Place]:
    for child in _directories(at):
        yield child
        yield from _directories(child)


def _checkpoints_below(at: Place) -> str | None:
    found = [str(p) for p in _below(at) if not _TEMPORARY.search(p.name) and is_checkpoint(p)]
    return f"one level too high? there is {' and '.join(found[:3])}" if found else None


def _similar(at: Place) -> str | None:
    if not at.parent.is_dir():
        return None
    import difflib

    near = difflib.get_close_matches(at.name, names_in(at.parent), n=2)
    return f"did you mean {' or '.join(str(at.parent / n) for n in near)}?" if near else None
