"""The matrices of a growth operator: how they start, and the checkpoint that they are kept in.

    duplicate     width: every unit again, in turn, so that with `--tie pinv` the function is kept; depth: new layers
                  add nothing, as in `fusectl stack --how identity`
    stack         the same width; depth: the whole stack again
    interpolate   the same width; depth: each layer again
    random        LiGO's released start: new units are means of all old ones with random weights that sum to 1, layers
                  the whole stack again with noise (fuse_init_scheme `rand` and `stackbert_noisy`)

The checkpoint is Orbax's; its custom metadata say from which sizes to which, and how it was learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fusectl
from fusectl.errors import Corrupt, Incompatible, UsageError, shorten
from fusectl.families.recognized import Recognized
from fusectl.families.table import Row, stack_of
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import nonfinite_at
from fusectl.rules.depth import arrangement, turn_of
from fusectl.rules.kinds import How, Tie
from fusectl.rules.linear import Growing, growing_to, is_depth
from fusectl.sources.lesson import Init, Learning
from fusectl.system.jsontree import finite


Array = npt.NDArray[Any]

CUSTOM = "fusectl_operator"
# Of the noise on the weights of layers in LiGO's released start.
DEPTH_NOISE = 0.03


@dataclass(frozen=True)
class Operator:
    """The matrices by their names (rules/linear.py), and how they came about.

    `learned` is the number of steps, `losses` are those of learning; none for a start that is applied as it is.
    """

    arrays: Mapping[str, Array]
    tie: str
    init: str
    seed: int
    learned: int = 0
    losses: tuple[float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def initial(growing: Growing, init: str, seed: int) -> Operator:
    """The operator that learning starts from, in float64; raises UsageError for a start of another name."""
    if init not in set(Init) or growing.tie not in set(Tie):
        raise UsageError(f"--init {init}, --tie {growing.tie}: {', '.join(Init)}; {', '.join(Tie)}")
    rng = np.random.default_rng(seed)
    arrays = {name: _matrix(growing, name, shape, init, rng) for name, shape in growing.shapes().items()}
    return Operator(arrays, growing.tie, init, seed)


def _matrix(growing: Growing, name: str, shape: tuple[int, ...], init: str, rng: np.random.Generator) -> Array:
    large, small = shape[-2:]
    stack, _, what = name.partition("/")
    if what.startswith("depth/"):
        return _depth(growing, stack, what.removeprefix("depth/"), init, rng)
    if what in {"query", "cross_query"} and "kv_heads" in growing.tree.sizes:
        # Heads go along with the kv head that they read.
        group = growing.tree.sizes["heads"] // growing.tree.sizes["kv_heads"]
        matrices = [np.kron(_units(large // group, small // group, init, rng), np.eye(group)) for _ in range(shape[0])]
        return np.stack(matrices)
    count = shape[0] if len(shape) == 3 else 1
    # A table of relative positions has an entry for each head and is shared by minimal T5's layers, while the matrices
    # of heads are one for each layer: only a fixed selection agrees with all of them.
    how = Init.DUPLICATE if what == "relpos" else init
    matrices = [_units(large, small, how, rng) for _ in range(count)]
    matrix = np.stack(matrices) if len(shape) == 3 else matrices[0]
    return matrix * _factor(growing, name, matrix, init)


def _units(large: int, small: int, init: str, rng: np.random.Generator) -> Array:
    """Each unit again in turn, or the old ones and random means of them."""
    if init != "random":
        # The small model's own units come first, B = [I; C] as in LiGO's code, and numbers of copies differ by one at
        # most.
        return np.eye(small)[np.arange(large) % small]
    # Each new unit begins close to the mean of all old ones, which is close to zero. In a toy decoder that start had a
    # loss of 3.36 with the paper's tie and 2.65 with `pinv`, where duplication kept the small model's 1.51.
    means = rng.uniform(size=(large - small, small))
    return np.concatenate([np.eye(small), means / means.sum(axis=1, keepdims=True)])


def _factor(growing: Growing, name: str, matrix: Array, init: str) -> Array | float:
    """What makes norms and tied heads of a duplicated stream come out as before; 1 with the paper's tie.

    Of n copies of a feature each is multiplied with sqrt(D / (d n)): the mean square of the stream stays as it is.
    """
    if growing.tie == Tie.PAPER:
        return 1.0
    # Of n copies with factor s each the stream's sum of squares is n s**2 = D / d times the old one, and so the mean
    # over D features is the old one. Without this, norms of copies that are uneven (d to 1.5 d) would divide by
    # something else.
    part = growing.tree.sizes["embed"] / growing.grown.sizes["embed"]
    if name == "embed" and init != "random":
        copies = matrix.sum(axis=0)[np.argmax(matrix, axis=1)]
        return np.asarray(1.0 / np.sqrt(part * copies))[:, None]
    if name == "decoder/final_norm" and growing.tree.family.tied:
        network = growing.tree.network
        # A tied head multiplies the scaled stream with the scaled table: n s**2 = D / d is what the first power takes
        # back.
        copies = 1.0 if init != "random" else 0.0
        return float(part ** (copies + network.tied_logits_power - network.embedding_power))
    return 1.0


def _depth(growing: Growing, stack: str, role: str, init: str, rng: np.random.Generator) -> Array:
    """The weights (large, small) of the layers of a stack."""
    now, then = growing.tree.depths[stack], growing.grown.depths[stack]
    hows = {
        Init.DUPLICATE: How.IDENTITY,
        Init.STACK: How.STACK,
        Init.INTERPOLATE: How.INTERLEAVE,
        Init.RANDOM: How.STACK,
    }
    depth = arrangement(hows[Init(init)], now, then, turn_of(growing.tree))
    weights = np.eye(now)[list(depth.layers)]
    if init == "random":
        # As in LiGO's code, rows are brought back to a sum of 1, so that no layer comes out larger than what it is made
        # of.
        noisy = weights + rng.uniform(0, DEPTH_NOISE, weights.shape)
        return np.asarray(noisy / noisy.sum(axis=1, keepdims=True))
    if any(row.writes_stream and role in row.roles for row in _of_stack(growing.tree, stack)):
        weights[sorted(depth.idle)] = 0.0
    return weights


def _of_stack(tree: Recognized, stack: str) -> Iterator[Row]:
    return (row for name, row in tree.rows.items() if stack_of(name) == stack and row.is_of_layers(name))


def described(operator: Operator, growing: Growing) -> Mapping[str, Any]:
    """What an operator's checkpoint says of it, as JSON."""
    tree, grown = growing.tree, growing.grown
    return {
        "version": fusectl.__version__,
        "tie": operator.tie,
        "init": operator.init,
        "seed": operator.seed,
        "learned": operator.learned,
        "losses": finite(operator.losses),
        "sizes": {axis: [n, grown.sizes[axis]] for axis, n in tree.sizes.items()},
        "depths": {stack: [n, grown.depths[stack]] for stack, n in tree.depths.items()},
        **finite(operator.about),
    }


