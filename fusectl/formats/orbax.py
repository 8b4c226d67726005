"""Orbax's item directories: an index next to arrays in zarr v2 or v3, plain or in an OCDBT database.

    20/                         step: _CHECKPOINT_METADATA, commit_success.txt
      state/                    item: _METADATA, commit_success.txt, and
        manifest.ocdbt d/       one OCDBT database, or without OCDBT
        target.token_embedder.embedding/{.zarray,0.0}
        _strings.json           the leaves that are strings
        checkpoint              the leaves that were saved with aggregate=True, in msgpack (0.4.3 to 0.5.20)

`_METADATA` is a JSON tree. Before 0.4.3 there was none: the msgpack tree in `checkpoint` is the index, and names the
arrays' directories. Keys may contain `.` and `/`, so paths come from the index's keys, never from splitting names.
Sources: orbax/checkpoint/_src/metadata/{tree,step}.py, whose classes write that JSON; StringHandler in
_src/serialization/type_handlers.py; utils.py (`leaf_placeholder`) of 0.2.7.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, FusectlError, Incompatible, StorageError
from fusectl.families.kinds import Trainer
from fusectl.formats.flaxpack import CHUNKED, as_array, is_spec, leaves_of, node_of, read_tree, unchunked
from fusectl.formats.format import Format, Written
from fusectl.formats.kinds import FormatName
from fusectl.formats.names import ARRAY_METADATAS, COMMITTED, ORBAX_INDEX, PACKED_INDEX, STEP_METADATA, STRINGS
from fusectl.formats.objects import Place, read_small
from fusectl.formats.record import Record
from fusectl.formats.store import MANIFEST, Files, directory, ocdbt
from fusectl.formats.tree import STRING, Checkpoint, Key, Leaf, Location, Node, array_directory, stored_arrays, told
from fusectl.formats.zarr import METADATA_FILE
from fusectl.system.jsontree import parsed


# Fifty thousand tensors.
LARGEST_INDEX_BYTES = 16 << 20

HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
# With this type a restore without a target gives numpy arrays on any number of devices, without `_sharding`.
NUMPY = "np.ndarray"
_RANDOM_KEY = "random_key_impl"
# What stands in the file `checkpoint` for a leaf with an array of its own, before that one's directory.
_PLACEHOLDER = re.compile("PLACEHOLDER://|AGGREGATED://")
_BESIDE_ARRAYS = frozenset(
    {ORBAX_INDEX, PACKED_INDEX, STRINGS, MANIFEST, COMMITTED, STEP_METADATA, "_sharding", "array_metadatas"}
)
_ARRAYS = frozenset({NUMPY, "jax.Array", "scalar", "int", "float"})


@dataclass(frozen=True, slots=True)
class Orbax(Format):
    """One of Orbax's layouts."""

    kind: ClassVar[FormatName] = FormatName.ORBAX
    index: ClassVar[str] = ORBAX_INDEX
    completing: ClassVar[frozenset[str]] = frozenset({COMMITTED})

    @property
    def reserved(self) -> Collection[str]:
        """See Format; arrays in a database have names that no file shares."""
        return set() if self.ocdbt else _BESIDE_ARRAYS

    def is_read_by(self, trainer: str) -> bool:
        """See Format: T5X opens zarr 2 only.

        Measured with T5X of 2026-04 on Orbax 0.12.8, which stops at the missing `.zarray` of zarr 3.
        """
        return self.zarr == 2 or trainer != Trainer.T5X

    def open(
        self, location: Location, record: Record | None, fault: Callable[[FusectlError], None] | None = None
    ) -> Checkpoint:
        """See Format."""
        return open_orbax(location, record, fault)

    def problems(self, checkpoint: Checkpoint, notes: list[str]) -> Iterator[str]:
        """See Format."""
        yield from _commit_problems(checkpoint, notes)
        yield from _listed_problems(checkpoint)

    def closing_files(self, written: Written) -> dict[str, bytes]:
        """See Format."""
        form = Form(self.zarr, in_ocdbt=self.ocdbt, sparse=written.sparse)
        below = f"{written.item}/" if written.item else ""
        keys, texts = array_metadatas(written.leaves.values()), strings(written.nodes)
        files = {
            STEP_METADATA: step_metadata(written.item, written.started_ns, written.custom),
            **({f"{below}{ARRAY_METADATAS}": keys} if keys is not None else {}),
            **({f"{below}{STRINGS}": texts} if texts is not None else {}),
            f"{below}{ORBAX_INDEX}": item_metadata(written.leaves.values(), written.nodes, form),
        }
        if written.item:
            files[f"{below}{COMMITTED}"] = marker(written.final / written.item)
        files[COMMITTED] = marker(written.final)
        return files

    def names(self, arrays: Collection[str], item: str | None) -> set[str]:
        """See Format."""
        inside = {ORBAX_INDEX, STRINGS, ARRAY_METADATAS.split("/", 1)[0], *({MANIFEST, "d"} if self.ocdbt else arrays)}
        return {COMMITTED, STEP_METADATA, *({item} if item else inside)}


