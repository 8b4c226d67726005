"""What the experiments train on: files that every Python brings along. The report names them by their digests."""

from __future__ import annotations

import json
import locale
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fusectl.networks.examples import EOS, FIRST_BYTE


# Neither what pip has installed nor tests, which are half of the library.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
# A task's examples are drawn from so many pairs at most.
_MOST_PAIRS = 8000


def write_text(file: Path, most_bytes: int | None) -> Path:
    """The modules of the standard library in one file, in the order of their names, or its first bytes."""
    if not file.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        modules = sorted(
            each for each in root.rglob("*.py") if not _LEFT_OUT.intersection(each.relative_to(root).parts)
        )
        written = b"\n".join(module.read_bytes() for module in modules)[:most_bytes]
        _write(file, written)
    return file


def write_start(text: Path, file: Path, window: int, held_out: int) -> None:
    """Writes a text without its last windows, so many, and without what makes no whole one."""
    written = text.read_bytes()
    _write(file, written[: (len(written) // window - held_out) * window])


def task(name: str, directory: Path) -> Path:
    """A file of examples of a task: bytes of a text, and one token that classes it, always in the same order.

    See TASKS for the names.
    """
    file = directory / f"{name}.jsonl"
    if not file.exists():
        pairs = list(TASKS[name]())
        classes = {each: i for i, each in enumerate(sorted({label for _, label in pairs}))}
        order = np.random.default_rng(0).permutation(len(pairs))[:_MOST_PAIRS]
        lines = []
        for text, label in (pairs[i] for i in order):
            inputs = [*(byte + FIRST_BYTE for byte in text.encode()), EOS]
            lines.append(json.dumps({"inputs": inputs, "targets": [FIRST_BYTE + classes[label]]}))
        _write(file, ("\n".join(lines) + "\n").encode())
    return file


def _write(file: Path, values: bytes) -> None:
    # Complete or not there: a run may end at any time.
    beside = file.with_name(f"{file.name}.part")
    beside.write_bytes(values)
    beside.replace(file)


def _characters() -> Iterator[tuple[str, str]]:
    """Characters with a name that is not made from their number, and those names."""
    for code in range(0x20000):
        name = unicodedata.name(chr(code), "")
        if name and not name.endswith(f"-{code:X}") and not name.startswith("HANGUL SYLLABLE"):
            yield chr(code), name.lower()


def _categories() -> Iterator[tuple[str, str]]:
    return ((name, unicodedata.category(character)) for character, name in _characters())


def _directions() -> Iterator[tuple[str, str]]:
    return ((name, unicodedata.bidirectional(character)) for character, name in _characters())


def _encodings() -> Iterator[tuple[str, str]]:
    # Each locale once: some have an alias for every encoding.
    found = {alias.partition(".")[0]: name.partition(".")[2] for alias, name in sorted(locale.locale_alias.items())}
    yield from found.items()


TASKS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    # Of a character, by its name: its general category, and the direction in which it is written.
    "category": _categories,
    "direction": _directions,
    # Of a locale, by its name: the encoding that it has by default.
    "encoding": _encodings,
}
