"""Queries, keys and values that MaxText's fused_qkv packs along one axis, seen apart, and packed again when written.

    self_attention/qkv_proj/kernel   (embed, heads + 2 kv_heads, kv)
        query | key | value          the heads of all queries, then those of keys, then those of values

Seen so, the tree is that of a model without fused_qkv: fusing what is packed would put heads of one model between those
of another. How many heads are queries' follows from the output projection. Source: maxtext/layers/attentions.py,
`init_qkv_w` and `qkv_projection`; under tensor parallelism MaxText splits shard by shard, which no checkpoint tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from fusectl.errors import Corrupt
from fusectl.formats.tree import Checkpoint, Leaf, View
from fusectl.layout.blocks import Block, Layout, Region, whole


PARTS = ("query", "key", "value")
PACKED = "qkv_proj"

# Behind the tensor may stand what a state of NNX has there.
_PACKED = re.compile(rf"(?P<module>.*/){PACKED}/(?P<tensor>kernel|bias)(?P<end>/value)?")
_PART = re.compile(rf"(?P<module>.*/)(?:{'|'.join(PARTS)})/(?P<tensor>(?:kernel|bias)(?:/value)?)")


@dataclass(frozen=True, slots=True)
class Pack:
    """A packed tensor, and where its parts begin and end along its axis of heads."""

    leaf: Leaf
    axis: int
    borders: tuple[int, ...]

    def span(self, part: int) -> range:
        """Where a part lies along the axis."""
        return range(self.borders[part], self.borders[part + 1])


class Unpacked(View):
    """A checkpoint whose packed queries, keys and values are tensors of their own.

    `packs` has, for each of these, the pack and the part of it that it is.
    """

    def __init__(self, source: Checkpoint, packs: Mapping[str, tuple[Pack, int]]) -> None:
        gone = {pack.leaf.name for pack, _ in packs.values()}
        leaves = {name: leaf for name, leaf in source.leaves.items() if name not in gone}
        super().__init__(source, {**leaves, **{name: _seen(name, *place) for name, place in packs.items()}})
        self.packs = packs

    def read(self, name: str, region: Region | None = None) -> npt.NDArray[Any]:
        if name not in self.packs:
            return super().read(name, region)
        pack, part = self.packs[name]
        wanted = whole(self.leaves[name].shape) if region is None else region
        return self.source.read(pack.leaf.name, _moved(wanted, pack.axis, pack.borders[part]))

    def can_be_taken(self, name: str) -> bool:
        return name not in self.packs and super().can_be_taken(name)

    def missing_chunks(self, name: str) -> list[str]:
        return self.source.missing_chunks(self.packs[name][0].leaf.name if name in self.packs else name)


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with its queries, keys and values apart; itself where nothing is packed.

    Raises Corrupt for packs that cannot hold the heads that their output projection has.
    """
    packs: dict[str, tuple[Pack, int]] = {}
    for name, leaf in checkpoint.leaves.items():
        found = _PACKED.fullmatch(name)
        end = (found["end"] or "") if found else ""
        out = checkpoint.leaves.get(f"{found['module']}out/kernel{end}") if found else None
        if found is None or out is None or _place_of(leaf) is None:
            continue
        is_bias = found["tensor"] == "bias"
        if len(out.shape) in {3, 4} and len(leaf.shape) == len(out.shape) - is_bias:
            pack = _pack(leaf, out, is_bias=is_bias, where=checkpoint.path)
            packs |= {f"{found['module']}{part}/{found['tensor']}{end}": (pack, i) for i, part in enumerate(PARTS)}
    return Unpacked(checkpoint, packs) if packs else checkpoint


def packs_of(checkpoint: Checkpoint) -> Mapping[str, tuple[Pack, int]]:
    """The packs of a checkpoint that is seen unpacked, by the names of their parts; none of any other."""
    while isinstance(checkpoint, View):
        if isinstance(checkpoint, Unpacked):
            return checkpoint.packs
        checkpoint = checkpoint.source
    return {}


