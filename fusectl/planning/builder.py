"""What plans are made with: the options, and the Builder that collects an output's tensors and cuts each of them up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

import fusectl
from fusectl.errors import Incompatible, UsageError, shorten
from fusectl.families.kinds import Norm
from fusectl.families.naming import T5X, Naming, is_stream
from fusectl.families.recognized import Recognized
from fusectl.formats.kinds import Codec
from fusectl.formats.placing import misplaced
from fusectl.formats.record import Record
from fusectl.formats.registry import ORBAX, Format, fingerprint, format_named, orbax_for
from fusectl.formats.tree import (
    STEPS,
    T5X_STEP,
    Checkpoint,
    Key,
    Node,
    dict_keys,
    is_dropped,
    keys_beside,
)
from fusectl.formats.zarr import np_dtype
from fusectl.layout.blocks import Block, Layout, Product, Term, whole
from fusectl.layout.fill import Fill, FillKind
from fusectl.layout.mesh import Mesh
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.slots import STATES, is_state, unnamed
from fusectl.planning.chunking import Storing
from fusectl.planning.plan import Output, Plan
from fusectl.rules.fusion import widths_of
from fusectl.sources.lineage import Lineage
from fusectl.sources.opened import Opened
from fusectl.sources.packed_qkv import PARTS, joined, packed_name, packs_of
from fusectl.system.threads import default_max_memory_bytes
from fusectl.verbs import SourceRecord


# The item that T5X's Orbax checkpoints have their tree in.
T5X_ITEM = "state"
LARGEST_COMMIT_BYTES = 16 << 20
# Trainers keep it in an int32.
LARGEST_STEP = 2**31 - 1


@dataclass(frozen=True)
class Options:
    """What the writing commands have in common."""

    fill: Fill = field(default_factory=Fill)
    optimizer: OnState = OnState.CARRY
    format: str | None = None
    arch: str | None = None
    drop: tuple[str, ...] = ()
    dtype: str | None = None
    max_memory_bytes: int = field(default_factory=default_max_memory_bytes)
    # How chunks are compressed: `auto` keeps what the sources have wherever their chunks can be taken over.
    codec: Codec = Codec.AUTO
    # Whether chunks of zeros are left out; None where all readers of the format take that for zeros.
    sparse: bool | None = None
    # Hard links to the sources' files instead of copies.
    link: bool = False
    # Whether chunks that are taken over are read, to notice what is corrupt or not finite.
    check: bool = True
    # Whether chunks may be taken over at all.
    passthrough: bool = True
    # The devices that are going to restore it; chunks then fit their shards.
    mesh: Mesh | None = None
    # Which norm the fused model is going to be trained with: the fusion rule's, or the fusion property's; None for the
    # sources' own, the rule's if they have one norm each.
    norm: Norm | None = None
    # What sources were trained on from: one for all of them, or one for each.
    lineages: tuple[Lineage | None, ...] = ()
    # The training step to be written; None for the first source's.
    step: int | None = None
    # Files that tell what the sources' networks compute: one for all of them, or one for each.
    configs: tuple[str, ...] = ()
    # Whether kv heads are repeated where the sources have different numbers of them for their heads.
    expand_kv: bool = False
    # Whether tensors that do not grow may differ, and become their mean.
    mean_shared: bool = False

    def __post_init__(self) -> None:
        try:
            # Callers may name them in words.
            object.__setattr__(self, "optimizer", OnState(self.optimizer))
            object.__setattr__(self, "norm", None if self.norm is None else Norm(self.norm))
            object.__setattr__(self, "codec", Codec(self.codec))
            # Arrays' dtypes go into indexes, whose msgpack takes plain text only.
            object.__setattr__(self, "dtype", None if self.dtype is None else str(self.dtype))
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.step is not None and not 0 <= self.step <= LARGEST_STEP:
            raise UsageError(f"--step {self.step}: a training step is from 0 to {LARGEST_STEP:,}")
        if self.max_memory_bytes < 1:
            raise UsageError(f"{self.max_memory_bytes} bytes of memory")


class Builder:
    """Collects the outputs of a plan, and which tensors of the sources they use."""

    def __init__(
        self, sources: Sequence[Opened], options: Options, out_format: Format, *, reserved_bytes: int = 0
    ) -> None:
        """`reserved_bytes` of the memory budget are none of the units of work's."""
        self._sources = sources
        self._options = options
        self._format = out_format
        self._sparse = out_format.reads_left_out if options.sparse is None else options.sparse
        self._commit_bytes = min(LARGEST_COMMIT_BYTES, options.max_memory_bytes // 8)
        # Two commits under way, each of which holds its bytes twice.
        self._pending_bytes = (4 * self._commit_bytes if out_format.ocdbt else 0) + reserved_bytes
        self._storing = Storing(
            zarr=out_format.zarr,
            codec=options.codec,
            budget_bytes=options.max_memory_bytes - self._pending_bytes,
            ocdbt=out_format.ocdbt,
            sparse=self._sparse,
            # With noise most of a source's data files would be of no use to the output.
            refers=all(format_named(o.checkpoint.format).ocdbt for o in sources)
            and options.fill.kind is FillKind.ZEROS,
            passthrough=options.passthrough,
        )
        self.outputs: list[Output] = []
        self.used: set[str] = set()
        # Of the outputs that inherit keys and chunks, the tensors of the first source that those are of.
        self.beside: dict[str, str] = {}
        self.notes: list[str] = []
        # Of tensors that are packed in the first source, and in the output: the layouts of their parts.
        self._packs = packs_of(sources[0].checkpoint)
        self._parts: dict[str, dict[int, Layout]] = {}

    def add(
        self,
        name: str,
        layout: Layout,
        *,
        like: str | None,
        noise_name: str | None = None,
        keys: tuple[Key, ...] | None = None,
        beside: str | None = None,
        source: int = 0,
    ) -> None:
        """A tensor of the output; `like` names that of a source, the first one, whose keys and chunks it inherits.

        It is worked on side by side with those of equal shape that have the same `beside`.
        What that one packs with others is packed with them again, as soon as all of them are there.
        """
        leaf = self._sources[source].checkpoint.leaves[like] if like else None
        if like is not None and like in self._packs:
            pack, part = self._packs[like]
            name, noise_name, leaf = packed_name(name), packed_name(noise_name or name), pack.leaf
            parts = self._parts.setdefault(name, {})
            parts[part] = layout
            self.used.add(like)
            if len(parts) < len(PARTS):
                return
            layout = joined([parts[i] for i in range(len(PARTS))], pack.axis)
        if 0 in layout.shape:
            raise Incompatible(f"{name}: no values, shape {list(layout.shape)}", hint="--drop leaves it out")
        terms = [term for block in layout.blocks for term in block.sources]
        leaves = {term: self._sources[term.source].checkpoint.leaves[term.tensor] for term in terms}
        # A slot that is reset may have nothing in common with the source's but its name.
        storing = self._storing
        if self._format.keeps_in_index(name, layout.shape):
            storing = replace(storing, passthrough=False)
        whole_told = {t: s for t, s in leaves.items() if self._sources[t.source].checkpoint.can_be_taken(t.tensor)}
        mesh = self._options.mesh
        shard = None if mesh is None else mesh.shard_shape(layout.axes, layout.shape)
        through = {leaf.through.name for leaf in leaves.values() if leaf.through is not None}
        part_of = beside or (through.pop() if len(through) == 1 else None)
        storage, passed = storing.choose(layout, whole_told, leaf if terms else None, shard)
        tile, cost = storing.unit(layout, storage, leaves, passed)
        if keys is None:
            inherits = leaf is not None and self._format.keeps_tree
            keys = keys_beside(leaf.keys, name) if leaf is not None and inherits else dict_keys(name)
        if leaf is not None:
            self.beside[name] = leaf.name
        random_key = leaf.random_key if leaf is not None else None
        self.outputs.append(
            Output(name, keys, layout, storage, passed, tile, cost, noise_name or name, part_of, random_key)
        )
        self.used |= {term.tensor for term in terms}

    def copy(
        self,
        name: str,
        to: str | None = None,
        *,
        axes: tuple[str, ...] | None = None,
        keys: tuple[Key, ...] | None = None,
        source: int = 0,
    ) -> None:
        """A tensor of a source, the first one, as it is, under the name `to`."""
        leaf = self._sources[source].checkpoint.leaves[name]
        block = Block(whole(leaf.shape), (Term(source, name, whole(leaf.shape)),))
        layout = Layout(axes or unnamed(leaf.shape), leaf.shape, leaf.dtype, (block,))
        self.add(to or name, layout, like=name, keys=keys, source=source)

    def nodes(self) -> tuple[Node, ...]:
        """The nodes without tensors that the output keeps: a list's place must not outlive its dropped neighbours."""
        left_out = [f"{root}*" for root in STATES] if self._options.optimizer == OnState.DROP else []
        drop = (*self._options.drop, *left_out)
        return tuple(node for node in self._sources[0].checkpoint.nodes if not is_dropped(node.name, drop))

    def plan(
        self,
        record: Record,
        item: str | None,
        notes: Sequence[str],
        nodes: tuple[Node, ...] | None = None,
    ) -> Plan:
        """The Plan, checked: every tensor of every source is used or dropped on purpose."""
        unknown = [
            f"{o.label}: {name}"
            for o in dict.fromkeys(self._sources)
            for name in o.checkpoint.leaves
            if name not in self.used and name not in o.dropped and not is_state(name) and name not in STEPS
        ]
        if unknown:
            raise Incompatible(
                f"{len(unknown)} tensors that fusectl does not know what to do with",
                details=shorten(unknown, 5),
                hint="--drop PATTERN leaves out what the network does without",
            )
        plan = Plan(
            outputs=tuple(self.outputs),
            nodes=self.nodes() if nodes is None else nodes,
            format=self._format.name,
            item=item,
            record=replace(record, random_keys=self._random_keys()),
            dropped=tuple(dict.fromkeys(name for o in self._sources for name in o.dropped)),
            notes=(*notes, *self._nodes_left_behind()),
            budget_bytes=self._options.max_memory_bytes,
            commit_bytes=self._commit_bytes,
            pending_bytes=self._pending_bytes,
            sparse=self._sparse,
            links=self._options.link,
            mesh=self._options.mesh,
            check_sources=self._options.check,
            custom=self._sources[0].checkpoint.custom,
        )
        plan.check()
        if not plan.outputs:
            raise UsageError("no tensor is left to write", hint="narrow what --drop leaves out")
        unread = [
            f"{node.name}: of type {node.value_type}"
            for node in {node: None for o in self._sources for node in o.checkpoint.nodes}
            if not node.can_be_carried and not is_dropped(node.name, self._options.drop)
        ]
        if unread:
            raise Incompatible(
                f"leaves that fusectl cannot carry: {len(unread):,}",
                details=shorten(unread, 4),
                hint="--drop PATTERN leaves them out",
            )
        arrays = {output.name: output.keys for output in plan.outputs}
        if problems := list(misplaced(arrays, plan.nodes, self._format)):
            raise Incompatible(f"a tree that {self._format.name} cannot hold", details=shorten(problems, 5))
        return plan

    def _random_keys(self) -> dict[str, str]:
        """The generators of keys of random numbers, where the format cannot tell them."""
        if self._format.keeps_tree:
            return {}
        return {output.name: output.random_key for output in self.outputs if output.random_key is not None}

    def _nodes_left_behind(self) -> Iterator[str]:
        """That strings, and other nodes without tensors, are the first source's where others have other ones."""
        first, *others = ({n.name: n for n in o.checkpoint.nodes} for o in dict.fromkeys(self._sources))
        drop = self._options.drop
        lost = {n.name for other in others for n in other.values() if first.get(n.name) != n}
        if kept_back := sorted(name for name in lost if not is_dropped(name, drop)):
            yield f"strings and empty nodes are those of the first source: {', '.join(shorten(kept_back, 4))} differ"


def target_of(first: Opened, options: Options) -> tuple[Format, str | None, Naming]:
    """The format of the output, the item that its tree goes into, and how its parameters are named there."""
    own = format_named(first.checkpoint.format)
    # Of a tree without a trainer the arrays stay in the version of zarr that they are in.
    orbax = (
        orbax_for(trainer) if (trainer := first.tree.family.trainer) else format_named(f"orbax-ocdbt-zarr{own.zarr}")
    )
    out_format = orbax if options.format == ORBAX else format_named(options.format or own.name)
    if not out_format.keeps_tree:
        return out_format, None, T5X
    item = first.checkpoint.location.item if own.keeps_tree else T5X_ITEM
    return out_format, item, first.tree.naming


def plan_step(
    builder: Builder, first: Opened, options: Options, out_format: Format, keys: tuple[Key, ...] | None = None
) -> None:
    """Plans the step with these keys, or under the name that the format's readers look for; T5X must have one."""
    stored = step_of(first)
    of_t5x = out_format.needs_step or (stored is None and first.tree.naming == T5X)
    name = "/".join(key.name for key in keys) if keys else T5X_STEP if of_t5x else stored or "step"
    step = options.step
    if step is None and stored is not None:
        builder.copy(stored, to=name, keys=keys)
        return
    if step is None and not out_format.needs_step:
        return
    now = first.checkpoint.step
    if step is None:
        # That of the directory's name, if it has one.
        step = now or 0
        builder.notes.append(f"the source stores no step; T5X gets step {step:,}")
    else:
        instead = "" if now is None else f" instead of {now:,}"
        builder.notes.append(f"step {step:,}{instead}; the optimizer's own counts stay")
    leaf = first.checkpoint.leaves[stored] if stored else None
    kept = leaf is not None and not leaf.shape and np_dtype(leaf.dtype).kind in "iu"
    dtype = leaf.dtype if leaf is not None and kept else "int32"
    if step > np.iinfo(dtype).max:
        raise UsageError(f"--step {step}: more than {stored}, of {dtype}, can hold")
    # A product of nothing, times the step.
    block = Block((), (Product((), step),))
    builder.add(name, Layout((), (), dtype, (block,)), like=stored if kept else None, keys=keys)
    builder.used |= {stored} if stored else set()


def plan_auxiliary(builder: Builder, opened: Sequence[Opened]) -> None:
    """Plans copies of the streams of random numbers, which no width changes: each of the first source that has it."""
    planned: set[str] = set()
    for place, each in enumerate(opened):
        added = [name for name in auxiliary(each) if name not in planned]
        for name in added:
            builder.copy(name, source=place)
        if added and place:
            builder.notes.append(f"{each.label}: {len(added)} tensors of random streams, which no source before it has")
        planned.update(added)


def auxiliary(opened: Opened) -> list[str]:
    """The streams of random numbers that MaxText keeps with a model of NNX."""
    leaves, dropped = opened.checkpoint.leaves, opened.dropped
    return [name for name in leaves if is_stream(name) and not is_state(name) and name not in dropped]


def step_of(first: Opened) -> str | None:
    """The tensor that holds the step of a source."""
    return next((name for name in STEPS if name in first.checkpoint.leaves and name not in first.dropped), None)


def notes_on_mesh(mesh: Mesh | None, tree: Recognized, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What a mesh does to the parameters of these shapes that JAX allows; raises Incompatible for what it does not."""
    if mesh is None:
        return []
    mesh.require_division((tree.rows[name].spec.axes, shape) for name, shape in shapes.items())
    sizes = {a: n for name, shape in shapes.items() for a, n in zip(tree.rows[name].spec.axes, shape, strict=True)}
    joined, heads = sizes.get("joined_kv", 0), sizes.get("heads", 0)
    if not joined or not heads or joined % heads:
        return []
    (share,), head = mesh.shard_shape(("joined_kv",), (joined,)), joined // heads
    if share % head == 0:
        return []
    return [f"mesh {mesh}: a device's {share} of joined_kv are no whole heads of {head}: JAX allows it"]


def notes_on_items(source: Checkpoint) -> list[str]:
    """What else is in the step that an item was taken from, and stays behind."""
    home, item = source.location.home, source.location.item
    if item is None:
        return []
    others = sorted(child.name for child in home.iterdir() if child.is_dir() and child.name != item)
    left = f"of the step's items only {item!r} is read; a trainer begins anew what is in {', '.join(others)}"
    return [left] if others else []


def own_record(opened: Opened, command: str) -> Record:
    """What a record says of a source's own model: what its own does, or that it is no fusion."""
    own, tree = opened.checkpoint.record, opened.tree
    if own is None:
        own = Record(widths=widths_of([tree]), norm_groups=opened.norm_groups, network=tree.network)
    return replace(
        own,
        version=fusectl.__version__,
        command=command,
        family=tree.family.name or own.family,
        table=tree.family.table if tree.family.name else own.table,
        tensors={},
        files={},
    )


def source_record(opened: Opened) -> SourceRecord:
    """What a record says of a checkpoint that went in."""
    checkpoint = opened.checkpoint
    return SourceRecord(
        checkpoint.path, checkpoint.format, checkpoint.step, fingerprint(checkpoint), opened.norm_groups
    )
