"""Whether a format has a place for every tensor and node of a tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fusectl.formats.flaxpack import CHUNKED
from fusectl.formats.format import Format
from fusectl.formats.tree import SEQUENCE, Key, Node, array_directory


# Of a file, in bytes, on every usual file system.
LONGEST_NAME = 255


def misplaced(arrays: Mapping[str, tuple[Key, ...]], nodes: Sequence[Node], out_format: Format) -> Iterator[str]:
    """Tensors, by their names and keys, and nodes that have no place of their own in the format; a sentence each."""
    keys = [*arrays.values(), *(node.keys for node in nodes)]
    names = Counter("/".join(key.name for key in each) for each in keys)
    directories = Counter(array_directory(each, name) for name, each in arrays.items())
    yield from (f"{name}: it stands there twice" for name, n in names.items() if n > 1)
    yield from (f"{name}: the directory of two tensors" for name, n in directories.items() if n > 1)
    for name in directories:
        parts = name.split("/")
        if parts[0] in out_format.reserved or (not out_format.ocdbt and parts[0].startswith("fusectl")):
            yield f"{name}: a name of the format's own"
        if not (out_format.ocdbt or all(map(_names_directory, parts))):
            yield f"{name[:40]}: no name for a directory"
        outer = ("/".join(parts[:i]) for i in range(1, len(parts)))
        yield from (f"{name}: inside the array {other}" for other in outer if other in directories)
    if out_format.keeps_tree:
        yield from _gaps(keys)
        yield from _strings_in_strings(node for node in nodes if node.text is not None)
    else:
        yield from _of_a_dictionary(names)


def _names_directory(part: str) -> bool:
    """Whether file systems, and the stores on them, take a name for one."""
    return len(part.encode()) <= LONGEST_NAME and not {"\0", "\\"} & set(part)


def _of_a_dictionary(names: Iterable[str]) -> Iterator[str]:
    """What a tree of dictionaries whose keys hold no slash has no place for, and what Flax would take for more."""
    nodes: dict[str, set[str]] = {}
    for name in names:
        parts = name.split("/")
        for i, part in enumerate(parts):
            nodes.setdefault("/".join(parts[:i]), set()).add(part)
    yield from (f"{name}: a leaf and a node of the tree" for name in names if name in nodes)
    for node, inside in nodes.items():
        if {"driver", "metadata"} <= inside or CHUNKED in inside:
            yield f"{node}: its keys are those by which Flax and T5X tell an array"


def _strings_in_strings(nodes: Iterable[Node]) -> Iterator[str]:
    """Strings that Orbax's one file of them, which goes by their keys joined by dots, has one place for."""
    places = Counter(".".join(key.name for key in node.keys) for node in nodes)
    yield from (f"{place}: the place of two strings" for place, n in places.items() if n > 1)
    for place in places:
        parts = place.split("/")
        outer = ("/".join(parts[:i]) for i in range(1, len(parts)))
        yield from (f"{place}: inside the string {other}" for other in outer if other in places)


def _gaps(keys: Iterable[tuple[Key, ...]]) -> Iterator[str]:
    """Lists and tuples of which not all elements are there."""
    positions: dict[tuple[Key, ...], set[int]] = {}
    for each in keys:
        for i, key in enumerate(each):
            if key.kind == SEQUENCE:
                positions.setdefault(each[:i], set()).add(int(key.name))
    for node, found in positions.items():
        if found != set(range(len(found))):
            yield f"{'/'.join(key.name for key in node)}: a list or tuple without some of its elements"