FORMATS = (
    Orbax(FormatName.ORBAX_OCDBT_ZARR3, "Orbax: OCDBT + zarr v3", 3, ocdbt=True),
    Orbax(FormatName.ORBAX_OCDBT_ZARR2, "Orbax: OCDBT + zarr v2", 2, ocdbt=True),
    Orbax(FormatName.ORBAX_ZARR2, "Orbax: zarr v2 in plain directories", 2, ocdbt=False),
    Orbax(FormatName.ORBAX_ZARR3, "Orbax: zarr v3 in plain directories", 3, ocdbt=False),
)


def open_orbax(
    location: Location, record: Record | None, fault: Callable[[FusectlError], None] | None = None
) -> Checkpoint:
    """The checkpoint at a location of kind `orbax`.

    With `fault` it is told of tensors without sound metadata, which are left out; without it the first one is raised.
    """
    where, at = str(location.home), str(location.index)
    meta = _read_metadata(location.index / ORBAX_INDEX) if (location.index / ORBAX_INDEX).is_file() else None
    in_ocdbt = (location.index / MANIFEST).is_file()
    files = Files(ocdbt(at) if in_ocdbt else directory(at), where)
    packed = location.index / PACKED_INDEX
    tree = _read_packed(packed) if packed.is_file() or meta is None else None
    random_keys = _random_keys(location.index)
    leaves: dict[str, Leaf] = {}
    arrays: dict[str, tuple[tuple[Key, ...], str]] = {}
    nodes: list[Node] = []
    seen: dict[str, None] = {}
    listed = _entries(tree, location.index, files) if meta is None else _listed(meta, tree, location.index, where)
    for keys, found in listed:
        name = "/".join(key.name for key in keys)
        with told(fault):
            if isinstance(found, Lost):
                raise Corrupt(f"{where}: {name}: {found.why}")
            if not keys and not isinstance(found, Node):
                raise Incompatible(f"{where}: one bare array instead of a tree", details=("it has no name",))
            if name in seen:
                raise Corrupt(f"{where}: two leaves are called {name}", details=("keys that contain slashes collide",))
            seen[name] = None
            if isinstance(found, Node):
                nodes.append(found)
            elif isinstance(found, str):
                arrays[name] = (keys, found)
            else:
                leaves[name] = Leaf(name, keys, found.shape, found.dtype.name, value=found)
    if meta is not None and tree is not None:
        _require_named(tree, seen, where, fault)
    _require_one_each({name: base for name, (_, base) in arrays.items()}, where, fault)
    zarr = 3 if any(name.endswith("/" + METADATA_FILE[3]) for name in files.names) else 2
    file_of = {name: base for name, (_, base) in arrays.items()}
    for name, stored in stored_arrays(files, file_of, zarr, record, fault).items():
        keys, base = arrays[name]
        store = ocdbt(at, base + "/") if in_ocdbt else directory(f"{at}/{base}")
        random_key = random_keys.get(".".join(key.name for key in keys))
        leaves[name] = Leaf(name, keys, stored.shape, stored.dtype, stored=stored, store=store, random_key=random_key)
    layout = f"orbax-ocdbt-zarr{zarr}" if in_ocdbt else f"orbax-zarr{zarr}"
    return Checkpoint(
        location,
        layout,
        {name: leaves[name] for name in seen if name in leaves},
        files=files,
        file_of=file_of,
        nodes=tuple(nodes),
        # Without the flag, Orbax before 0.5 or another writer left chunks of zeros out.
        lenient=meta is None or not meta.get("store_array_data_equal_to_fill_value", False),
        record=record,
        custom=_custom_metadata(location.home),
    )


@dataclass(frozen=True, slots=True)
class Lost:
    """A leaf that an index names and whose value is nowhere."""

    why: str


