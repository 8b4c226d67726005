"""What the writing commands have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusectl.errors import UsageError
from fusectl.families.kinds import FactorIn, Norm
from fusectl.formats.kinds import Codec
from fusectl.layout.fill import Fill
from fusectl.layout.mesh import Mesh
from fusectl.optimizer.kinds import OnState
from fusectl.sources.lineage import Lineage
from fusectl.system.threads import default_max_memory_bytes


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
    # What carries the weights of the mean; None for the norm before the head where the family's table tells which one.
    factor_in: FactorIn | None = None
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
            object.__setattr__(self, "factor_in", None if self.factor_in is None else FactorIn(self.factor_in))
            object.__setattr__(self, "codec", Codec(self.codec))
            # Arrays' dtypes go into indexes, whose msgpack takes plain text only.
            object.__setattr__(self, "dtype", None if self.dtype is None else str(self.dtype))
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.step is not None and not 0 <= self.step <= LARGEST_STEP:
            raise UsageError(f"--step {self.step}: a training step is from 0 to {LARGEST_STEP:,}")
        if self.max_memory_bytes < 1:
            raise UsageError(f"{self.max_memory_bytes} bytes of memory")