def place_of(checkpoint: Checkpoint, name: str, region: Region) -> tuple[str, tuple[int, ...], Region]:
    """The name, the shape and the region in it of the tensor that a checkpoint stores a region of a tensor in."""
    if name not in packs_of(checkpoint):
        return name, checkpoint.leaves[name].shape, region
    pack, part = packs_of(checkpoint)[name]
    return pack.leaf.name, pack.leaf.shape, _moved(region, pack.axis, pack.borders[part])


def packed_name(name: str) -> str:
    """The name of the packed tensor that a part goes into.

    >>> packed_name("layers_0/self_attention/key/kernel")
    'layers_0/self_attention/qkv_proj/kernel'
    """
    found = _PART.fullmatch(name)
    assert found is not None
    return f"{found['module']}{PACKED}/{found['tensor']}"


def joined(layouts: Sequence[Layout], axis: int) -> Layout:
    """Layouts one after the other along an axis: that of the packed tensor."""
    blocks: list[Block] = []
    start = 0
    for layout in layouts:
        for block in layout.blocks:
            # Noise moves along: its field is laid out over the tensor that is stored, so that noise-fill, which sees
            # the parts of a packed output again, meets the same values as --fill at once.
            terms = tuple(term.moved(axis, start) for term in block.terms)
            blocks.append(Block(_moved(block.at, axis, start), terms))
        start += layout.shape[axis]
    first = layouts[0]
    return replace(first, shape=(*first.shape[:axis], start, *first.shape[axis + 1 :]), blocks=tuple(blocks))


def _moved(region: Region, axis: int, by: int) -> Region:
    moved = range(region[axis].start + by, region[axis].stop + by)
    return (*region[:axis], moved, *region[axis + 1 :])


def _pack(leaf: Leaf, out: Leaf, *, is_bias: bool, where: str) -> Pack:
    """The pack that a tensor is, by the shape of its module's output projection."""
    # (heads, kv, embed), and one axis more where layers are scanned: the first or the second.
    # Shapes that fit both ways, where there are as many layers as heads, are taken for MaxText's default, in which
    # layers come second (param_scan_axis=1).
    layers_first = len(out.shape) == 4 and leaf.shape[0] == out.shape[0] and not _behind_heads(leaf, out, is_bias)
    heads = out.shape[1] if layers_first else out.shape[0]
    axis = (1 if layers_first else 0) if is_bias else len(leaf.shape) - 2
    kv_heads, rest = divmod(leaf.shape[axis] - heads, 2)
    if kv_heads < 1 or rest:
        raise Corrupt(
            f"{where}: {leaf.name}: {leaf.shape[axis]} packed heads beside an output projection of {heads}",
            details=("as many keys as values are expected behind the queries",),
        )
    return Pack(leaf, axis, (0, heads, heads + kv_heads, heads + 2 * kv_heads))


def _behind_heads(leaf: Leaf, out: Leaf, is_bias: bool) -> bool:
    """Whether the axis of the layers is the second one, as MaxText has it by default."""
    return leaf.shape[1] == out.shape[1] and (is_bias or leaf.shape[0] == out.shape[-1])


def _place_of(leaf: Leaf) -> int | None:
    """The place of the packed module among the keys of its tensor; None where it is part of a key."""
    return next((i for i, key in enumerate(leaf.keys) if i >= len(leaf.keys) - 3 and key.name == PACKED), None)


def _seen(name: str, pack: Pack, part: int) -> Leaf:
    leaf, axis = pack.leaf, pack.axis
    shape = (*leaf.shape[:axis], len(pack.span(part)), *leaf.shape[axis + 1 :])
    place = _place_of(leaf)
    assert place is not None
    keys = (*leaf.keys[:place], replace(leaf.keys[place], name=PARTS[part]), *leaf.keys[place + 1 :])
    stored = leaf.stored
    if stored is not None:
        chunks = tuple(min(c, n) for c, n in zip(stored.chunks, shape, strict=True))
        stored = replace(stored, shape=shape, chunks=chunks, storage=replace(stored.storage, chunks=chunks))
    return replace(leaf, name=name, keys=keys, shape=shape, stored=stored, through=leaf)
