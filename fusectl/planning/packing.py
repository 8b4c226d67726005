"""Tensors of the output on their way: what is known of each, and the ones that are packed with others again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusectl.formats.tree import Checkpoint, Key, Leaf
from fusectl.layout.blocks import Layout
from fusectl.planning.exactness import Exactness, least
from fusectl.sources.packed_qkv import PARTS, joined, packed_name, packs_of


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the output: its name, its layout, and the source's tensor that it is `like`.

    `noise_name` is that under which the noise field knows it, `beside` that of a tensor of the source with which it is
    worked on side by side.
    """

    name: str
    layout: Layout
    like: Leaf | None
    noise_name: str
    keys: tuple[Key, ...] | None = None
    beside: str | None = None
    exactness: Exactness | None = None


class Packing:
    """Parts of tensors that are packed in the first source, until all parts of one are there."""

    def __init__(self, first: Checkpoint) -> None:
        self._packs = packs_of(first)
        self._parts: dict[str, dict[int, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of the first source is a part of a pack."""
        return name in self._packs

    def put(self, tensor: Tensor) -> Tensor | None:
        """The tensor, or the pack that it completes; None where parts of that are still to come."""
        if tensor.like is None or tensor.like.name not in self._packs:
            return tensor
        pack, part = self._packs[tensor.like.name]
        name = packed_name(tensor.name)
        parts = self._parts.setdefault(name, {})
        parts[part] = tensor
        if len(parts) < len(PARTS):
            return None
        found = [parts[i] for i in range(len(PARTS))]
        exactness = None if tensor.exactness is None else least(each.exactness for each in found)
        return replace(
            tensor,
            name=name,
            layout=joined([each.layout for each in found], pack.axis),
            like=pack.leaf,
            noise_name=packed_name(tensor.noise_name),
            exactness=exactness,
        )
