"""Flax's msgpack: trees of dictionaries and lists down to arrays, as T5X's index and Orbax's file `checkpoint` are.

    {"params": {"w": <array>, "b": "PLACEHOLDER://params.b"}, "step": 3}

Sources: flax/serialization.py (`_MsgpackExtType`), orbax/checkpoint/msgpack_utils.py, which adds tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, FusectlError, Incompatible, StorageError
from fusectl.formats.objects import Place, read_small
from fusectl.formats.tree import EMPTY_DICT, NONE, SEQUENCE, STRING, Key, Node
from fusectl.formats.zarr import np_dtype
from fusectl.system.memory import available_bytes


# What a tree may claim: a hundred thousand tensors, each with a spec of a dozen entries, and lists that are shapes.
MOST_ENTRIES = 2_000_000
MOST_AXES = 64
# Of a list or tuple in a tree.
MOST_ELEMENTS = 100_000
# How deep tuples may lie in each other.
DEEPEST = 64
CHUNKED = "__msgpack_chunked_array__"
_EMPTY: Mapping[type, str] = {dict: EMPTY_DICT, list: "List", tuple: "Tuple"}


class _Ext(IntEnum):
    ndarray = 1
    complex = 2
    npscalar = 3
    tuple = 4


def read_tree(path: Place) -> Any:
    """The tree in a file of Flax's msgpack: dictionaries, lists, tuples, arrays and what msgpack has itself.

    Raises ValueError for other contents, StorageError where it may not be read.
    """
    try:
        # It may hold arrays of any size.
        raw = read_small(path, available_bytes() // 2)
    except PermissionError as error:
        raise StorageError(f"{path}: permission denied") from error
    try:
        return _unpacked(raw, _Count(), 0)
    except FusectlError:
        raise
    except Exception as error:
        # msgpack documents no common base for what it raises on arbitrary bytes, and the hooks add numpy's.
        raise ValueError(f"{type(error).__name__}: {error}") from error


class _Count:
    """How much a tree claims to hold; raises ValueError for too much."""

    def __init__(self) -> None:
        self._entries = 0

    def __call__(self, node: Any) -> Any:
        self._entries += len(node) + 1
        if self._entries > MOST_ENTRIES:
            raise ValueError(f"more than {MOST_ENTRIES:,} entries")
        return node


def _unpacked(raw: bytes, counted: _Count, depth: int) -> Any:
    if depth > DEEPEST:
        # Each of them is a call of msgpack's from C, whose stack has no guard.
        raise ValueError(f"tuples in tuples, more than {DEEPEST} deep")

    def from_ext(code: int, data: bytes) -> Any:
        return tuple(_unpacked(data, counted, depth + 1)) if code == _Ext.tuple else _from_ext(code, data)

    return msgpack.unpackb(
        raw,
        ext_hook=from_ext,
        object_hook=counted,
        list_hook=counted,
        strict_map_key=False,
        max_array_len=MOST_ELEMENTS,
        max_map_len=MOST_ENTRIES // 10,
    )


def as_array(value: Any) -> npt.NDArray[Any] | None:
    """A leaf of a tree as an array: numbers that msgpack holds itself become scalars; None for what is no number."""
    if isinstance(value, np.ndarray):
        return value
    return np.asarray(value) if isinstance(value, bool | int | float | complex) else None


def leaves_of(
    tree: Any, is_leaf: Callable[[Mapping[Any, Any]], bool], keys: tuple[Key, ...] = ()
) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """The leaves of a tree, each with its keys: what is no container, what is an empty one, and the dictionaries that
    are leaves themselves. Arrays that Flax has split are put together.
    """
    if isinstance(tree, Mapping) and CHUNKED in tree:
        yield keys, unchunked(tree, "/".join(key.name for key in keys))
    elif isinstance(tree, Mapping) and tree and not is_leaf(tree):
        for key, value in tree.items():
            yield from leaves_of(value, is_leaf, (*keys, Key(str(key))))
    elif isinstance(tree, list | tuple) and tree:
        for i, value in enumerate(tree):
            yield from leaves_of(value, is_leaf, (*keys, Key(str(i), SEQUENCE)))
    else:
        yield keys, tree


def is_spec(node: Mapping[Any, Any]) -> bool:
    """Whether a dictionary is what T5X keeps in place of an array: the spec of its store."""
    return "driver" in node and "metadata" in node


def node_of(keys: tuple[Key, ...], value: Any) -> Node:
    """The node that a leaf is which is no array: an empty container, a string, or something that nobody can carry."""
    if isinstance(value, str):
        return Node(keys, STRING, value)
    return Node(keys, NONE if value is None else _EMPTY.get(type(value), type(value).__name__))


def unchunked(value: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
    """The array that Flax split because it has more than 1 GiB: {'shape': {'0': …}, 'chunks': {'0': …}}.

    Raises Corrupt for pieces that do not fit together.
    """
    try:
        shape = tuple(value["shape"][str(i)] for i in range(len(value["shape"])))
        return np.concatenate([value["chunks"][str(i)] for i in range(len(value["chunks"]))]).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{name}: a chunked array that does not fit together", details=(str(error),)) from error


def to_ext(value: Any) -> msgpack.ExtType:
    """An array as an extension of msgpack's; raises TypeError for anything else."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"cannot pack {type(value).__name__}")
    packed = msgpack.packb((value.shape, value.dtype.name, value.tobytes("C")), use_bin_type=True)
    return msgpack.ExtType(_Ext.ndarray, packed)


def _from_ext(code: int, data: bytes) -> Any:
    if code == _Ext.complex:
        real, imaginary = msgpack.unpackb(data)
        return np.array(complex(real, imaginary))
    if code in {_Ext.ndarray, _Ext.npscalar}:
        shape, dtype, buffer = msgpack.unpackb(data, max_array_len=MOST_AXES, max_map_len=0, list_hook=_flat)
        if not hasattr(ml_dtypes, dtype) and np.dtype(dtype).kind not in "biufc":
            raise Incompatible(f"an array of dtype {dtype} in msgpack, which no trainer restores")
        # A view of the bytes that were read: a lying shape cannot allocate anything.
        return np.frombuffer(buffer, dtype=np_dtype(dtype)).reshape(shape)
    raise ValueError(f"msgpack extension {code}")


def _flat(values: list[Any]) -> list[Any]:
    if any(isinstance(value, list) and value and isinstance(value[0], list) for value in values):
        raise ValueError("lists in lists of lists")
    return values
