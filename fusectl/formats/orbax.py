"""Orbax's item directories: `_METADATA`, a JSON tree, beside arrays in zarr v2 or v3, plain or in an OCDBT database.

    20/                         step: _CHECKPOINT_METADATA, commit_success.txt
      state/                    item: _METADATA, commit_success.txt, and
        manifest.ocdbt d/       one OCDBT database, or without OCDBT
        target.token_embedder.embedding/{.zarray,0.0}

Keys may contain `.` and `/`, so paths come from the metadata's key lists, never from splitting names.
Source: orbax/checkpoint/_src/metadata/{tree,step}.py; the JSON is what those classes write.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusectl.errors import Corrupt, FusectlError, Incompatible, StorageError
from fusectl.formats.locate import ARRAY_METADATAS, ORBAX_INDEX, STEP_METADATA
from fusectl.formats.objects import Place, read_small
from fusectl.formats.store import MANIFEST, Files, directory, ocdbt
from fusectl.formats.tree import Checkpoint, EmptyNode, Key, Leaf, Location, array_directory, stored_arrays
from fusectl.formats.zarr import METADATA_FILE
from fusectl.jsontree import parsed
from fusectl.record import Record


# Fifty thousand tensors.
LARGEST_INDEX_BYTES = 16 << 20

HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
# With this type a restore without a target gives numpy arrays on any number of devices, without `_sharding`.
NUMPY = "np.ndarray"
_RANDOM_KEY = "random_key_impl"
_ARRAYS = frozenset({NUMPY, "jax.Array", "scalar", "int", "float"})


def open_orbax(
    location: Location, record: Record | None, fault: Callable[[FusectlError], None] | None = None
) -> Checkpoint:
    """The checkpoint at a location of kind `orbax`.

    With `fault` it is told of tensors without sound metadata, which are left out; without it the first one is raised.
    """
    where = str(location.home)
    meta = _read_metadata(location.index / ORBAX_INDEX)
    in_ocdbt = (location.index / MANIFEST).is_file()
    at = str(location.index)
    files = Files(ocdbt(at) if in_ocdbt else directory(at), where)
    arrays: dict[str, tuple[tuple[Key, ...], str]] = {}
    empty: list[EmptyNode] = []
    for entry in meta["tree_metadata"].values():
        try:
            keys = tuple(Key(str(k["key"]), int(k["key_type"])) for k in entry["key_metadata"])
            value = entry["value_metadata"]
            value_type = str(value["value_type"])
            skipped = bool(value.get("skip_deserialize", False))
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{where}/{ORBAX_INDEX}: an entry that makes no sense", details=(repr(error),)) from error
        name = "/".join(key.name for key in keys)
        if skipped:
            empty.append(EmptyNode(keys, value_type))
        elif value_type not in _ARRAYS and fault is not None:
            # It is not known to be wrong.
            continue
        elif value_type not in _ARRAYS:
            raise Corrupt(f"{where}: {name}: a leaf of type {value_type}, which fusectl does not know")
        elif not keys:
            raise Incompatible(f"{where}: one bare array instead of a tree", details=("it has no name",))
        elif name in arrays:
            raise Corrupt(f"{where}: two leaves are called {name}", details=("keys that contain slashes collide",))
        else:
            arrays[name] = (keys, array_directory(keys, where))
    zarr = 3 if any(name.endswith("/" + METADATA_FILE[3]) for name in files.names) else 2
    file_of = {name: base for name, (_, base) in arrays.items()}
    leaves: dict[str, Leaf] = {}
    random_keys = _random_keys(location.index)
    for name, stored in stored_arrays(files, file_of, zarr, record, fault).items():
        keys, base = arrays[name]
        store = ocdbt(at, base + "/") if in_ocdbt else directory(f"{at}/{base}")
        random_key = random_keys.get(".".join(key.name for key in keys))
        leaves[name] = Leaf(name, keys, stored.shape, stored.dtype, stored=stored, store=store, random_key=random_key)
    layout = ("orbax" if zarr == 3 else "orbax-ocdbt-zarr2") if in_ocdbt else f"orbax-zarr{zarr}"
    return Checkpoint(
        location,
        layout,
        leaves,
        files=files,
        file_of=file_of,
        empty=tuple(empty),
        # Without the flag, Orbax before 0.5 or another writer left chunks of zeros out.
        lenient=not meta.get("store_array_data_equal_to_fill_value", False),
        record=record,
        custom=_custom_metadata(location.home),
    )


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


def item_metadata(leaves: Iterable[Leaf], empty: Iterable[EmptyNode], form: Form) -> bytes:
    """The `_METADATA` of an item."""
    tree = {}
    for leaf in leaves:
        tree[_entry_name(leaf.keys)] = _entry(leaf.keys, NUMPY, skip=False)
    for node in empty:
        tree[_entry_name(node.keys)] = _entry(node.keys, node.value_type, skip=True)
    meta = {
        "tree_metadata": tree,
        "use_ocdbt": form.in_ocdbt,
        "use_zarr3": form.zarr == 3,
        "store_array_data_equal_to_fill_value": not form.sparse,
        "custom_metadata": None,
    }
    return json.dumps(meta).encode()


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
