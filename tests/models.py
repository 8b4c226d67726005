"""Small random checkpoints of every family, with axis sizes that no two axes share."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

from fusectl.archs import FAMILIES, family_named
from fusectl.cli import run
from fusectl.demo import random_t5x_state
from fusectl.formats import open_checkpoint
from fusectl.formats.sink import save
from fusectl.journal import Journal
from fusectl.record import FILE_NAME, signed


SIZES = {"vocab": 41, "embed": 12, "heads": 3, "kv": 5, "joined_kv": 15, "mlp": 22, "relpos_buckets": 32}
WIDER = {**SIZES, "embed": 14, "heads": 2, "joined_kv": 10, "mlp": 26}
LAYERS = {"encoder": 3, "decoder": 2}

FAMILY_NAMES = [family.name for family in FAMILIES]
# Not recognised by itself; the tests that need no --arch leave it out.
RECOGNIZED = [family.name for family in FAMILIES if not family.by_name_only]


def state(family: str, seed: int, sizes=SIZES, layers=LAYERS, **kwargs):
    return random_t5x_state(family_named(family), sizes, layers, seed, **kwargs)


def start(*words) -> multiprocessing.process.BaseProcess:
    """Starts the program in a process of its own, forked from one that has imported it: at a tenth of the time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["models", "fusectl.surgery", "fusectl.equalize", "rich.console"])
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


def checkpoint(
    at: Path, family: str = "t5-1.1", seed: int = 0, sizes=SIZES, layers=LAYERS, format="t5x", **kwargs
) -> str:
    """Writes a random training state as T5X would; its path."""
    save(at, state(family, seed, sizes, layers, **kwargs), format)
    return str(at)