def save_operator(operator: Operator, growing: Growing, at: Path, *, force: bool = False) -> None:
    """Writes an operator as a checkpoint of its own."""
    # Layers are read one by one.
    chunks = {name: (1, *each.shape[1:]) for name, each in operator.arrays.items() if each.ndim == 3}
    custom = {CUSTOM: described(operator, growing)}
    save(at, operator.arrays, "orbax", item=None, chunks=chunks, custom=custom, force=force)


@dataclass(frozen=True)
class Kept:
    """What a plan needs to know of an operator. The matrices stay in its `checkpoint`; None if it has none yet."""

    about: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    depth: Mapping[str, Array]
    checkpoint: Checkpoint | None = None

    @property
    def label(self) -> str:
        """The path of its checkpoint."""
        return self.checkpoint.path if self.checkpoint is not None else "the operator"

    @property
    def how(self) -> str:
        """How it came about, in words."""
        return f"{self.about['init']}, {self.about['learned'] or 'no'} steps"

    @property
    def keeps_function(self) -> bool:
        """Whether what it grows computes what the small model does."""
        return (self.about["init"], self.about["tie"], self.about["learned"]) == (Init.DUPLICATE, Tie.PINV, 0)

    def growing(self, tree: Recognized, where: str) -> Growing:
        """What it makes of a tree; raises Incompatible for one of other sizes than it is for."""
        sizes, depths = self.about["sizes"], self.about["depths"]
        wrong = [
            f"{what} {key}: {found.get(key, 'none')} in {where}, the operator is for {pair[0]}"
            for what, found, pairs in (("axis", tree.sizes, sizes), ("layers of the", tree.depths, depths))
            for key, pair in pairs.items()
            if found.get(key) != pair[0]
        ]
        if wrong:
            raise Incompatible(f"{self.label}: an operator for another model", details=shorten(wrong))
        now, then = ({key: pair[1] for key, pair in pairs.items()} for pairs in (sizes, depths))
        growing = growing_to(tree, now, then, str(self.about["tie"]), where)
        differ = [
            f"{name}: {list(self.shapes.get(name, ())) or 'missing'}, expected {list(shape)}"
            for name, shape in growing.shapes().items()
            if self.shapes.get(name) != shape
        ]
        if differ:
            raise Incompatible(f"{self.label}: an operator for another family", details=shorten(differ))
        return growing


