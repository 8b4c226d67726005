"""fusectl.json: how a checkpoint came to be. Trainers ignore it; noise-fill, verify and later fusions read it.

{"schema": "fusectl/record/5", "version": …, "command": "fuse", "family": "t5-1.1", "parameters": "target/",
 "made": {"kind": "fused", "sources": [{"path": …, "format": …, "step": …, "fingerprint": …, "norm_groups": [512]}, …]},
 "weights": [0.5, 0.5], "widths": {"embed": [512, 512], …}, "norm_groups": [512, 512],
 "norm": "rule", "residual_scales": [1.0, 0.98], "network": {"tied_logits_power": -0.5, …}, "kv_repeats": [1, 1],
 "means_shared": false, "table": null, "fill": {"kind": "gaussian", "noise_scale": 0.1, "seed": 0},
 "optimizer": "reset", "step": null, "origin": null,
 "tensors": {"target/…": {"shape": […], "dtype": …, "chunks": […], "crc32": ["9ae0daaf", …], "metadata": …}, …},
 "files": {"checkpoint": "5c1f0b2e", …},
 "crc32": "0b77c4de"}

`made` says which operation made it, from which checkpoints; all else describes the model that it holds, whichever
operation that came from.

Every CRC-32 that it holds can be compared with what is there: of each chunk's values, of each array's metadata, of the
index and the markers, and, last, of the record itself.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusectl.errors import Corrupt, UsageError
from fusectl.families.kinds import FactorIn, Norm
from fusectl.families.settings import T5, Network
from fusectl.families.table import LARGEST_TABLE
from fusectl.layout.fill import Fill
from fusectl.system.jsontree import decoded, encoded, parsed
from fusectl.verbs import Converted, Fused, Made, SourceRecord


FILE_NAME = "fusectl.json"
SCHEMA = "fusectl/record/5"
_OWN_CRC32 = re.compile(rb',\n "crc32": "([0-9a-f]{8})"\n}\n\Z')
# What a residual stream may be multiplied with, or its inverse: float32 holds the squares.
_SMALLEST_SCALE = 1e-18
# How far the weights of a mean may be from summing to one.
SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Origin:
    """The tree that was converted into T5X's format, whose index cannot tell it.

    Keys are pairs of a name and its kind (formats/tree.py).
    """

    item: str | None
    keys: Mapping[str, tuple[tuple[str, int], ...]]
    # The keys and the kind of every node without tensors, and the text of strings.
    nodes: tuple[tuple[tuple[tuple[str, int], ...], str, str | None], ...]


# In place of a chunk's CRC-32: it is all zeros and not on disk; it was taken over unread.
LEFT_OUT, UNREAD = "left out", "unread"


@dataclass(frozen=True, slots=True)
class Checksums:
    """A written tensor and the CRC-32 of each chunk's decoded bytes, cut at the edge, in C order of the grid.

    In place of a CRC-32 may stand LEFT_OUT or UNREAD.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    crc32: tuple[str, ...]
    # That of the file that describes the array; None where there is none, or where nobody noted it.
    metadata: str | None = None

    def __post_init__(self) -> None:
        if min((*self.chunks, 1)) < 1:
            raise ValueError(f"chunks of shape {list(self.chunks)}")
        chunks = math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))
        if len(self.crc32) != chunks:
            raise ValueError(f"{len(self.crc32)} checksums for {chunks} chunks")

    def of(self, index: tuple[int, ...]) -> str:
        """What stands for the chunk at this place of the grid."""
        number = 0
        for i, n, c in zip(index, self.shape, self.chunks, strict=True):
            number = number * -(-n // c) + i
        return self.crc32[number]


@dataclass(frozen=True, slots=True)
class Record:
    """The contents of a fusectl.json."""

    version: str = ""
    command: str = ""
    family: str = ""
    # The prefix of the parameters in the tree, such as `target/`.
    parameters: str = ""
    # The operation that made it; None where nothing is known of that.
    made: Made | None = None
    weights: tuple[float, ...] = (1.0,)
    # Per grown axis, the size that each source brought.
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # The widths of the groups over which a norm that upholds the fusion property normalises; they sum up to `embed`.
    norm_groups: tuple[int, ...] = ()
    fill: Fill = field(default_factory=Fill)
    optimizer: str = "kept"
    # Patterns of tensors of the sources that were left out on purpose.
    drop: tuple[str, ...] = ()
    norm: Norm = Norm.RULE
    # The constant that each source's residual stream was multiplied with, so that one norm mixes them less.
    residual_scales: tuple[float, ...] = ()
    # The step that was set; None where it is the first source's.
    step: int | None = None
    # What its network computes, as far as no tree tells it, and how often each kv head of a source was repeated.
    network: Network = T5
    kv_repeats: tuple[int, ...] = ()
    # Whether tensors that do not grow are the weighted mean of the sources' instead of equal to each.
    means_shared: bool = False
    # What carries the weights: the scale of the norm before the head, or the head.
    factor_in: FactorIn = FactorIn.NORM
    # The text of the table of its family, where fusectl does not bring that along.
    table: str | None = field(default=None, repr=False)
    # Where the tree came from, if its format cannot tell.
    origin: Origin | None = field(default=None, repr=False)
    # The generators of the tensors that are keys of random numbers, where the format cannot tell.
    random_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    tensors: Mapping[str, Checksums] = field(default_factory=dict, repr=False)
    # The CRC-32 of every other file that makes it a checkpoint, by its path in it.
    files: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.residual_scales:
            object.__setattr__(self, "residual_scales", (1.0,) * len(self.weights))
        if not self.kv_repeats:
            object.__setattr__(self, "kv_repeats", (1,) * len(self.weights))

    @property
    def fused(self) -> bool:
        """Whether it is a fusion, or the copy of one; the copy of any other checkpoint has a record, too."""
        return len(self.weights) > 1

    @property
    def tells_norms(self) -> bool:
        """Whether it says over which widths norms are taken; the record of a mere copy repeats what was assumed."""
        return self.fused or self.norm == Norm.PROPERTY

    @property
    def made_from(self) -> tuple[SourceRecord, ...]:
        """The checkpoints that the operation was given."""
        return () if self.made is None else self.made.made_from

    @property
    def sources(self) -> tuple[SourceRecord, ...]:
        """The checkpoints whose values are its blocks, where it is a fusion or the copy of one; else none."""
        made = self.made.of if isinstance(self.made, Converted) else self.made
        return made.sources if isinstance(made, Fused) else ()

    @property
    def self_fused(self) -> bool:
        """Whether it is a fusion of one and the same checkpoint."""
        return self.fused and len({(s.path, s.fingerprint) for s in self.sources}) == 1

    def to_json(self) -> bytes:
        """The record as the bytes of its file."""
        return signed({"schema": SCHEMA, **encoded(self)})

    @classmethod
    def from_json(cls, raw: bytes, where: str) -> Record:
        """The record in a file's bytes; raises Corrupt when they are none, or when they contradict themselves.

        Fields that this version does not know are ignored.
        """
        try:
            tree = parsed(raw)
            if tree["schema"] != SCHEMA:
                raise ValueError(f"of schema {tree['schema']}, not {SCHEMA}")  # noqa: TRY301
            _require_own_crc32(raw)
            record: Record = decoded(cls, tree)
            record._check()
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise Corrupt(f"{where}: not a record of fusectl", details=(f"{type(error).__name__}: {error}",)) from error
        return record

    def _check(self) -> None:
        count = len(self.weights)
        if count < 1 or len(self.sources) not in {0, count}:
            raise ValueError(f"{count} weights for {len(self.sources)} sources")
        wrong = [axis for axis, sizes in self.widths.items() if len(sizes) != count or min(sizes) < 1]
        # Of a tree that no table explains no width is known; it can only be a copy.
        if wrong or (not self.widths and count > 1):
            raise ValueError(f"widths of {wrong or 'no axis'}")
        if self.table is not None and len(self.table) > LARGEST_TABLE:
            raise ValueError(f"the table of a family, of {len(self.table):,} characters")
        if len(self.residual_scales) != count or not all(
            _SMALLEST_SCALE < scale < 1 / _SMALLEST_SCALE for scale in self.residual_scales
        ):
            raise ValueError(f"residual scales {list(self.residual_scales)} of {count} sources")
        if len(self.kv_repeats) != count or min(self.kv_repeats) < 1:
            raise ValueError(f"kv heads repeated {list(self.kv_repeats)} times, of {count} sources")
        of_sources = tuple(width for source in self.sources for width in source.norm_groups)
        if self.sources and of_sources != self.norm_groups:
            raise ValueError(f"norm groups {list(self.norm_groups)} of sources with {list(of_sources)}")
        if min(self.norm_groups, default=1) < 1 or sum(self.norm_groups) != sum(self.widths.get("embed", ())):
            raise ValueError(f"norm groups {list(self.norm_groups)} do not sum up to the width")
        if self.family.endswith(".toml"):
            # It would be read; a table is in the record itself.
            raise ValueError(f"a family in the file {self.family}")
        if outside := [name for name in self.files if name.startswith("/") or ".." in name.split("/")]:
            raise ValueError(f"{outside[0]} leaves the checkpoint")


def norm_groups(record: Record | None, width: int) -> tuple[int, ...]:
    """The widths to take a checkpoint's norms over for the fusion property: its record's, else the whole width.

    >>> norm_groups(None, 512)
    (512,)
    """
    return record.norm_groups if record and record.norm_groups else (width,)


def mean_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weights of the mean of `count` sources, equal ones by default; raises UsageError unless they sum to one.

    >>> mean_weights(None, 4), mean_weights([0.7, 0.3], 2)
    ((0.25, 0.25, 0.25, 0.25), (0.7, 0.3))
    """
    if weights is None:
        return (1.0 / count,) * count
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} sources")
    if not all(0.0 < weight < math.inf for weight in weights):
        raise UsageError(f"weights of a mean are positive: {', '.join(f'{weight:g}' for weight in weights)}")
    if abs(math.fsum(weights) - 1.0) > SUM_TOLERANCE:
        raise UsageError(f"the weights sum to {math.fsum(weights):g}, not to 1", hint="--weights 0.7,0.3")
    return tuple(weights)


def crc32_of(raw: bytes) -> str:
    """The CRC-32 of a file, as eight hexadecimal digits.

    >>> crc32_of(b"123456789")
    'cbf43926'
    """
    return f"{zlib.crc32(raw):08x}"


def require_crc32(raw: bytes, crc32: str, where: str, hint: str | None = None) -> None:
    """Raises Corrupt unless bytes have this CRC-32."""
    found = crc32_of(raw)
    if found != crc32:
        raise Corrupt(f"{where}: not what was written", details=(f"CRC-32 {found}, written as {crc32}",), hint=hint)


def signed(tree: Mapping[str, Any]) -> bytes:
    """A record's JSON with its own CRC-32 at the end."""
    body = json.dumps(tree, indent=1, allow_nan=False).encode()
    return body.removesuffix(b"\n}") + f',\n "crc32": "{crc32_of(body)}"\n}}\n'.encode()


def _require_own_crc32(raw: bytes) -> None:
    found = _OWN_CRC32.search(raw)
    body = raw[: found.start()] + b"\n}" if found else b""
    if found is None or int(found.group(1), 16) != zlib.crc32(body):
        raise ValueError("it has been changed since it was written (CRC-32)")
