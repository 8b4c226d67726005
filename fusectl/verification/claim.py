"""What a fused checkpoint claims to be: its record, or what the caller declares, and the models to hold it against."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import fusectl
from fusectl.errors import Incompatible, NotFound, UsageError
from fusectl.families.config import read_config
from fusectl.families.kinds import FactorIn
from fusectl.families.recognized import Recognized
from fusectl.families.settings import Network
from fusectl.families.table import Family, Row
from fusectl.formats.objects import bucket_of
from fusectl.formats.opening import fingerprint, open_checkpoint
from fusectl.formats.record import Record, mean_weights, norm_groups
from fusectl.formats.tree import Checkpoint
from fusectl.layout.fill import DEFAULT_NOISE_SCALE, Fill, FillKind
from fusectl.rules.fusion import carrier, widths_of
from fusectl.sources.kv_heads import expanded
from fusectl.sources.lineage import Lineage, for_each, remembered
from fusectl.sources.opened import Opened, own_family, recognized, require_widths
from fusectl.sources.packed_qkv import unpacked
from fusectl.verbs import Converted, Fused, Mapped, SourceRecord
from fusectl.verification.blocks import Blocks


@dataclass(frozen=True)
class Declared:
    """What the caller says of a checkpoint; it stands in for, or overrides, what fusectl.json says."""

    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    # What stands between the sources, and the scale of noise; None for what the record says.
    fill: str | None = None
    noise_scale: float | None = None
    arch: str | None = None
    # A file that tells what the networks compute.
    config: str | None = None
    # What carries the weights; None for what the record says, or for the default of the family.
    factor_in: FactorIn | None = None
    # What the sources were trained on from, one for all or one for each.
    lineages: tuple[Lineage | None, ...] = ()

    @property
    def source(self) -> str | None:
        """The first source that is named; None for those of the record."""
        return next(iter(self.sources), None)


@dataclass(frozen=True)
class Claim:
    """What a fused checkpoint claims to be, and the models to hold it against. Full names are `prefix + parameter`."""

    fused: Checkpoint
    tree: Recognized
    sources: tuple[Checkpoint, ...]
    trees: tuple[Recognized, ...]
    record: Record
    # Sources whose files are no longer those that were fused, a sentence each.
    changed: tuple[str, ...] = ()
    # What neither a record nor the caller says, and is taken for granted.
    assumed: tuple[str, ...] = ()

    @property
    def source_groups(self) -> tuple[tuple[int, ...], ...]:
        """The norm groups of each source, as its own record has them."""
        return tuple(s.norm_groups for s in self.record.sources)

    def blocks(self, row: Row) -> Blocks:
        """The Blocks of a row's tensors."""
        return Blocks(row, self.record, self.tree.family.tied)

    @property
    def notes(self) -> tuple[str, ...]:
        """What speaks against the claim before a value has been compared."""
        step, then = self.fused.step, self.sources[0].step
        if self.record.command or step == then:
            return (*self.changed, *self.assumed)
        trained = f"step {step}, and {then} of its first source: what was trained on since cannot be verified"
        return (*self.changed, f"no fusectl.json, {trained}", *self.assumed)

    @cached_property
    def distinct(self) -> tuple[int, ...]:
        """The places at which each source stands first: one of K for a model that was fused with itself."""
        first: dict[int, int] = {}
        for i, source in enumerate(self.sources):
            first.setdefault(id(source), i)
        return tuple(first.values())


