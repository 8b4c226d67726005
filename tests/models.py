"""Small random checkpoints of every family, with axis sizes that no two axes share."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import math
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fusectl.cli import run
from fusectl.demo import parameter_shapes, random_parameters, random_t5x_state
from fusectl.families.registry import FAMILIES, family_named
from fusectl.formats.encoding import Encoding
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME, signed
from fusectl.formats.registry import format_named
from fusectl.formats.sink import Manner, NewTensor, Sink, save
from fusectl.formats.tree import dict_keys
from fusectl.formats.zarr import new_storage
from fusectl.writing.journal import Journal


SIZES = {"vocab": 41, "embed": 12, "heads": 3, "kv": 5, "joined_kv": 15, "mlp": 22, "relpos_buckets": 32}
WIDER = {**SIZES, "embed": 14, "heads": 2, "joined_kv": 10, "mlp": 26}
# A layer costs a test about 3 ms a tensor, and with Adafactor's slots a decoder layer has 70 of them.
LAYERS = {"encoder": 2, "decoder": 1}
# What Orbax's versions wrote for the tests.
WRITTEN_LAYERS = {"encoder": 3, "decoder": 2}
# Of decoders, whose heads share kv heads; head_dim is even, for its rotary planes.
DECODER_SIZES = {"vocab": 41, "embed": 12, "heads": 6, "kv_heads": 3, "kv": 4, "mlp": 22}
WIDER_DECODER = {**DECODER_SIZES, "embed": 14, "heads": 4, "kv_heads": 2, "mlp": 26}

ALL_NAMES = [family.name for family in FAMILIES]
# Those of T5X.
FAMILY_NAMES = [family.name for family in FAMILIES if family.trainer == "t5x"]
DECODER_NAMES = [family.name for family in FAMILIES if family.trainer != "t5x"]
# Not recognised by itself; the tests that need no --arch leave it out.
RECOGNIZED = [family.name for family in FAMILIES if not family.by_name_only]

# What the names of a trainer's families are put together of.
PARTS = re.compile(
    r"maxtext-(?P<block>llama|qwen2|qwen3|gemma3|gemma2|gemma)(?P<mlp>-fused-mlp)?(?P<head>-tied)?(?P<layers>-scanned-0|-scanned)?"
    r"|(?P<model>gemma3|gemma2|gemma)(?P<packed>-qkv)?(?P<gates>-transposed)?(?P<names>-flat)?"
)


def parts_of(family: str) -> frozenset[tuple[str, str | None]]:
    """The choices that a decoder's family is one of, with their values."""
    match = PARTS.fullmatch(family)
    assert match, family
    trainer = ("block", "mlp", "head", "layers") if match["block"] else ("model", "packed", "gates", "names")
    return frozenset((part, match[part]) for part in trainer)


def covering(families: Sequence[str], first: Sequence[str] = ()) -> list[str]:
    """Some of the decoders' families, `first` among them, in which any two values of two choices occur together.

    One function makes all families of a trainer out of these choices, so what one of them breaks, or two that meet,
    breaks a family of these. Of the 96, these are 25 or so.
    """
    pairs = {family: {frozenset(pair) for pair in itertools.combinations(parts_of(family), 2)} for family in families}
    found = list(first)
    left = set().union(*pairs.values()).difference(*(pairs[family] for family in found))
    while left:
        best = max(families, key=lambda family: len(pairs[family] & left))
        found.append(best)
        left -= pairs[best]
    return found


def state(family: str, seed: int, sizes=None, layers=None, **kwargs):
    """A random state as the family's trainer has it: T5X's with Adafactor, others' parameters alone."""
    found = family_named(family)
    if found.trainer == "t5x":
        return random_t5x_state(found, sizes or SIZES, layers or LAYERS, seed, **kwargs)
    prefix = "params/params/" if found.trainer == "maxtext" else ""
    parameters = random_parameters(found, sizes or sizes_of(found), layers or layers_of(found), seed)
    return {prefix + name: values for name, values in parameters.items()}


def sizes_of(family) -> dict[str, int]:
    """The sizes that the tests give a family's axes."""
    if family.trainer == "t5x":
        return SIZES
    grouped = any("kv_heads" in row.spec.axes for row in family.rows)
    return {axis: n for axis, n in DECODER_SIZES.items() if grouped or axis != "kv_heads"}


