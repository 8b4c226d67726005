"""The Builder: collects an output's tensors, cuts and stores each, and makes the Plan of them.

options.py     what is asked for              places.py    where tensors go
packing.py     parts that are packed again    chunking.py  how tensors are cut and stored
resources.py   memory                         step.py      the step, streams of random numbers
optimizer.py   the optimizer's slots          plan.py      what comes of it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fusectl.errors import Incompatible, UsageError, shorten
from fusectl.formats.format import Format
from fusectl.formats.placing import misplaced
from fusectl.formats.record import Record
from fusectl.formats.tree import STEPS, Key, Node, is_dropped
from fusectl.layout.blocks import Block, Layout, Term, whole
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.rates import Rate
from fusectl.optimizer.state import STATES, is_state, unnamed
from fusectl.planning.chunking import storing_for
from fusectl.planning.exactness import Exactness
from fusectl.planning.options import Options
from fusectl.planning.packing import Packing, Tensor
from fusectl.planning.places import keys_of
from fusectl.planning.plan import Output, Plan
from fusectl.planning.resources import Resources, resources_of
from fusectl.sources.opened import Opened


class Builder:
    """Collects the outputs of a plan, and which tensors of the sources they use."""

    def __init__(
        self, sources: Sequence[Opened], options: Options, out_format: Format, resources: Resources | None = None
    ) -> None:
        """`resources` None are those of a plan that sets no memory apart."""
        self._sources = sources
        self._options = options
        self._format = out_format
        self._resources = resources or resources_of(options.max_memory_bytes, out_format)
        self._storing = storing_for(out_format, options, self._resources, [o.checkpoint.format for o in sources])
        self._packing = Packing(sources[0].checkpoint)
        self.outputs: list[Output] = []
        self.used: set[str] = set()
        # Of the outputs that inherit keys and chunks, the tensors of the first source that those are of.
        self.beside: dict[str, str] = {}
        self.notes: list[str] = []

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
        exactness: Exactness | None = None,
    ) -> None:
        """A tensor of the output; `like` names that of a source, the first one, whose keys and chunks it inherits.

        It is worked on side by side with those of equal shape that have the same `beside`.
        What that one packs with others is packed with them again, as soon as all of them are there.
        """
        leaf = self._sources[source].checkpoint.leaves[like] if like else None
        if like is not None and like in self._packing:
            self.used.add(like)
        tensor = self._packing.put(Tensor(name, layout, leaf, noise_name or name, keys, beside, exactness))
        if tensor is not None:
            self._store(tensor)

    def _store(self, tensor: Tensor) -> None:
        """Decides how a tensor is stored and worked on."""
        name, layout, leaf = tensor.name, tensor.layout, tensor.like
        if 0 in layout.shape:
            raise Incompatible(f"{name}: no values, shape {list(layout.shape)}", hint="--drop leaves it out")
        terms = [term for block in layout.blocks for term in block.sources]
        leaves = {term: self._sources[term.source].checkpoint.leaves[term.tensor] for term in terms}
        storing = self._storing
        if self._format.keeps_in_index(name, layout.shape):
            storing = replace(storing, passthrough=False)
        takeable = {t: s for t, s in leaves.items() if self._sources[t.source].checkpoint.can_be_taken(t.tensor)}
        mesh = self._options.mesh
        shard = None if mesh is None else mesh.shard_shape(layout.axes, layout.shape)
        through = {each.through.name for each in leaves.values() if each.through is not None}
        part_of = tensor.beside or (through.pop() if len(through) == 1 else None)
        # A slot that is reset may have nothing in common with the source's but its name.
        storage, passed = storing.choose(layout, takeable, leaf if terms else None, shard)
        tile, cost = storing.unit(layout, storage, leaves, passed)
        if leaf is not None:
            self.beside[name] = leaf.name
        self.outputs.append(
            Output(
                name,
                keys_of(name, leaf, self._format) if tensor.keys is None else tensor.keys,
                layout,
                storage,
                passed,
                tile,
                cost,
                tensor.noise_name,
                part_of,
                None if leaf is None else leaf.random_key,
                tensor.exactness,
            )
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

    @property
    def exactness(self) -> list[Exactness]:
        """How exact each parameter of a fusion is."""
        return [output.exactness for output in self.outputs if output.exactness is not None]

    def plan(
        self,
        record: Record,
        item: str | None,
        notes: Sequence[str],
        *,
        nodes: tuple[Node, ...] | None = None,
        exactness: Exactness | None = None,
        rates: Mapping[str, Rate] | None = None,
        dropped: Sequence[str] | None = None,
        custom: Mapping[str, object] | None = None,
    ) -> Plan:
        """The Plan, checked: every tensor of every source is used or dropped on purpose.

        `nodes`, `dropped` and `custom` are the sources' by default.
        """
        self._require_all_used()
        plan = Plan(
            outputs=tuple(self.outputs),
            nodes=self.nodes() if nodes is None else nodes,
            format=self._format.name,
            item=item,
            record=replace(record, random_keys=self._random_keys()),
            dropped=tuple(dict.fromkeys(self._dropped() if dropped is None else dropped)),
            notes=(*notes, *self._nodes_left_behind()),
            resources=self._resources,
            sparse=self._storing.sparse,
            links=self._options.link,
            mesh=self._options.mesh,
            check_sources=self._options.check,
            exactness=exactness,
            custom=self._sources[0].checkpoint.custom if custom is None else custom,
            rates=rates or {},
        )
        plan.check()
        self._require_place(plan)
        return plan

    def _dropped(self) -> Iterator[str]:
        return (name for o in self._sources for name in o.dropped)

    def _require_all_used(self) -> None:
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

    def _require_place(self, plan: Plan) -> None:
        """Raises Incompatible for leaves that cannot be carried, and for a tree that the format cannot hold."""
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