# What an index says of a leaf: the directory of its array, its value, or that it is none.
Found = str | npt.NDArray[Any] | Node | Lost


def _listed(meta: Mapping[str, Any], packed: Any, index: Place, where: str) -> Iterator[tuple[tuple[Key, ...], Found]]:
    """The leaves that a `_METADATA` lists. `packed` is the tree of the file `checkpoint`, None where there is none:
    Orbax 0.4.3 to 0.5.20 kept in it what was saved with `SaveArgs(aggregate=True)`.
    """
    texts: Any = None
    # A tree of a thousand leaves has ten thousand keys, and some fifty different ones.
    key = cache(Key)
    for entry in meta["tree_metadata"].values():
        try:
            keys = tuple(key(str(k["key"]), int(k["key_type"])) for k in entry["key_metadata"])
            value = entry["value_metadata"]
            value_type, skipped = str(value["value_type"]), bool(value.get("skip_deserialize", False))
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{where}/{ORBAX_INDEX}: an entry that makes no sense", details=(repr(error),)) from error
        if skipped:
            yield keys, _aggregated(keys, value_type, packed)
        elif value_type in _ARRAYS:
            yield keys, array_directory(keys, where) if keys else ""
        elif value_type == STRING:
            texts = _texts(index / STRINGS) if texts is None else texts
            text = _at_pointer(texts, ".".join(key.name for key in keys))
            yield keys, Node(keys, STRING, text) if isinstance(text, str) else Lost(f"`{STRINGS}` does not contain it")
        else:
            yield keys, Node(keys, value_type)


def _aggregated(keys: tuple[Key, ...], value_type: str, packed: Any) -> Found:
    """What an entry stands for that is no array of its own: an empty node, or a value in the file `checkpoint`."""
    node = Node(keys, value_type)
    try:
        for key in keys:
            packed = packed[int(key.name)] if isinstance(packed, list | tuple) else packed[key.name]
    except (LookupError, TypeError, ValueError):
        if node.is_empty or value_type not in {*_ARRAYS, STRING}:
            return node
        return Lost(f"kept in the file `{PACKED_INDEX}`, which has no such leaf")
    found = _leaf(keys, packed)
    if isinstance(found, str):
        # From 0.5.20 on empty nodes have placeholders, too.
        return node if node.is_empty else Lost(f"the file `{PACKED_INDEX}` has only a placeholder for it")
    # The index knows kinds better: an empty tuple is None in that file.
    return node if isinstance(found, Node) and found.is_empty and node.is_empty else found


def _entries(packed: Any, index: Place, files: Files) -> Iterator[tuple[tuple[Key, ...], Found]]:
    """The leaves of the tree in a file `checkpoint`, as Orbax before 0.4.3 has it, which wrote no `_METADATA`.

    Raises Incompatible for arrays in databases of their own.
    """
    # Wherever the first of them should be, and not next to the index.
    texts = [_texts(index / name) for name in files.names if name.rpartition("/")[2] == STRINGS]
    for keys, value in leaves_of(packed, is_spec):
        if isinstance(value, Mapping) and value:
            yield keys, Lost("an array's spec of T5X's, in an index without its version")
            continue
        found = _leaf(keys, value)
        if isinstance(found, str):
            array_directory((Key(found),), str(index))
            text = next((text for each in texts if isinstance(text := _at_pointer(each, found), str)), None)
            _require_one_database(index, found)
            found = found if text is None else Node(keys, STRING, text)
        yield keys, found


def _require_one_database(index: Place, base: str) -> None:
    """Raises Incompatible for an array whose name has slashes and which has a database of its own for them."""
    parent = base.rpartition("/")[0]
    if parent and (index / parent / MANIFEST).is_file():
        raise Incompatible(
            f"{index}: {base} lies in a database of its own, {parent}",
            details=("Orbax before 0.4 with OCDBT made one for every name with a slash",),
            hint="restore it with Orbax 0.3, which wrote it, and save it with a newer one",
        )


def _leaf(keys: tuple[Key, ...], value: Any) -> Found:
    """What a leaf in the file `checkpoint` stands for."""
    if isinstance(value, str) and (placeholder := _PLACEHOLDER.match(value)):
        return value[placeholder.end() :]
    if isinstance(value, Mapping) and CHUNKED in value:
        return unchunked(value, "/".join(key.name for key in keys))
    if isinstance(value, Mapping | list | tuple) and value:
        return Lost("a container stands where its value should")
    array = as_array(value)
    return array if array is not None else node_of(keys, value)


