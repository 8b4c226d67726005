"""fusectl.json: how a checkpoint came to be. Trainers ignore it; noise-fill, verify and later fusions read it.

{"schema": "fusectl/record/1", "version": …, "command": "fuse", "family": "t5-1.1", "parameters": "target/",
 "sources": [{"path": …, "format": …, "step": …, "fingerprint": …, "norm_groups": [512]}, …],
 "weights": [0.5, 0.5], "widths": {"embed": [512, 512], …}, "norm_groups": [512, 512],
 "fill": {"kind": "gaussian", "noise_scale": 0.1, "seed": 0}, "optimizer": "reset",
 "tensors": {"target/…": {"shape": […], "dtype": …, "chunks": […], "crc32": ["9ae0daaf", …]}, …}}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusectl.errors import Corrupt


FILE_NAME = "fusectl.json"
SCHEMA = "fusectl/record/1"
FILLS = ("zeros", "gaussian", "antisymmetric")


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A checkpoint that went in. `fingerprint` covers its index and the names of its files, not their contents."""

    path: str
    format: str
    step: int | None
    fingerprint: str
    norm_groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """What stands where no source does: `zeros`, `gaussian` or `antisymmetric` noise.

    `noise_scale` is the noise's standard deviation relative to that of the kernel whose outputs it disturbs.
    """

    kind: str = "zeros"
    noise_scale: float = 0.0
    # None for noise from elsewhere, whose seed nobody knows.
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.kind not in FILLS:
            raise ValueError(f"no fill is called {self.kind!r}; there are {', '.join(FILLS)}")


@dataclass(frozen=True, slots=True)
class Checksums:
    """A written tensor and the CRC-32 of each chunk's decoded bytes, cut at the edge, in C order of the grid."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    crc32: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """The contents of a fusectl.json."""

    version: str
    command: str
    family: str
    # The prefix of the parameters in the tree, such as `target/`.
    parameters: str
    sources: tuple[SourceRecord, ...]
    weights: tuple[float, ...]
    # Per grown axis, the size that each source brought.
    widths: Mapping[str, tuple[int, ...]]
    # The widths of the groups over which a norm that upholds the fusion property normalises; they sum up to `embed`.
    norm_groups: tuple[int, ...]
    fill: Fill
    optimizer: str
    tensors: Mapping[str, Checksums] = field(default_factory=dict, repr=False)

    @property
    def self_fused(self) -> bool:
        """Whether all sources are one and the same checkpoint."""
        return len({(s.path, s.fingerprint) for s in self.sources}) == 1

    def to_json(self) -> bytes:
        """The record as the bytes of its file."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, raw: bytes, where: str) -> Record:
        """The record in a file's bytes; raises Corrupt when they are none."""
        try:
            tree = json.loads(raw)
            if tree.pop("schema") != SCHEMA:
                raise ValueError(f"not of schema {SCHEMA}")  # noqa: TRY301
            return cls(
                **{
                    **tree,
                    "sources": tuple(
                        SourceRecord(**{**s, "norm_groups": tuple(s["norm_groups"])}) for s in tree["sources"]
                    ),
                    "weights": tuple(map(float, tree["weights"])),
                    "widths": {axis: tuple(map(int, sizes)) for axis, sizes in tree["widths"].items()},
                    "norm_groups": tuple(map(int, tree["norm_groups"])),
                    "fill": Fill(**tree["fill"]),
                    "tensors": {name: _checksums(entry) for name, entry in tree["tensors"].items()},
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"{where}: not a record of fusectl", details=(f"{type(error).__name__}: {error}",)) from error


def _checksums(entry: Mapping[str, Any]) -> Checksums:
    return Checksums(tuple(entry["shape"]), entry["dtype"], tuple(entry["chunks"]), tuple(entry["crc32"]))
