"""T5X's own format: `checkpoint`, a msgpack tree, beside one directory of zarr v2 per large tensor.

    checkpoint_20/
      checkpoint                                 {"version": 3, "optimizer": {"target": …, "state": …}}
      target.encoder.layers_0.mlp.wo.kernel/     .zarray 0.0 0.1 …

A leaf of the tree is the tensorstore spec of such a directory, or the values themselves (Flax's msgpack extensions).
Sources: t5x/checkpoints.py (version 3), flax/serialization.py (`_MsgpackExtType`).
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, FusectlError, Incompatible, NotFound, StorageError
from fusectl.formats.locate import T5X_INDEX
from fusectl.formats.objects import Place, read_small
from fusectl.formats.store import Files, directory
from fusectl.formats.tree import (
    EMPTY_DICT,
    NONE,
    Checkpoint,
    EmptyNode,
    Leaf,
    Location,
    dict_keys,
    stored_arrays,
    told,
)
from fusectl.formats.zarr import ArrayMetadata, np_dtype
from fusectl.memory import available_bytes
from fusectl.record import Record


VERSION = 3
# What an index may claim: a hundred thousand tensors, each with a spec of a dozen entries, and lists that are shapes.
MOST_ENTRIES = 2_000_000
MOST_AXES = 64
CHUNKED = "__msgpack_chunked_array__"
# Names that T5X stores in the index whatever their size: nothing partitions them.
_INLINED_SLOTS = frozenset({"v_row", "v_col", "count", "step"})


class _Ext(IntEnum):
    ndarray = 1
    complex = 2
    npscalar = 3


def open_t5x(
    location: Location, record: Record | None, fault: Callable[[FusectlError], None] | None = None
) -> Checkpoint:
    """The checkpoint at a location of kind `t5x`; raises Corrupt for an index that contradicts its arrays.

    With `fault` it is told instead of tensors that are contradicted, and of those without metadata; they are left out.
    """
    tree = read_index(location.index / T5X_INDEX)
    where = str(location.home)
    files = Files(directory(str(location.index)), where)
    leaves: dict[str, Leaf] = {}
    specs: dict[str, Mapping[str, Any]] = {}
    empty: list[EmptyNode] = []
    for name, value in _flatten(tree):
        if name in leaves or name in specs:
            raise Corrupt(f"{where}: two leaves are called {name}")
        if isinstance(value, np.ndarray):
            leaves[name] = Leaf(name, dict_keys(name), value.shape, value.dtype.name, value=value)
        elif not value:
            empty.append(EmptyNode(dict_keys(name), NONE if value is None else EMPTY_DICT))
        else:
            specs[name] = value
    file_of = {name: _directory_of(spec, f"{where}: {name}") for name, spec in specs.items()}
    for name, stored in stored_arrays(files, file_of, 2, record, fault).items():
        with told(fault):
            _agree(specs[name], stored, f"{where}: {name}")
            store = directory(str(location.index / file_of[name]))
            leaves[name] = Leaf(name, dict_keys(name), stored.shape, stored.dtype, stored=stored, store=store)
    # T5X itself gives its arrays no fill value, and stores every chunk.
    return Checkpoint(
        location, "t5x", leaves, files=files, file_of=file_of, empty=tuple(empty), lenient=True, record=record
    )


def read_index(path: Place) -> dict[str, Any]:
    """The tree below `optimizer` in a `checkpoint` file: dictionaries down to arrays and specs."""
    try:
        # It may hold arrays of any size.
        raw = read_small(path, available_bytes() // 2)
    except PermissionError as error:
        raise StorageError(f"{path}: permission denied") from error
    entries = 0

    def counted(node: Any) -> Any:
        nonlocal entries
        entries += len(node) + 1
        if entries > MOST_ENTRIES:
            raise ValueError(f"more than {MOST_ENTRIES:,} entries")
        return node

    try:
        tree = msgpack.unpackb(
            raw,
            ext_hook=_from_ext,
            object_hook=counted,
            list_hook=counted,
            strict_map_key=False,
            max_array_len=MOST_AXES,
            max_map_len=MOST_ENTRIES // 10,
        )
    except Exception as error:
        # msgpack documents no common base for what it raises on arbitrary bytes, and the hook below adds numpy's.
        details = (f"{type(error).__name__}: {error}",)
        if any(child.name.startswith("target.") for child in path.parent.iterdir()):
            raise Corrupt(f"{path}: not a msgpack index", details=details) from error
        raise NotFound(f"{path}: not the index of a T5X checkpoint", details=details) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("optimizer"), dict):
        raise NotFound(f"{path}: not the index of a T5X checkpoint", details=("it has no tree `optimizer`",))
    version = tree.get("version")
    if not isinstance(version, int) or version < VERSION - 1:
        raise Incompatible(f"{path}: version {version} of T5X's format", hint="re-save it with T5X; 2 and 3 are read")
    optimizer: dict[str, Any] = tree["optimizer"]
    return optimizer


def new_index(values: Mapping[str, Leaf | npt.NDArray[Any]], empty: Iterable[EmptyNode] = ()) -> bytes:
    """A `checkpoint` file for these tensors and empty nodes; numpy arrays are kept in it."""
    tree: dict[str, Any] = {}
    leaves: dict[str, Any] = {name: _spec(v) if isinstance(v, Leaf) else v for name, v in values.items()}
    nodes: dict[str, Any] = {node.name: None if node.value_type == NONE else {} for node in empty}
    for name, value in sorted({**nodes, **leaves}.items()):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    packed: bytes = msgpack.packb({"version": VERSION, "optimizer": tree}, default=_to_ext, strict_types=True)
    return packed


def kept_in_index(name: str, shape: tuple[int, ...]) -> bool:
    """Whether T5X keeps this tensor in its index: optimizer state that is small or that no mesh axis partitions."""
    if name.startswith("target/"):
        return False
    return shape in {(), (1,)} or name.rsplit("/", 1)[-1] in _INLINED_SLOTS


def _spec(leaf: Leaf) -> dict[str, Any]:
    assert leaf.stored is not None
    compressor = json.loads(leaf.stored.storage.codecs)["compressor"]
    # T5X deletes metadata.chunks and metadata.compressor on restore: both keys must be there.
    return {
        "driver": "zarr",
        "dtype": leaf.dtype,
        "kvstore": {"driver": "file", "path": leaf.name.replace("/", ".") + "/"},
        "metadata": {"chunks": list(leaf.chunks), "compressor": compressor, "shape": list(leaf.shape)},
    }


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, np.ndarray) or value in ({}, None):
            yield name, value
        elif not isinstance(value, Mapping):
            raise Corrupt(f"{name}: a leaf of type {type(value).__name__} in the index")
        elif CHUNKED in value:
            yield name, _unchunk(value, name)
        elif "driver" in value and "metadata" in value:
            yield name, value
        else:
            yield from _flatten(value, f"{name}/")


def _directory_of(spec: Mapping[str, Any], where: str) -> str:
    """The array's directory relative to the checkpoint: gfile and gcs specs mean the same place as file ones."""
    kvstore = spec.get("kvstore")
    # tensorstore < 0.1.14 kept the path at the top.
    path = kvstore.get("path") if isinstance(kvstore, Mapping) and "path" in kvstore else spec.get("path")
    if not isinstance(path, str) or not path:
        raise Corrupt(f"{where}: its spec names no path")
    path = posixpath.normpath(path)
    if path.startswith(("/", "..")):
        raise Corrupt(f"{where}: its path leaves the checkpoint", details=(path,))
    return path