def _require_named(
    packed: Any, listed: Collection[str], where: str, fault: Callable[[FusectlError], None] | None
) -> None:
    """Has `fault` told of values in the file `checkpoint` that `_METADATA` does not name, or raises the first."""
    for keys, value in leaves_of(packed, is_spec):
        name = "/".join(key.name for key in keys)
        if name not in listed and isinstance(_leaf(keys, value), np.ndarray):
            with told(fault):
                raise Corrupt(f"{where}: the file `{PACKED_INDEX}` holds {name}, which {ORBAX_INDEX} does not name")


def _require_one_each(file_of: Mapping[str, str], where: str, fault: Callable[[FusectlError], None] | None) -> None:
    """Has `fault` told of leaves that lie in one array, or raises the first: one of them has overwritten the other."""
    names: dict[str, list[str]] = {}
    for name, base in file_of.items():
        names.setdefault(base, []).append(name)
    for base, sharing in names.items():
        if len(sharing) > 1:
            with told(fault):
                raise Corrupt(
                    f"{where}: {' and '.join(sharing)} lie in one array, {base}",
                    details=("their keys contain dots; the one that was saved last has overwritten the other",),
                )


def _read_packed(path: Place) -> Any:
    try:
        return read_tree(path)
    except ValueError as error:
        raise Corrupt(f"{path}: not a tree in msgpack", details=(str(error),)) from error


