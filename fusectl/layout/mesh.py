"""A mesh of devices: which of its axes an axis of a tensor is laid over, and what one device holds of a tensor then.

    --mesh data=8,model=4                 kernel (embed 1024, mlp 4096)
    rules: embed -> none, mlp -> model    shard  (embed 1024, mlp 1024)      on 4 devices, 8 times each

Chunks that no two shards share are read once, by those who need them (`fits`). Sources: t5x/partitioning.py,
`standard_logical_axis_rules`; flax/linen/spmd.py, `logical_to_mesh_axes`; t5x/adafactor.py, `derive_logical_axes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusectl.errors import Incompatible, UsageError


Rules = tuple[tuple[str, str | None], ...]

# T5X's rules for one activation and one parameter dimension, in its order.
STANDARD_RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("embed", None),
    ("mlp", "model"),
    ("heads", "model"),
    # Of MaxText, for rules of one's own: T5X has none, and replicates it.
    ("kv_heads", None),
    ("kv", None),
    ("joined_kv", "model"),
    ("relpos_buckets", None),
    ("abspos_buckets", None),
    ("length", None),
    ("layers", None),
    ("stack", None),
    ("mlp_activations", None),
)
EXAMPLE = "--mesh data=8,model=4"
RULES_EXAMPLE = "--axis-rules embed=data,mlp=model"

_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Mesh:
    """The sizes of a mesh's axes by name, and the rules that lay the axes of tensors over them.

    A mesh axis that only T5X's standard rules name may be absent: its size is 1. Raises UsageError for a size below 1,
    for a mesh axis that no rule names, and for a rule of an axis that T5X does not have.
    """

    sizes: Mapping[str, int]
    rules: Rules = STANDARD_RULES

    def __post_init__(self) -> None:
        bad = next((name for name, n in self.sizes.items() if n < 1), None)
        if bad is not None or not self.sizes:
            raise UsageError(f"--mesh {self}: a mesh has one axis or more, each of size 1 or more", hint=EXAMPLE)
        logical, named = {axis for axis, _ in STANDARD_RULES}, {to for _, to in self.rules}
        unknown = next((axis for axis, _ in self.rules if axis not in logical), None)
        if unknown is not None:
            raise UsageError(
                f"--axis-rules: no axis is called {unknown!r}",
                hint=f"one of {', '.join(axis for axis, _ in STANDARD_RULES)}",
            )
        own = dict.fromkeys(to for rule in self.rules if rule not in STANDARD_RULES for to in rule[1:] if to)
        absent = next((name for name in own if name not in self.sizes), None)
        if absent is not None:
            raise UsageError(f"--axis-rules: --mesh {self} has no axis {absent!r}", hint=f"--mesh {self},{absent}=2")
        unused = next((name for name in self.sizes if name not in named), None)
        if unused is not None:
            raise UsageError(
                f"--mesh {self}: no rule lays anything over {unused!r}",
                hint=f"leave it out, or name it in a rule, such as --axis-rules mlp={unused}",
            )

    def __str__(self) -> str:
        return ",".join(f"{name}={n}" for name, n in self.sizes.items())

    def mesh_axes(self, axes: Sequence[str]) -> tuple[str | None, ...]:
        """The mesh axis that each axis of a tensor is laid over, None where every device has all of it.

        The rules are taken in their order, and a mesh axis is given to one axis of a tensor only, as in Flax. Axes that
        no rule names are not laid over any.

        >>> Mesh({"data": 8, "model": 4}).mesh_axes(("embed", "mlp"))
        (None, 'model')
        """
        laid: dict[str, str | None] = {}
        # Flax skips a rule whose mesh axis is taken and tries the next rule of the same axis; an axis that a rule has
        # mapped to no mesh axis by then stays unsharded.
        for axis, to in self.rules:
            if axis in axes and axis not in laid and (to is None or to not in laid.values()):
                laid[axis] = to
        return tuple(laid.get(axis) for axis in axes)

    def shard_shape(self, axes: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what one device holds of a tensor; raises Incompatible where an axis does not divide.

        >>> Mesh({"data": 8, "model": 4}).shard_shape(("embed", "mlp"), (1024, 4096))
        (1024, 1024)
        """
        self.require_division([(axes, shape)])
        return tuple(n // self._over(to) for to, n in zip(self.mesh_axes(axes), shape, strict=True))

    def require_division(self, tensors: Iterable[tuple[Sequence[str], Sequence[int]]]) -> None:
        """Raises Incompatible unless the mesh divides every axis that is laid over it; each such axis is said once.

        `tensors` are axes and shapes. JAX refuses shards of unequal shapes, too.
        """
        laid = dict.fromkeys(
            (axis, n, to)
            for axes, shape in tensors
            for axis, n, to in zip(axes, shape, self.mesh_axes(axes), strict=True)
            if to is not None
        )
        problems = [
            f"axis {axis!r} of {n:,} over {to}={self._over(to)}: {_nearest(n, to, self._over(to))} would divide"
            for axis, n, to in laid
            if n % self._over(to)
        ]
        if not problems:
            return
        common = {name: math.gcd(*(n for _, n, to in laid if to == name)) for name in self.sizes}
        # gcd() is 0: nothing is laid over that one.
        fitting = {name: max(d for d in divisors(common[name] or n) if d <= n) for name, n in self.sizes.items()}
        raise Incompatible(
            f"mesh {self}: devices would get unequal shares of what is to be written",
            details=problems,
            hint="--mesh " + ",".join(f"{name}={n}" for name, n in fitting.items()),
        )

    def as_json(self) -> dict[str, object]:
        """The sizes by mesh axis, and the rules as pairs of an axis and a mesh axis or null, in their order."""
        return {"axes": dict(self.sizes), "rules": [list(rule) for rule in self.rules]}

    def _over(self, name: str | None) -> int:
        return 1 if name is None else self.sizes.get(name, 1)


def parse_mesh(mesh: str, rules: str | None = None) -> Mesh:
    """The Mesh of `data=8,model=4`, with T5X's standard rules or those that the user puts in their place.

    `rules` is such as `embed=data,mlp=`: each replaces the standard rules of its axis; nothing or `none` behind the
    sign replicates it. They come after the standard ones, as T5X appends additional rules, so that in `embed=model` the
    mesh axis goes to `mlp` where a tensor has both. Raises UsageError.

    >>> parse_mesh("model=4", "mlp=").mesh_axes(("vocab", "embed", "mlp"))
    ('model', None, None)
    """
    sizes: dict[str, int] = {}
    for name, value in _pairs(mesh, "--mesh", EXAMPLE):
        if not value.isascii() or not value.isdigit() or name in sizes:
            raise UsageError(f"--mesh {mesh}: {name}={value}: each axis once, with its size", hint=EXAMPLE)
        sizes[name] = int(value)
    if rules is None:
        return Mesh(sizes)
    own = tuple(
        (axis, None if to.lower() in {"", "none"} else to) for axis, to in _pairs(rules, "--axis-rules", RULES_EXAMPLE)
    )
    replaced = {axis for axis, _ in own}
    return Mesh(sizes, (*(rule for rule in STANDARD_RULES if rule[0] not in replaced), *own))


def fits(chunks: Sequence[int], shard: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether no chunk of a grid over `shape` is needed by two different shards.

    Along an axis that is not cut every shard needs every chunk, a ragged last one, too.

    >>> fits((2, 4), (4, 4), (8, 4)), fits((3, 4), (4, 4), (8, 4))
    (True, False)
    """
    # A chunk that two shards share is read and decoded by both of them.
    return all(s == n or s % c == 0 for c, s, n in zip(chunks, shard, shape, strict=True))


def bytes_read(chunks: Sequence[int], shard: Sequence[int], itemsize: int) -> int:
    """The bytes, uncompressed, of the chunks that hold one shard, where they `fits` it."""
    return math.prod(math.ceil(s / c) * c for c, s in zip(chunks, shard, strict=True)) * itemsize


def _pairs(text: str, option: str, example: str) -> Iterator[tuple[str, str]]:
    for part in text.split(","):
        name, sign, value = (word.strip() for word in part.partition("="))
        if not sign or not _NAME.fullmatch(name) or not (value.isdigit() or _NAME.fullmatch(value) or not value):
            raise UsageError(f"{option} {text}: {part.strip()!r} is no NAME=VALUE", hint=example)
        yield name, value


def _nearest(n: int, name: str, size: int) -> str:
    """The sizes of a mesh axis next to `size` that divide n."""
    found = sorted(divisors(n))
    below, above = [d for d in found if d < size][-1:], [d for d in found if d > size][:1]
    return " or ".join(f"{name}={d}" for d in below + above)


def divisors(n: int) -> set[int]:
    """All divisors of a number.

    >>> sorted(divisors(12))
    [1, 2, 3, 4, 6, 12]
    """
    small = {d for d in range(1, math.isqrt(n) + 1) if n % d == 0}
    return small | {n // d for d in small}