def _agree(spec: Mapping[str, Any], stored: ArrayMetadata, where: str) -> None:
    if spec["driver"] != "zarr":
        raise Corrupt(f"{where}: driver {spec['driver']} in the index; T5X's arrays are zarr")
    shape = spec["metadata"].get("shape")
    if shape is not None and tuple(shape) != stored.shape:
        raise Corrupt(f"{where}: shape {shape} in the index, {list(stored.shape)} in its .zarray")
    dtype = spec.get("dtype")
    if dtype is not None and dtype != stored.dtype:
        raise Corrupt(f"{where}: dtype {dtype} in the index, {stored.dtype} in its .zarray")


def _from_ext(code: int, data: bytes) -> Any:
    if code == _Ext.complex:
        real, imaginary = msgpack.unpackb(data)
        return np.array(complex(real, imaginary))
    if code in {_Ext.ndarray, _Ext.npscalar}:
        shape, dtype, buffer = msgpack.unpackb(data, max_array_len=MOST_AXES, max_map_len=0, list_hook=_flat)
        # A view of the bytes that were read: a lying shape cannot allocate anything.
        return np.frombuffer(buffer, dtype=np_dtype(dtype)).reshape(shape)
    raise ValueError(f"msgpack extension {code}")


def _flat(values: list[Any]) -> list[Any]:
    if any(isinstance(value, list) and value and isinstance(value[0], list) for value in values):
        raise ValueError("lists in lists of lists")
    return values


def _to_ext(value: Any) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"cannot pack {type(value).__name__}")
    packed = msgpack.packb((value.shape, value.dtype.name, value.tobytes("C")), use_bin_type=True)
    return msgpack.ExtType(_Ext.ndarray, packed)


def _unchunk(value: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
    """Flax splits an array of more than 1 GiB: {'shape': {'0': …}, 'chunks': {'0': …}}."""
    try:
        shape = tuple(value["shape"][str(i)] for i in range(len(value["shape"])))
        return np.concatenate([value["chunks"][str(i)] for i in range(len(value["chunks"]))]).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{name}: a chunked array that does not fit together", details=(str(error),)) from error
