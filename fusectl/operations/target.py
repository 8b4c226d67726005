"""What a checkpoint is to grow to: sizes and depths, in words, from a config, or from another checkpoint.

A target is written as `emb=1024,heads=16,mlp=4096,layers=12`, or taken from a config (MaxText's, gemma's, T5X's gin).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusectl.errors import Incompatible, NotFound, UsageError
from fusectl.families.config import GEMMA_SIZES, MAXTEXT_SIZES, read_config
from fusectl.families.kinds import Trainer
from fusectl.families.recognized import Recognized
from fusectl.families.table import DECODER, ENCODER
from fusectl.formats.opening import open_checkpoint
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
# Fifteen digits at most, here and in _pair: int() raises for more than 4,300, which ended in an unexpected error.
_BINDING = re.compile(rf"\s*(?:[\w./@]+\.)?({'|'.join(_GIN)})\s*=\s*([0-9]{{1,15}})\s*(?:#.*)?")
_LARGEST_GIN_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """The sizes of axes and depths of stacks to grow to, and what they were taken from."""

    sizes: Mapping[str, int]
    depths: Mapping[str, int]


def read_target(text: str, tree: Recognized) -> Target:
    """The Target that a text, a config or another checkpoint is, for a model of this tree.

    Raises UsageError for what is none of these, NotFound where there is no such file, and Incompatible for another
    vocabulary or head_dim, which no operator changes.
    """
    found = _read(text, tree)
    fixed = {axis: n for axis, n in _sizes_of(tree).items() if axis in {"vocab", "head_dim"}}
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
    if "kv_heads" not in tree.sizes and found.get("kv_heads") == found.get("heads", tree.sizes.get("heads")):
        # Configs count them for all models, trees where they are fewer than heads.
        found.pop("kv_heads", None)
    return Target({axis: found[axis] for axis in ("embed", "heads", "kv_heads", "mlp") if axis in found}, depths)


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
    return {**_sizes_of(other), **{stack: n for stack, n in other.depths.items() if stack in tree.depths}}


def _sizes_of(tree: Recognized) -> dict[str, int]:
    """The sizes that a target may name; head_dim of models that have heads."""
    sizes = {axis: n for axis, n in tree.sizes.items() if axis in {"embed", "heads", "kv_heads", "mlp", "vocab"}}
    return sizes if tree.head_dim is None else {**sizes, "head_dim": tree.head_dim}


def _pair(text: str, whole: str) -> tuple[str, int]:
    word, _, value = text.strip().partition("=")
    if word not in WORDS or not re.fullmatch("[0-9]{1,15}", value) or int(value) < 1:
        raise UsageError(f"--to {whole}: {text.strip()!r}", details=(f"NAME=N, with {', '.join(WORDS)}",))
    return WORDS[word], int(value)