def _texts(path: Place) -> Any:
    """The tree in the file that holds an item's strings."""
    try:
        return parsed(read_small(path, LARGEST_INDEX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: not JSON", details=(str(error),)) from error


def _at_pointer(tree: Any, pointer: str) -> Any:
    """What stands at a JSON pointer without its first slash (RFC 6901); None for nothing."""
    for part in _parts(pointer):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _parts(pointer: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")]


def _random_keys(index: Place) -> dict[str, str]:
    """The generators of the keys of random numbers in an item, by their parameters' names; none where it has no list.

    It is beside the point of almost all checkpoints: what is wrong in it loses the keys' type, and nothing else.
    """
    try:
        listed = parsed(read_small(index / ARRAY_METADATAS, LARGEST_INDEX_BYTES))["array_metadatas"]
        found = ((each["array_metadata"]["param_name"], each["array_metadata"]["ext_metadata"]) for each in listed)
        return {str(name): str(more[_RANDOM_KEY]) for name, more in found if more and _RANDOM_KEY in more}
    except (OSError, ValueError, LookupError, TypeError, RecursionError, FusectlError):
        return {}


def _custom_metadata(home: Place) -> Mapping[str, Any]:
    """What the trainer has noted of a step."""
    try:
        custom = parsed(read_small(home / STEP_METADATA, LARGEST_INDEX_BYTES))["custom_metadata"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, FusectlError):
        return {}
    return custom if isinstance(custom, dict) else {}


def array_metadatas(leaves: Iterable[Leaf]) -> bytes | None:
    """The list of arrays that Orbax restores as keys of random numbers; None where there are none."""
    listed = [
        {
            "array_metadata": {
                "param_name": ".".join(key.name for key in leaf.keys),
                "write_shape": list(leaf.shape),
                "chunk_shape": list(leaf.chunks),
                "ext_metadata": {_RANDOM_KEY: leaf.random_key},
            }
        }
        for leaf in leaves
        if leaf.random_key is not None
    ]
    return json.dumps({"array_metadatas": listed}).encode() if listed else None


@dataclass(frozen=True, slots=True)
class Form:
    """What `_METADATA` says of all arrays: zarr's version, in a database or not, chunks of zeros left out or not."""

    zarr: int
    in_ocdbt: bool
    sparse: bool


def item_metadata(leaves: Iterable[Leaf], nodes: Iterable[Node], form: Form) -> bytes:
    """The `_METADATA` of an item."""
    tree = {}
    for leaf in leaves:
        tree[_entry_name(leaf.keys)] = _entry(leaf.keys, NUMPY, skip=False)
    for node in nodes:
        tree[_entry_name(node.keys)] = _entry(node.keys, node.value_type, skip=node.is_empty)
    meta = {
        "tree_metadata": tree,
        "use_ocdbt": form.in_ocdbt,
        "use_zarr3": form.zarr == 3,
        "store_array_data_equal_to_fill_value": not form.sparse,
        "custom_metadata": None,
    }
    return json.dumps(meta).encode()


def strings(nodes: Iterable[Node]) -> bytes | None:
    """The file that holds an item's strings; None where there are none."""
    tree: dict[str, Any] = {}
    for node in nodes:
        if node.text is not None:
            *parents, last = _parts(".".join(key.name for key in node.keys))
            inside = tree
            for parent in parents:
                inside = inside.setdefault(parent, {})
            inside[last] = node.text
    return json.dumps(tree).encode() if tree else None


def step_metadata(item: str | None, started_ns: int, custom: Mapping[str, Any]) -> bytes:
    """A `_CHECKPOINT_METADATA`, which names the item's handler and says that the step is committed."""
    meta = {
        "item_handlers": {item: HANDLER} if item else HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": started_ns,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": dict(custom),
    }
    return json.dumps(meta).encode()


def marker(final: Place) -> bytes:
    """The marker without which Orbax >= 0.12.3 may take a directory for a leftover and remove it."""
    return f"Checkpoint commit was successful to {final}".encode()


def _commit_problems(checkpoint: Checkpoint, notes: list[str]) -> Iterator[str]:
    """Files that a commit writes and that are missing; only noted where the writer may have written none."""
    location = checkpoint.location
    if not (location.home / STEP_METADATA).is_file():
        notes.append(f"no {STEP_METADATA}: older versions of Orbax wrote none")
    # That of the step is written last. Not all of Orbax's interfaces mark its items.
    marked = [(at / COMMITTED).is_file() for at in (location.home, location.index)]
    if not any(marked) and checkpoint.record is None:
        notes.append(f"no {COMMITTED}: Orbax before 0.12.3 wrote none, later ones may remove it as a leftover")
    elif not marked[0]:
        yield f"{location.home / COMMITTED}: missing"
    elif not marked[1] and checkpoint.record is not None:
        yield f"{location.index / COMMITTED}: missing"
    writers: list[Place] = sorted(location.index.glob("ocdbt.process_*"), key=str)
    for process in writers:
        if not (process / MANIFEST).is_file():
            yield f"{process}: the database of a writer, without its {MANIFEST}"
            continue
        try:
            lost = Files(ocdbt(str(process)), str(process)).names - checkpoint.files.names
        except FusectlError as error:
            yield f"{error.message}; {'; '.join(error.details)}"
            continue
        if lost:
            yield f"{process}: {len(lost)} files of it are not in the merged database, such as {min(lost)}"


def _listed_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Lists of arrays next to the index that contradict it or the arrays."""
    index = checkpoint.location.index
    names = {at: name for name, at in checkpoint.file_of.items()}
    listing: list[Place] = sorted((index / ARRAY_METADATAS).parent.glob("process_*"), key=str)
    for file in listing:
        try:
            entries = parsed(read_small(file, LARGEST_INDEX_BYTES))["array_metadatas"]
            listed = [(each["array_metadata"]["param_name"], each["array_metadata"]) for each in entries]
            for name, array in listed:
                if name not in names:
                    yield f"{file}: lists {name}, which the index does not name"
                    continue
                # Of one without sound metadata that has been told.
                leaf, chunks = checkpoint.leaves.get(names[name]), tuple(array["chunk_shape"])
                if leaf is not None and leaf.chunks != chunks:
                    yield f"{file}: {name} in chunks of {list(chunks)}, of {list(leaf.chunks)} in its own metadata"
        except (Corrupt, ValueError, LookupError, TypeError, RecursionError) as error:
            yield f"{file}: not a list of arrays; {error}"


def _read_metadata(path: Place) -> dict[str, Any]:
    try:
        meta = parsed(read_small(path, LARGEST_INDEX_BYTES))
    except PermissionError as error:
        raise StorageError(f"{path}: permission denied") from error
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: not JSON", details=(str(error),)) from error
    if not isinstance(meta, dict) or not isinstance(meta.get("tree_metadata"), dict):
        raise Corrupt(f"{path}: not the metadata of an Orbax item", details=("it has no `tree_metadata`",))
    return meta


def _entry_name(keys: tuple[Key, ...]) -> str:
    return str(tuple(key.name for key in keys))


def _entry(keys: tuple[Key, ...], value_type: str, *, skip: bool) -> Mapping[str, Any]:
    return {
        "key_metadata": [{"key": key.name, "key_type": key.kind} for key in keys],
        "value_metadata": {"value_type": value_type, "skip_deserialize": skip},
    }