def kept(operator: Operator, growing: Growing) -> Kept:
    """An operator in memory as a plan sees it: one that shows what is going to be written."""
    shapes = {name: each.shape for name, each in operator.arrays.items()}
    return Kept(described(operator, growing), shapes, {n: each for n, each in operator.arrays.items() if is_depth(n)})


def open_operator(path: str) -> Kept:
    """The operator at a path; raises Incompatible where there is another checkpoint, Corrupt for values that are not
    finite.
    """
    checkpoint = open_checkpoint(path)
    about = checkpoint.custom.get(CUSTOM)
    if not isinstance(about, Mapping) or not _makes_sense(about):
        raise Incompatible(f"{path}: no growth operator", hint="fusectl ligo writes one beside what it grows")
    # Weights of layers are read at once, since they decide which layers a plan reads; matrices are looked through for
    # NaN here and read again, one by one, where they are applied.
    depth = {}
    for name in checkpoint.leaves:
        values = checkpoint.read(name)
        if nonfinite_at(values) is not None:
            raise Corrupt(f"{path}: {name} has a NaN or Inf")
        if is_depth(name):
            depth[name] = values.astype(np.float64)
    return Kept(about, checkpoint.shapes, depth, checkpoint)


def require_same_run(found: Kept, start: Operator, growing: Growing, how: Learning | None) -> None:
    """Raises Incompatible for an operator that has begun otherwise than `start`, or was learned otherwise than `how`
    says, None for not at all: another run has left it.
    """
    lesson: dict[str, Any] = {"learned": 0}
    if how is not None:
        lesson = {"learned": how.steps, "optimizer": how.optimizer, "learning_rate": how.learning_rate}
    wanted = {**described(start, growing), **lesson}
    differ = [
        f"{key}: {found.about.get(key)}, not {wanted[key]}"
        for key in ("sizes", "depths", "tie", "init", "seed", *lesson)
        if found.about.get(key) != wanted[key]
    ]
    if differ:
        raise Incompatible(
            f"{found.label}: an operator that another run has left",
            details=differ,
            hint=f"--operator {found.label} applies it; --force without --resume begins anew",
        )


def _makes_sense(about: Mapping[str, Any]) -> bool:
    """Whether what a checkpoint says of its operator can be read."""
    try:
        pairs = [pair for key in ("sizes", "depths") for pair in about[key].values()]
        whole = all(isinstance(n, int) and n > 0 for pair in pairs for n in pair) and {len(p) for p in pairs} == {2}
        return whole and about["tie"] in set(Tie) and about["init"] in set(Init) and int(about["learned"]) >= 0
    except (KeyError, AttributeError, TypeError, ValueError):
        return False
