"""What other libraries keep models in, by name: it is no damaged checkpoint, and there is a way from it to one.

Each kind is told by the first bytes of a file, or by the names in a directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fusectl.errors import Incompatible
from fusectl.formats.objects import Place, head


_HEAD_BYTES = 64
_MSGPACK = re.compile(rb"[\x80-\x8f\xde\xdf]")
# A pair of a key and bytes, over and over: EasyLM's streams.
_STREAMED = re.compile(rb"\x92[\x90-\x9f\xdc]")
_OF_A_BARE_ARRAY = {"checkpoint", "array_metadatas", "_CHECKPOINT_METADATA", "commit_success.txt", "_sharding"}
_SAVE = "load it with {} and save it with orbax.checkpoint.PyTreeCheckpointer"


@dataclass(frozen=True, slots=True)
class Kind:
    """A library's files: what they are called, and what to do with them."""

    name: str
    way_out: str
    file: Callable[[str, bytes], bool] = lambda _name, _head: False
    directory: Callable[[frozenset[str]], bool] = lambda _names: False


def _ends(names: Iterable[str], *suffixes: str) -> bool:
    return any(name.endswith(suffixes) for name in names)


# The first that fits.
KINDS = (
    Kind(
        "safetensors",
        _SAVE.format("safetensors.numpy.load_file"),
        file=lambda name, head: name.endswith(".safetensors") or head[8:10] == b'{"',
        directory=lambda names: _ends(names, ".safetensors", ".safetensors.index.json"),
    ),
    Kind(
        "a NumPy archive (.npz)",
        _SAVE.format("numpy.load"),
        file=lambda name, head: name.endswith(".npz") or (head[:2] == b"PK" and b".npy" in head),
        directory=lambda names: _ends(names, ".npz"),
    ),
    Kind(
        "a PyTorch file",
        _SAVE.format("torch.load"),
        file=lambda _, head: head.startswith(b"PK") and b"/data.pkl" in head,
        directory=lambda names: _ends(names, ".distcp", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ),
    Kind(
        "a Python pickle, as older PyTorch writes",
        _SAVE.format("torch.load"),
        file=lambda _, head: re.match(rb"\x80[\x02-\x05]", head) is not None,
    ),
    Kind(
        "an HDF5 file",
        _SAVE.format("h5py"),
        file=lambda _, head: head.startswith(b"\x89HDF"),
    ),
    Kind(
        "an EasyLM stream",
        _SAVE.format("EasyLM's StreamingCheckpointer"),
        file=lambda _, head: _STREAMED.match(head) is not None,
    ),
    Kind(
        "a Flax msgpack file",
        _SAVE.format("flax.serialization.msgpack_restore"),
        file=lambda name, head: _MSGPACK.match(head) is not None and name != "checkpoint",
        directory=lambda names: _ends(names, ".msgpack"),
    ),
    Kind(
        "a TensorFlow checkpoint",
        "convert it first: T5X restores those of Mesh TensorFlow, and saves its own",
        file=lambda name, head: head.startswith(b"model_checkpoint_path") or ".ckpt" in name,
        directory=lambda names: _ends(names, ".index") and any(".data-" in name for name in names),
    ),
    Kind(
        "a Levanter checkpoint",
        _SAVE.format("levanter.checkpoint.load_checkpoint"),
        directory=lambda names: {"metadata.json", "manifest.ocdbt"} <= names,
    ),
    Kind(
        "one bare array of Orbax's ArrayCheckpointHandler",
        "save it as a tree: {'name': array}",
        directory=lambda names: "checkpoint" in names and names <= _OF_A_BARE_ARRAY,
    ),
)


def refuse_file(at: Place) -> None:
    """Raises Incompatible for a file of another library's."""
    found = head(at, _HEAD_BYTES)
    for kind in KINDS:
        if kind.file(at.name, found):
            raise Incompatible(f"{at}: {kind.name}, which fusectl does not read", hint=kind.way_out)


def refuse_directory(at: Place, names: Iterable[str]) -> None:
    """Raises Incompatible for a directory with files of another library's in it, given the names in it."""
    there = frozenset(names)
    for kind in KINDS:
        if kind.directory(there):
            raise Incompatible(f"{at}: {kind.name}, which fusectl does not read", hint=kind.way_out)


def refuse_files_in(at: Place, names: Iterable[str]) -> None:
    """Raises Incompatible for a directory of steps which are files of another library's, such as `checkpoint_7`."""
    for name in sorted(names):
        if re.fullmatch(r"[a-z_]*\d+", name) and (at / name).is_file():
            refuse_file(at / name)
