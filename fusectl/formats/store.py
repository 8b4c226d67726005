"""Files of a checkpoint through tensorstore's key-value stores, and its error texts turned into fusectl's errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import tensorstore as ts

from fusectl.errors import Corrupt, FusectlError, NotEnoughSpace, StorageError


Spec = dict[str, Any]


def new_context() -> ts.Context:
    """A context for the stores of one checkpoint: no chunk cache, since every chunk is read once.

    One for all would remember the metadata of a checkpoint that has been replaced.
    """
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


def directory(path: str) -> Spec:
    """The store of a local directory."""
    return {"driver": "file", "path": path.rstrip("/") + "/"}


def ocdbt(path: str, inside: str = "") -> Spec:
    """The store of an OCDBT database in a local directory, with the settings that Orbax writes with."""
    return {
        "driver": "ocdbt",
        "base": directory(path),
        "path": inside,
        "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000},
    }


def translate(error: Exception, where: str, otherwise: type[FusectlError] = Corrupt) -> FusectlError:
    """The fusectl error for a tensorstore error met at `where`; of the class `otherwise` if its text tells no more."""
    text = str(error).split(" [")[0]
    status = text.split(":", 1)[0]
    if "No space left" in text or "File too large" in text or "quota" in text.lower():
        return NotEnoughSpace(f"{where}: the disk is full", details=(text,))
    if status in {"PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED"} or "Read-only" in text:
        return StorageError(f"{where}: storage refused", details=(text,))
    if status == "NOT_FOUND" and otherwise is Corrupt:
        return Corrupt(f"{where}: data is missing", details=(text,))
    return otherwise(f"{where}: cannot be {'decoded' if otherwise is Corrupt else 'written'}", details=(text,))


class Files:
    """A read-only view of all files under a store: which there are, and their contents."""

    def __init__(self, spec: Spec, where: str) -> None:
        self.where = where
        try:
            self._store = ts.KvStore.open(spec, context=new_context()).result()
            self.names = frozenset(key.decode() for key in self._store.list().result())
        except ValueError as error:
            raise translate(error, where) from error

    def read(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """The contents of these files, read concurrently; a missing one is an error that names it."""
        futures = {name: self._store.read(name) for name in names}
        contents: dict[str, bytes] = {}
        for name, future in futures.items():
            try:
                result = future.result()
            except ValueError as error:
                raise translate(error, f"{self.where}/{name}") from error
            if result.state != "value":
                raise Corrupt(f"{self.where}/{name}: missing", hint="dotfiles get lost in copies; copy it again whole")
            contents[name] = result.value
        return contents