def wider_of(family) -> dict[str, int]:
    """Other sizes for the same axes: heads as many for each kv head."""
    other = WIDER if family.trainer == "t5x" else WIDER_DECODER
    return {axis: other[axis] for axis in sizes_of(family)}


def layers_of(family) -> dict[str, int]:
    """The depths that the tests give a family's stacks: whole groups of layers, and some that remain."""
    if family.trainer == "t5x":
        return LAYERS
    group = max(row.every for row in family.rows)
    # Three where they stand along an axis: the axis `stack` is two long.
    along = any("layers" in row.spec.axes for row in family.rows)
    return {"decoder": 7 if group == 6 else 2 * group if group > 1 else 3 if along else 2}


def start(*words) -> multiprocessing.process.BaseProcess:
    """Starts the program in a process of its own, forked from one that has imported it: at a tenth of the time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["models", "fusectl.operations.fuse", "fusectl.operations.equalize", "rich.console"])
    process = context.Process(target=_program, args=([str(word) for word in words], dict(os.environ)))
    process.start()
    return process


def _program(words: list[str], environment: dict[str, str]) -> None:
    # The server that it is forked from may be older than what the tests have set since.
    os.environ.update(environment)
    code = run(words)
    sys.stdout.flush()
    os._exit(code)


def write_record(at: Path, tree) -> None:
    """Writes a changed fusectl.json as if fusectl had written it."""
    (at / FILE_NAME).write_bytes(signed({key: value for key, value in tree.items() if key != "crc32"}))


def contents(path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint."""
    opened = open_checkpoint(str(path))
    return {name: opened.read(name).tobytes() for name in opened.leaves}


def ends_at(n: int, error: BaseException, monkeypatch) -> None:
    """Has a run end when the n-th chunk is noted in its journal."""
    add, count = Journal.add, iter(range(10**9))

    def failing(self, *args):
        add(self, *args)
        if next(count) == n:
            raise error

    monkeypatch.setattr(Journal, "add", failing)


@cache
def _copies() -> Path:
    """A directory for checkpoints that are wanted again; it goes with the process."""
    at = tempfile.mkdtemp(prefix="fusectl-tests-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
    atexit.register(shutil.rmtree, at, ignore_errors=True)
    return Path(at)


# How often a checkpoint was asked for.
_asked: Counter[str] = Counter()


def checkpoint(at: Path, family: str = "t5-1.1", seed: int = 0, sizes=None, layers=None, format="t5x", **kwargs) -> str:
    """Writes a random training state as T5X would; its path.

    One that was asked for before is copied from the second time on: 30 ms instead of 270.
    """
    key = repr((family, seed, sizes, layers, format, sorted(kwargs.items())))
    _asked[key] += 1
    if _asked[key] == 1 or Path(at).exists():
        save(at, state(family, seed, sizes, layers, **kwargs), format)
        return str(at)
    copied = _copies() / hashlib.sha256(key.encode()).hexdigest()
    if not copied.exists():
        save(copied, state(family, seed, sizes, layers, **kwargs), format)
    shutil.copytree(copied, at, copy_function=shutil.copyfile)
    return str(at)


def metadata_only(at: Path, family: str, sizes, layers, dtype: str) -> Path:
    """A checkpoint of a family's shapes in Orbax's layout whose arrays are sparse: none of their chunks is there."""
    found, itemsize = family_named(family), 2 if dtype == "bfloat16" else 4
    prefix = "params/params/" if found.trainer == "maxtext" else ""
    tensors = []
    for name, _, shape in parameter_shapes(found, sizes, layers):
        # Rows of about 16 MiB, as a trainer on many devices writes them.
        rows = max(1, (16 << 20) // (itemsize * math.prod(shape[1:])))
        storage = new_storage(3, (min(shape[0], rows), *shape[1:]), dtype, Encoding("zstd", 3, crc32c=True))
        tensors.append(NewTensor(prefix + name, dict_keys(prefix + name), shape, dtype, storage))
    sink = Sink(at, at, format_named("orbax"), None, Manner(sparse=True))
    sink.create(tensors)
    sink.finish()
    return at