def make_claim(fused: Checkpoint, declared: Declared) -> Claim:
    """The Claim of an opened checkpoint.

    Raises UsageError when nobody says what it was fused from, NotFound when a source has gone, Incompatible when the
    sizes rule out that it is a fusion of these sources.
    """
    fused, record = unpacked(fused), fused.record
    if record is None and not declared.sources:
        raise UsageError(
            f"{fused.path}: no fusectl.json that names its sources",
            details=("what was trained on after it was fused cannot be verified: no block is its source's any more",),
            hint="--sources A B if it is as it was fused; else compare: theory --symmetry --copies K, or diff",
        )
    if record is not None and not record.sources and not declared.sources:
        raise UsageError(f"{fused.path}: its fusectl.json names no sources", hint="--sources A B")
    paths = declared.sources or tuple(s.path for s in (record.sources if record else ()))
    by_path: dict[str, Checkpoint] = {}
    for path, lineage in zip(paths, for_each(declared.lineages, len(paths)), strict=True):
        if path not in by_path:
            try:
                by_path[path] = unpacked(remembered(open_checkpoint(path), lineage))
            except NotFound as error:
                raise NotFound(
                    f"source {path} is not there any more", hint="--sources A B names where it is now"
                ) from error
    sources = tuple(by_path[path] for path in paths)
    if len(sources) < 2:
        raise UsageError(
            f"{len(sources)} source: a fusion has two or more", hint="--sources A A for one fused with itself"
        )
    if record is not None and record.sources and len(sources) != len(record.sources):
        raise UsageError(f"{len(sources)} sources, but {fused.path} is a fusion of {len(record.sources)}")
    arch = declared.arch or own_family(fused) or (record.family if record else None)
    tree = recognized(fused, arch)
    # The network is the record's and not the family's default: sources may have lost what a config once told of them.
    network = _network(tree, _source_tree(by_path[paths[0]], arch, record), record, declared)
    tree = replace(tree, told=network)
    times = record.kv_repeats if record is not None and record.sources else (1,) * len(paths)
    by_place: dict[tuple[str, int], Opened] = {}
    for path, each in zip(paths, times, strict=True):
        if (path, each) not in by_place:
            own = replace(_source_tree(by_path[path], arch, record), told=network)
            by_place[path, each] = expanded(Opened(by_path[path], own, ()), each)
    seen = [by_place[place] for place in zip(paths, times, strict=True)]
    sources, trees = tuple(o.checkpoint for o in seen), tuple(o.tree for o in seen)
    changed = _changed(sources, record)
    assumed = _assumed(tree.family) if record is None and declared.factor_in is None else ()
    record = _record(fused, record, sources, trees, declared, network)
    claim = Claim(fused, tree, sources, trees, record, changed, assumed)
    try:
        require_widths(tree, record, fused.path)
        _require_depths(claim)
    except Incompatible as error:
        raise Incompatible(error.message, details=(*changed, *error.details), hint=error.hint) from error
    return claim


def require_named(fused: Checkpoint, declared: Collection[str], named: Collection[str]) -> None:
    """Raises UsageError where a record leads into a bucket that nobody has named: neither the checkpoint's own path,
    nor the sources that the caller has `declared`, nor what else it has `named`.

    Whoever wrote the record would have it asked with the caller's credentials.
    """
    record = fused.record
    if record is None:
        return
    sources = [] if declared else list(dict.fromkeys(source.path for source in record.made_from))
    operator = record.made.operator if isinstance(record.made, Mapped) else None
    known = {bucket_of(path) for path in (fused.path, *declared, *named)}
    strange = [path for path in (*sources, operator or "") if (bucket := bucket_of(path)) and bucket not in known]
    if strange:
        raise UsageError(
            f"{fused.path}: its fusectl.json names {strange[0]}, in a bucket that you have not named",
            details=("it would be asked with your credentials",),
            hint=f"--sources {shlex.join(sources)}" if sources else "copy the operator to this machine",
        )


def _assumed(family: Family) -> tuple[str, ...]:
    """What is taken for granted of a fusion without a record, where it might be otherwise."""
    if family.tied:
        return ()
    other = FactorIn.HEAD if family.factor_in == FactorIn.NORM else FactorIn.NORM
    return (f"no fusectl.json: the {family.factor_in} is taken to carry the factor of the mean (--factor-in {other})",)


def _changed(sources: tuple[Checkpoint, ...], record: Record | None) -> tuple[str, ...]:
    recorded = record.sources if record else ()
    known = {entry.fingerprint for entry in recorded}
    found = [(source.path, fingerprint(source), entry.fingerprint) for source, entry in zip(sources, recorded)]  # noqa: B905
    return tuple(
        f"{path} has changed since it was fused: digest {now} of its files, {then} then"
        for path, now, then in dict.fromkeys(found)
        # One that stands at another's place has not changed; the weights tell the order.
        if now not in known
    )


