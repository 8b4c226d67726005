"""A format: what every layout on disk that fusectl writes answers for itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt

from fusectl.errors import FusectlError
from fusectl.formats.kinds import FormatName
from fusectl.formats.objects import Place
from fusectl.formats.record import Record
from fusectl.formats.tree import Checkpoint, Leaf, Location, Node


@dataclass(frozen=True, slots=True)
class Written:
    """What a checkpoint holds whose arrays have been written, and which is to be completed."""

    # The tensors with arrays of their own, and those whose values go into the index.
    leaves: Mapping[str, Leaf]
    kept: Mapping[str, npt.NDArray[Any]]
    nodes: Sequence[Node]
    # What the trainer has noted of the step.
    custom: Mapping[str, Any]
    # Where it is going to be, and the item in it that its tree is in.
    final: Place
    item: str | None
    started_ns: int
    # Whether chunks of zeros were left out.
    sparse: bool


@dataclass(frozen=True, slots=True)
class Format(ABC):
    """A layout on disk. Arrays are zarr, in directories or in one OCDBT database; indexes and markers are its own.

    To add one, write a subclass in a module here that has it in its `FORMATS`, and name it in kinds.FormatName.
    """

    name: str
    says: str
    zarr: int
    ocdbt: bool

    # The kind of its Locations. Layouts that only opening tells apart share one.
    kind: ClassVar[FormatName]
    # The file whose CRC-32 a record keeps to know its checkpoint by, and the files that are written last.
    index: ClassVar[str]
    completing: ClassVar[frozenset[str]]
    # Whether all of its readers take a chunk that was left out for zeros.
    reads_left_out: ClassVar[bool] = False
    # Whether its index records items, kinds of keys, nodes without tensors, and random keys' generators. If not, its
    # trees are dictionaries whose keys hold no slash.
    keeps_tree: ClassVar[bool] = True
    # Whether its readers refuse a tree without a step.
    needs_step: ClassVar[bool] = False

    @property
    @abstractmethod
    def reserved(self) -> Collection[str]:
        """What it calls files of its own next to the arrays' directories."""

    @abstractmethod
    def is_read_by(self, trainer: str) -> bool:
        """Whether a trainer (families.kinds.Trainer) restores it."""

    def keeps_in_index(self, tensor: str, shape: tuple[int, ...]) -> bool:  # noqa: ARG002
        """Whether a tensor's values are in the index, and in no file of their own."""
        return False

    def find(self, at: Place, names: Collection[str]) -> Location | None:  # noqa: ARG002
        """The checkpoint of this format that a directory with these names in it is, if it is one by itself."""
        return None

    @abstractmethod
    def open(
        self, location: Location, record: Record | None, fault: Callable[[FusectlError], None] | None = None
    ) -> Checkpoint:
        """The checkpoint at a location of its kind; raises Corrupt for an index that contradicts its arrays.

        With `fault` it leaves out tensors that are contradicted or lack metadata, and calls `fault` with the error.
        """

    def problems(self, checkpoint: Checkpoint, notes: list[str]) -> Iterator[str]:  # noqa: ARG002
        """What is wrong with a checkpoint's other files, those it is not opened by; what may be is put into `notes`."""
        return iter(())

    @abstractmethod
    def closing_files(self, written: Written) -> dict[str, bytes]:
        """The files that make a checkpoint of what has been written, by their paths in it, in the order of writing."""

    @abstractmethod
    def names(self, arrays: Collection[str], item: str | None) -> set[str]:
        """What a checkpoint of these arrays' directories has in it, but for what starts with fusectl."""
