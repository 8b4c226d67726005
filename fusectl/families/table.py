"""The types of a family's table: a Row for each kind of tensor, and the Family that they make up.

Roles say what a tensor is in the network, for those who have to know more than its axes:

    embedding  head  final_norm                 the stem; a family without a head is tied, its final_norm carries the
                                                head's factor (rules/fusion.py)
    pre_attention_norm  post_attention_norm     norms before attention and MLP, and behind them
    pre_mlp_norm  post_mlp_norm
    query  key  value  out                      attention, with biases query_bias key_bias value_bias and norms of each
    query_norm  key_norm                        head's queries and keys
    gate  up  down                              the MLP, gated if it has a gate
    cross_query  cross_key  …                   attention to the encoder, pre_cross_attention_norm before it
    relpos                                      the bias of relative positions
    bias                                        any other bias, which is no norm though it reads nothing
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from fusectl.errors import Incompatible
from fusectl.families.kinds import FactorIn, Trainer
from fusectl.families.settings import T5, TIED_LOGITS, Network
from fusectl.layout.axes import TensorSpec, compiled, expand, parse_axes


ENCODER, DECODER = "encoder", "decoder"
# The role of the table that tokens are looked up in.
EMBEDDING = "embedding"

# Of layers there are thousands at most, and names hold one or two numbers: what claims more is not of a family.
_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d{0,5})(?!\d)")
MOST_NUMBERS = 16
# Of the table of a family, in characters: a thousand rows.
LARGEST_TABLE = 1 << 18


@dataclass(frozen=True)
class Row:
    """One kind of tensor: where its instances are in the tree (axes.py has the notation) and what their axes are.

    `before_head` marks the scale and the bias of the norm in front of the output head, where nothing else reads what
    that norm gives: they can carry the head's factor, and have to where the head is the embedding. `role` is the
    tensor's; of one with an axis `stack` those along it, by spaces.
    """

    pattern: str
    axes: str
    role: str = ""
    before_head: bool = False
    # Whether what it computes is added to the residual stream; None for what the axes say. Where norms stand behind
    # the blocks, they write it.
    writes: bool | None = None
    # Which layers the tensor is: `#`, or the place along the axis `layers`, times `every`, plus `first`; and, with
    # `behind`, all that are not behind.
    every: int = 1
    first: int = 0
    behind: bool = False
    # Whether a tree may be without it.
    optional: bool = False

    @cached_property
    def spec(self) -> TensorSpec:
        return parse_axes(self.axes)

    @cached_property
    def alternatives(self) -> tuple[str, ...]:
        return expand(self.pattern)

    @property
    def writes_stream(self) -> bool:
        """Whether what it computes is added to the residual stream: all that writes embed, but for the norms."""
        return "embed" in self.spec.outputs and bool(self.spec.inputs) if self.writes is None else self.writes

    @property
    def roles(self) -> tuple[str, ...]:
        """Its role, or those along the axis `stack`."""
        return tuple(self.role.split())

    @property
    def is_head(self) -> bool:
        """Whether it is the head: what turns streams into logits."""
        return self.spec.inputs == {"embed"} and self.spec.outputs == {"vocab"}

    @property
    def is_norm(self) -> bool:
        """Whether it is the scale of a norm."""
        return self.role.endswith("_norm") or (not self.role and not self.spec.inputs)

    def matches(self, name: str) -> bool:
        return self.alternative(name) is not None

    def alternative(self, name: str) -> str | None:
        """The one of its alternatives that a name matches, or None."""
        return next((way for way in ways(name) if way in self.alternatives), None)

    def is_of_layers(self, name: str) -> bool:
        """Whether a tensor of this row is one layer, or several."""
        return "layers" in self.spec.axes or "#" in (self.alternative(name) or "")

    def index(self, name: str) -> int | None:
        """The number that stands at `#` in a name that this row matches; None where the pattern has none."""
        alternative = self.alternative(name)
        found = compiled(alternative).fullmatch(name) if alternative else None
        return int(found.group(1)) if found and found.groups() else None


@dataclass(frozen=True, eq=False)
class Family:
    """A model family: its table, and what the table cannot say."""

    name: str
    rows: tuple[Row, ...]
    # Axes whose sizes add up under fusion; all others must be equal in every source.
    grown: frozenset[str]
    # What the tree was recognised by, in words, from the shapes.
    evidence: Callable[[Mapping[str, tuple[int, ...]]], str] = field(repr=False)
    aliases: tuple[str, ...] = ()
    # Not recognised, only chosen with --arch: a damaged tree of a commoner family would look the same.
    by_name_only: bool = False
    # The module that runs the family's networks (networks/stages.py); a string, so that tables never import JAX.
    twin: str | None = None
    # What is lacking for a twin, in words, where there is none.
    lacks: tuple[str, ...] = ()
    # What its trees do not tell, by default: from the sizes of the axes and the number of layers.
    network: Callable[[Mapping[str, int]], Network] = field(default=lambda _: T5, repr=False)
    # The trainer that it is for: t5x, maxtext, gemma; and what its config may call the block, if it calls it anything.
    trainer: str = Trainer.T5X
    blocks: tuple[str, ...] = ()
    # The text of the file that its table was read from; a record keeps it. None for those that fusectl brings along.
    table: str | None = field(default=None, repr=False)

    @property
    def norms_in_groups(self) -> bool:
        """Whether its trainer can train it with a norm per source: T5X takes fusectl's network for its own."""
        return self.trainer == Trainer.T5X

    @property
    def norm_group_network(self) -> str:
        """The module of fusectl.networks whose network has a norm per source."""
        return "t5_flax" if self.trainer == Trainer.T5X else "decoder_flax"

    @property
    def rotates_heads(self) -> bool:
        """Whether rotary positions turn pairs of a head's features, of which there must be an even number."""
        return self.trainer in {Trainer.MAXTEXT, Trainer.GEMMA}

    @property
    def scales_queries_at_first(self) -> bool:
        """Whether the trainer draws the first queries smaller, for attention that does not divide by sqrt(head_dim)."""
        return self.trainer == Trainer.T5X

    @property
    def untold_settings(self) -> Mapping[str, str]:
        """Settings of the network that only a config tells, in words: of these gemma's tell two, MaxText's more."""
        if self.trainer == Trainer.T5X:
            return {}
        settings = {"attending": "rotary positions and windows", "attention_soft_cap": "soft caps"}
        if self.trainer == Trainer.MAXTEXT:
            settings |= {"norm_epsilon": "epsilon", "activation": "the activation"}
            if self.tied:
                settings[TIED_LOGITS] = "normalize_embedding_logits"
        return settings

    def require_twin(self) -> str:
        """The name of its twin's module; raises Incompatible where its networks cannot be run."""
        if self.twin is None:
            raise Incompatible(
                f"{self.name}: fusectl has no network to run it as: the levels algebra and native cannot be checked",
                details=self.lacks,
                hint="--levels files,weights runs none; neither does --equalize-by weights",
            )
        return self.twin

    def row_of(self, name: str) -> Row | None:
        """The one row that matches a parameter's name, or None."""
        return next((self._by_alternative[way] for way in ways(name) if way in self._by_alternative), None)

    @cached_property
    def tied(self) -> bool:
        """Whether its head is the embedding."""
        return not any(row.is_head for row in self.rows)

    @cached_property
    def factor_in(self) -> FactorIn:
        """What carries the factor of the mean by default: the norm before the head, if the table tells which one."""
        return FactorIn.NORM if any(row.before_head for row in self.rows) else FactorIn.HEAD

    @cached_property
    def _by_alternative(self) -> Mapping[str, Row]:
        found: dict[str, Row] = {}
        for row in self.rows:
            for alternative in row.alternatives:
                assert alternative not in found, f"{self.name}: {alternative} stands in two rows"
                found[alternative] = row
        return found


@lru_cache(maxsize=1 << 16)
def ways(name: str) -> tuple[str, ...]:
    """A name as it is, and with each one of its numbers as `#`: the patterns that it may match.

    >>> ways("layers_3/mlp/wi_0")
    ('layers_3/mlp/wi_0', 'layers_#/mlp/wi_0', 'layers_3/mlp/wi_#')
    """
    numbers = itertools.islice(_NUMBER.finditer(name), MOST_NUMBERS)
    return (name, *(f"{name[: n.start()]}#{name[n.end() :]}" for n in numbers))


def stack_of(name: str) -> str:
    """The stack that a tensor or a pattern belongs to; of a decoder that stands alone, all of it.

    >>> stack_of("encoder/layers_0/mlp/wo/kernel"), stack_of("decoder/logits_dense/kernel")
    ('encoder', 'decoder')
    """
    return ENCODER if name.startswith(f"{ENCODER}/") else DECODER
