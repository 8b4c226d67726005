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
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgpack
import numpy.typing as npt

from fusectl.errors import Corrupt, FusectlError, Incompatible, NotFound
from fusectl.families.kinds import Trainer
from fusectl.formats.flaxpack import as_array, is_spec, leaves_of, node_of, read_tree, to_ext
from fusectl.formats.format import Format, Written
from fusectl.formats.kinds import FormatName
from fusectl.formats.names import T5X_INDEX, step_of
from fusectl.formats.objects import Place, head
from fusectl.formats.record import Record
from fusectl.formats.store import Files, directory
from fusectl.formats.tree import NONE, Checkpoint, Leaf, Location, Node, dict_keys, stored_arrays, told
from fusectl.formats.zarr import ArrayMetadata


VERSION = 3
# How T5X's index begins, which has the name of Orbax's old one: {"version": …
_T5X, _T5X_BYTES = re.compile(rb"[\x81-\x8f]\xa7version"), 9
# Names that T5X stores in the index whatever their size: nothing partitions them.
_INLINED_SLOTS = frozenset({"v_row", "v_col", "count", "step"})


@dataclass(frozen=True, slots=True)
class T5X(Format):
    """T5X's own format."""

    kind: ClassVar[FormatName] = FormatName.T5X
    index: ClassVar[str] = T5X_INDEX
    completing: ClassVar[frozenset[str]] = frozenset({T5X_INDEX})
    reads_left_out: ClassVar[bool] = True
    keeps_tree: ClassVar[bool] = False
    needs_step: ClassVar[bool] = True

    @property
    def reserved(self) -> Collection[str]:
        """See Format."""
        return {T5X_INDEX}

    def is_read_by(self, trainer: str) -> bool:
        """See Format."""
        return trainer == Trainer.T5X

    def keeps_in_index(self, tensor: str, shape: tuple[int, ...]) -> bool:
        """See Format: optimizer state that is small or that no mesh axis partitions."""
        if tensor.startswith("target/"):
            return False
        return shape in {(), (1,)} or tensor.rsplit("/", 1)[-1] in _INLINED_SLOTS

    def find(self, at: Place, names: Collection[str]) -> Location | None:
        """See Format."""
        if T5X_INDEX in names and (is_t5x(at) or any(name.startswith("target.") for name in names)):
            return Location(at, at, self.kind, step=step_of(at.name))
        return None

    def open(
        self, location: Location, record: Record | None, fault: Callable[[FusectlError], None] | None = None
    ) -> Checkpoint:
        """See Format."""
        return open_t5x(location, record, fault)

    def closing_files(self, written: Written) -> dict[str, bytes]:
        """See Format."""
        return {T5X_INDEX: new_index({**written.leaves, **written.kept}, written.nodes)}

    def names(self, arrays: Collection[str], item: str | None) -> set[str]:  # noqa: ARG002
        """See Format."""
        return {T5X_INDEX, *arrays}


FORMATS = (T5X(FormatName.T5X, "T5X legacy: msgpack index + zarr v2", 2, ocdbt=False),)


def is_t5x(at: Place) -> bool:
    """Whether a directory has T5X's index, whose name one of Orbax's old ones has, too."""
    return _T5X.match(head(at / T5X_INDEX, _T5X_BYTES)) is not None


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
    nodes: list[Node] = []
    for keys, value in leaves_of(tree, is_spec):
        name, array = "/".join(key.name for key in keys), as_array(value)
        if name in leaves or name in specs:
            raise Corrupt(f"{where}: two leaves are called {name}")
        if array is not None:
            leaves[name] = Leaf(name, keys, array.shape, array.dtype.name, value=array)
        elif isinstance(value, Mapping) and value:
            specs[name] = value
        else:
            nodes.append(node_of(keys, value))
    file_of = {name: _directory_of(spec, f"{where}: {name}") for name, spec in specs.items()}
    for name, stored in stored_arrays(files, file_of, 2, record, fault).items():
        with told(fault):
            _agree(specs[name], stored, f"{where}: {name}")
            store = directory(str(location.index / file_of[name]))
            leaves[name] = Leaf(name, dict_keys(name), stored.shape, stored.dtype, stored=stored, store=store)
    kinds = record.random_keys if record is not None else {}
    leaves |= {name: replace(leaves[name], random_key=kind) for name, kind in kinds.items() if name in leaves}
    # T5X itself gives its arrays no fill value, and stores every chunk.
    return Checkpoint(
        location, FormatName.T5X, leaves, files=files, file_of=file_of, nodes=tuple(nodes), lenient=True, record=record
    )


def read_index(path: Place) -> dict[str, Any]:
    """The tree below `optimizer` in a `checkpoint` file: dictionaries down to arrays and specs."""
    try:
        tree = read_tree(path)
    except ValueError as error:
        if any(child.name.startswith("target.") for child in path.parent.iterdir()):
            raise Corrupt(f"{path}: not a msgpack index", details=(str(error),)) from error
        raise NotFound(f"{path}: not the index of a checkpoint", details=(str(error),)) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("optimizer"), dict):
        raise NotFound(f"{path}: not the index of a T5X checkpoint", details=("it has no tree `optimizer`",))
    version = tree.get("version")
    if not isinstance(version, int) or version < VERSION - 1:
        raise Incompatible(f"{path}: version {version} of T5X's format", hint="re-save it with T5X; 2 and 3 are read")
    optimizer: dict[str, Any] = tree["optimizer"]
    return optimizer


def new_index(values: Mapping[str, Leaf | npt.NDArray[Any]], nodes: Iterable[Node] = ()) -> bytes:
    """A `checkpoint` file for these tensors and nodes; numpy arrays and strings are kept in it."""
    tree: dict[str, Any] = {}
    leaves: dict[str, Any] = {name: _spec(v) if isinstance(v, Leaf) else v for name, v in values.items()}
    others: dict[str, Any] = {node.name: _packed_node(node) for node in nodes}
    for name, value in sorted({**others, **leaves}.items()):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    packed: bytes = msgpack.packb({"version": VERSION, "optimizer": tree}, default=to_ext, strict_types=True)
    return packed


def _packed_node(node: Node) -> Any:
    return node.text if node.text is not None else None if node.value_type == NONE else {}


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
