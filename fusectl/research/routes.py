"""Which operators lead from a checkpoint to larger sizes, and what each of them keeps: the front door to all of them.

    self-fuse    widths that are K times as large            function, optimizer's state
    stack        the same widths, more layers                with --how identity the function; the state
    duplicate    any larger widths and depths                function
    ligo         any larger widths and depths, with data     neither; the loss is lower than that of the others

A target is written as `emb=1024,heads=16,mlp=4096,layers=12`, or taken from a config (MaxText's, gemma's, T5X's gin) or
from another checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fusectl.errors import Incompatible, NotFound, UsageError
from fusectl.families.config import GEMMA_SIZES, MAXTEXT_SIZES, read_config
from fusectl.families.kinds import Trainer
from fusectl.families.recognized import Recognized
from fusectl.families.table import DECODER, ENCODER
from fusectl.formats.registry import open_checkpoint
from fusectl.research.kinds import Way
from fusectl.rules.linear import growing_to
from fusectl.sources.opened import recognized
from fusectl.sources.packed_qkv import unpacked
from fusectl.system.given import read_given


# What a target is written with, and the axes or stacks that it is about.
WORDS = {
    "emb": "embed",
    "heads": "heads",
    "kv_heads": "kv_heads",
    "mlp": "mlp",
    "head_dim": "head_dim",
    "vocab": "vocab",
    "layers": "layers",
    "encoder_layers": ENCODER,
    "decoder_layers": DECODER,
}
# Fields of T5X's T5Config, and Flaxformer's macros for them.
_GIN = {
    "emb_dim": "embed",
    "num_heads": "heads",
    "mlp_dim": "mlp",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
    "num_encoder_layers": ENCODER,
    "num_decoder_layers": DECODER,
    "EMBED_DIM": "embed",
    "NUM_HEADS": "heads",
    "MLP_DIM": "mlp",
    "HEAD_DIM": "head_dim",
    "NUM_EMBEDDINGS": "vocab",
    "NUM_ENCODER_LAYERS": ENCODER,
    "NUM_DECODER_LAYERS": DECODER,
}
_BINDING = re.compile(rf"\s*(?:[\w./@]+\.)?({'|'.join(_GIN)})\s*=\s*([0-9]{{1,15}})\s*(?:#.*)?")
_LARGEST_GIN_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """The sizes of axes and depths of stacks to grow to, and what they were taken from."""

    sizes: Mapping[str, int]
    depths: Mapping[str, int]


# A command, and what it is given.
Step = tuple[str, Mapping[str, int | str]]


@dataclass(frozen=True)
class Route:
    """One way: what it keeps, in words, the commands that follow each other and what they are given; or why it
    does not lead there.
    """

    how: Way
    keeps: str
    steps: tuple[Step, ...] = ()
    why_not: str = ""

    def command(self, where: str) -> str:
        """The line that goes there."""
        lines = [
            " ".join(["fusectl", name, *([] if i else [shlex.quote(where)]), *map(_option, given.items())])
            for i, (name, given) in enumerate(self.steps)
        ]
        return " | ".join(lines)


def _option(pair: tuple[str, int | str]) -> str:
    return f"--{pair[0].replace('_', '-')} {pair[1]}"


def read_target(text: str, tree: Recognized) -> Target:
    """The Target that a text, a config or another checkpoint is, for a model of this tree.

    Raises UsageError for what is none of these, NotFound where there is no such file, and Incompatible for another
    vocabulary or head_dim, which no operator changes.
    """
    found = _read(text, tree)
    head_dim = tree.sizes.get("kv") or tree.sizes["joined_kv"] // tree.sizes["heads"]
    fixed = {"vocab": tree.sizes["vocab"], "head_dim": head_dim}
    ways = {"vocab": "tokens are not mapped", "head_dim": "heads keep their features; more heads are possible"}
    wrong = [
        f"{name}: {found[name]} in {text}, {n} now; {ways[name]}"
        for name, n in fixed.items()
        if found.get(name, n) != n
    ]
    if wrong:
        raise Incompatible(f"{text}: sizes that growing keeps", details=wrong)
    depths = dict.fromkeys(tree.depths, found["layers"]) if "layers" in found else {}
    depths |= {stack: found[stack] for stack in (ENCODER, DECODER) if stack in found}
    if "kv_heads" not in tree.sizes and found.get("kv_heads") == found.get("heads", tree.sizes["heads"]):
        # Configs count them for all models, trees where they are fewer than heads.
        del found["kv_heads"]
    return Target({axis: found[axis] for axis in ("embed", "heads", "kv_heads", "mlp") if axis in found}, depths)


def routes(tree: Recognized, target: Target, where: str) -> list[Route]:
    """The Routes from a tree to a target, those that lead there first; raises Incompatible where none does."""
    grown = growing_to(tree, target.sizes, target.depths, "pinv", where).grown
    deeper = {stack: n for stack, n in grown.depths.items() if n != tree.depths[stack]}
    ratios = {axis: grown.sizes[axis] / tree.sizes[axis] for axis in tree.sizes if axis in tree.family.grown}
    wider = any(ratio != 1 for ratio in ratios.values())
    if not wider and not deeper:
        raise UsageError(f"{where}: it is as large as that already")
    found = [_self_fuse(ratios, deeper), _stack(deeper, wider=wider), *_linear(tree, grown, deeper)]
    return sorted(found, key=lambda route: bool(route.why_not))


def _self_fuse(ratios: Mapping[str, float], deeper: Mapping[str, int]) -> Route:
    copies = min(ratios.values())
    keeps = "the function, exactly; the optimizer's state, exactly"
    if set(ratios.values()) != {copies} or copies < 2 or copies % 1:
        said = ", ".join(f"{axis} x {ratio:g}" for axis, ratio in ratios.items())
        why_not = f"all widths have to be the same whole number of times larger: {said}"
        return Route(Way.SELF_FUSE, keeps, why_not=why_not)
    step: Step = ("self-fuse", {"copies": int(copies), "fill": "antisymmetric"})
    if deeper:
        return Route(Way.SELF_FUSE, f"{keeps}; new layers add nothing at first", (step, _identity(deeper)))
    return Route(Way.SELF_FUSE, keeps, (step,))


def _stack(deeper: Mapping[str, int], *, wider: bool) -> Route:
    keeps = "the function, exactly (other --how do not); the optimizer's state of the layers that were there"
    if wider:
        return Route(Way.STACK, keeps, why_not="widths change, not only the number of layers")
    return Route(Way.STACK, keeps, (_identity(deeper),))


def _identity(deeper: Mapping[str, int]) -> Step:
    return "stack", {**_depth_options(deeper), "how": "identity"}


def _linear(tree: Recognized, grown: Recognized, deeper: Mapping[str, int]) -> Iterator[Route]:
    sizes = {
        word: grown.sizes[axis]
        for word, axis in WORDS.items()
        if axis in tree.family.grown and tree.sizes.get(axis) != grown.sizes.get(axis)
    }
    options: dict[str, int | str] = {**sizes, **_depth_options(deeper)}
    lossless = (
        "the function, exactly; copies of a unit stay equal until dropout, noise or rounding tells them apart; no state"
    )
    yield Route(Way.DUPLICATE, lossless, (("ligo", {**options, "steps": 0}),))
    learned = "neither function nor state; it starts from the small model's loss and learns from there"
    yield Route(Way.LIGO, learned, (("ligo", {**options, "data": "FILE"}),))


def _depth_options(depths: Mapping[str, int]) -> dict[str, int | str]:
    return {f"{stack}_layers": n for stack, n in depths.items()}


def _read(text: str, tree: Recognized) -> dict[str, int]:
    path = Path(text)
    # Of what is no path at all, too.
    there = os.path.exists(text)  # noqa: PTH110
    if "=" in text and not there:
        return dict(_pair(each, text) for each in text.split(","))
    if not there and "://" not in text:
        raise NotFound(f"{text}: no config, no checkpoint", hint="--to emb=1024,heads=16,mlp=4096,layers=12")
    if path.is_file() and path.suffix == ".gin":
        lines = read_given(path, _LARGEST_GIN_BYTES, "gin").decode(errors="replace").splitlines()
        found = {_GIN[bound[1]]: int(bound[2]) for bound in map(_BINDING.fullmatch, lines) if bound}
        if not found:
            raise UsageError(f"{text}: binds none of the sizes of a T5Config", hint=", ".join(list(_GIN)[:7]))
        return found
    if path.is_file():
        config = read_config(text)
        names = GEMMA_SIZES if config.trainer is Trainer.GEMMA else MAXTEXT_SIZES
        try:
            found = {axis: int(config.values[key]) for axis, key in names.items() if key in config.values}
        except (OverflowError, TypeError, ValueError) as error:
            raise UsageError(f"{text}: a size that is no number", details=(str(error),)) from error
        if isinstance(kinds := config.values.get("attention_types"), list):
            found["layers"] = len(kinds)
        if "layers" in found and config.values.get("decoder_block") == "gemma2":
            # MaxText counts pairs of them.
            found["layers"] *= 2
        return {("head_dim" if axis == "kv" else axis): n for axis, n in found.items()}
    other = recognized(unpacked(open_checkpoint(text)))
    sizes = {axis: n for axis, n in other.sizes.items() if axis in {"embed", "heads", "kv_heads", "mlp", "vocab"}}
    sizes["head_dim"] = other.sizes.get("kv") or other.sizes["joined_kv"] // other.sizes["heads"]
    return {**sizes, **{stack: n for stack, n in other.depths.items() if stack in tree.depths}}


def _pair(text: str, whole: str) -> tuple[str, int]:
    word, _, value = text.strip().partition("=")
    if word not in WORDS or not re.fullmatch("[0-9]{1,15}", value) or int(value) < 1:
        raise UsageError(f"--to {whole}: {text.strip()!r}", details=(f"NAME=N, with {', '.join(WORDS)}",))
    return WORDS[word], int(value)