def _record(
    fused: Checkpoint,
    record: Record | None,
    sources: tuple[Checkpoint, ...],
    trees: tuple[Recognized, ...],
    declared: Declared,
    network: Network,
) -> Record:
    """What to hold the checkpoint against: its own record, with what the caller declares put over it."""
    count = len(sources)
    own = tuple(norm_groups(s.record, t.sizes["embed"]) for s, t in zip(sources, trees, strict=True))
    # As they were when they were fused, if that fits: a source may have lost its record since.
    then = tuple(entry.norm_groups for entry in record.sources) if record else ()
    groups = then if tuple(map(sum, then)) == tuple(map(sum, own)) else own
    if record is None:
        record = replace(
            nothing_known(),
            family=trees[0].family.name,
            weights=(1.0 / count,) * count,
            kv_repeats=(1,) * count,
            factor_in=trees[0].family.factor_in,
        )
    if declared.sources or not record.sources:
        entries = tuple(
            SourceRecord(s.path, s.format, s.step, fingerprint(s), g) for s, g in zip(sources, groups, strict=True)
        )
        record = replace(record, made=Fused(entries))
    record = replace(record, norm_groups=tuple(width for each in groups for width in each))
    if declared.weights is not None:
        record = replace(record, weights=mean_weights(declared.weights, count))
    if declared.factor_in is not None:
        record = replace(record, factor_in=carrier(trees[0].family, declared.factor_in))
    record = replace(record, fill=_fill(record.fill, declared))
    if len(record.weights) != count:
        raise UsageError(f"{len(record.weights)} weights for {count} sources of {fused.path}")
    # The widths are measured, never taken on trust.
    return replace(record, widths=widths_of(trees), network=network)


def _source_tree(source: Checkpoint, arch: str | Family | None, record: Record | None) -> Recognized:
    """The tree of a source, which must be of the fused checkpoint's family."""
    try:
        return recognized(source, arch, record.drop if record else ())
    except Incompatible as error:
        layers = record.made.layers if record is not None and isinstance(record.made, Converted) else None
        if not layers:
            raise
        hint = f"the fusion's layers are {layers}: name copies of its sources that are so, too (convert)"
        raise Incompatible(error.message, details=error.details, hint=hint) from error


def _network(tree: Recognized, first: Recognized, record: Record | None, declared: Declared) -> Network:
    """What the networks compute: as a config tells, else the record, else as the family does by default.

    Raises Incompatible for a config that is neither the fused model's, of this tree, nor that of the first source.
    """
    known = tree.network if record is None else record.network
    if declared.config is None:
        return known
    config = read_config(declared.config)
    try:
        config.require_fit(tree, "the fused model")
    except Incompatible:
        config.require_fit(first, "its first source")
    return config.applied(known, tied=tree.family.tied)


def _fill(recorded: Fill, declared: Declared) -> Fill:
    """The recorded fill, unless another is declared; the seed of another is unknown."""
    kind = FillKind(declared.fill or recorded.kind)
    scale = declared.noise_scale or (recorded.noise_scale if kind == recorded.kind else DEFAULT_NOISE_SCALE)
    if kind == FillKind.ZEROS:
        if declared.noise_scale is not None:
            raise UsageError("--noise-scale without noise", hint="--fill gaussian or antisymmetric")
        return Fill()
    return recorded if (kind, scale) == (recorded.kind, recorded.noise_scale) else Fill(kind, scale, None)


def _require_depths(claim: Claim) -> None:
    if claim.tree.depths != claim.trees[0].depths:
        differ = f"depth: {claim.tree.depths} in {claim.fused.path}, {claim.trees[0].depths} in the sources"
        raise Incompatible(f"{claim.fused.path} is no fusion of these {len(claim.sources)} sources", details=(differ,))


def nothing_known() -> Record:
    """The Record of a checkpoint without one."""
    return Record(version=fusectl.__version__, weights=(), optimizer="")
