"""Two thousand damaged checkpoints: no traceback, no hang, no memory without bounds, and never a wrong result."""

import json
import os
import random
import shutil
import struct
import time
from pathlib import Path

import msgpack
import pytest
from cases import diagonals
from models import checkpoint, contents

from fusectl.cli import run
from fusectl.formats.registry import FORMATS
from fusectl.formats.staging import staging_of
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.system.memory import peak_rss_bytes
from fusectl.writing.carrying_out import carry_out


MUTANTS = 400
LONGEST_S = 10.0
# Beyond what the process takes anyway.
MOST_BYTES = 500 << 20
NUMBERS = [0, -1, 1, 2**31, 2**63 - 1, 10**18, 1.5, "7", None, [], {}, True]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint that fusectl wrote and one that it did not, in every format."""
    at = tmp_path_factory.mktemp("sound")
    made = {}
    for form in FORMATS:
        layers = {"encoder": 1, "decoder": 1}
        foreign = checkpoint(at / form / "foreign", layers=layers, format=form)
        plan, sources = plan_fusion([foreign, foreign], Options(fill=Fill("gaussian", 0.1)))
        made[form] = {"written": carry_out(plan, sources, at / form / "written"), "foreign": Path(foreign)}
    return made


def flipped(raw, rng):
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 8])):
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(raw, rng):
    at, n = rng.randrange(len(raw)), rng.choice([1, 4, 8])
    value = rng.choice([b"\0", b"\xff", b"\x7f"]) * n
    return raw[:at] + value + raw[at + n :]


def edited_json(raw, rng):
    """One value of a JSON document replaced, removed, or moved."""
    try:
        tree = json.loads(raw)
    except ValueError:
        return flipped(raw, rng)
    node, path = tree, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append((node, key))
        node = node[key]
    if not path:
        return raw
    holder, key = rng.choice(path)
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice([*NUMBERS, "../../etc/passwd", "/etc/passwd", "x" * 1000])
    return json.dumps(tree).encode()


def edited_index(raw, rng):
    """One value of a T5X index replaced or removed."""
    tree = msgpack.unpackb(raw, strict_map_key=False, ext_hook=msgpack.ExtType)
    node, path = tree, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append((node, key))
        node = node[key]
    holder, key = rng.choice(path)
    if rng.random() < 0.2:
        del holder[key]
    else:
        lie = msgpack.ExtType(1, msgpack.packb([[2**40], "float32", b"1234"]))
        values = [*[n for n in NUMBERS if not isinstance(n, int) or n < 2**63], "../../etc", "/etc/passwd", lie]
        holder[key] = rng.choice(values)
    return msgpack.packb(tree)


EDITS = {
    "flip": flipped,
    "overwrite": overwritten,
    "cut": lambda raw, rng: raw[: rng.randrange(len(raw))],
    "grow": lambda raw, rng: raw + struct.pack("<Q", rng.getrandbits(64)),
    "empty": lambda raw, rng: b"",
}


def mutate(at, rng):
    """Damages a checkpoint in one place; what was done."""
    files = sorted(p for p in at.rglob("*") if p.is_file() and p.stat().st_size)
    telling = [p for p in files if p.name in {"checkpoint", ".zarray", "zarr.json"} or p.name[0] == "_"]
    chosen = rng.choice(telling if telling and rng.random() < 0.5 else files)
    raw, name = chosen.read_bytes(), chosen.relative_to(at)
    what = rng.choice(["remove", "swap", "link", "edit", "edit", "edit", *EDITS, *EDITS])
    if what == "remove":
        chosen.unlink()
    elif what == "swap":
        other = rng.choice(files)
        chosen.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    elif what == "link":
        chosen.unlink()
        chosen.symlink_to(
            rng.choice(["/etc/passwd", ".", "..", chosen.name, "/dev/zero", os.path.relpath(files[0], chosen.parent)])
        )
    elif what == "edit" and chosen.name == "checkpoint":
        chosen.write_bytes(edited_index(raw, rng))
    elif what == "edit":
        chosen.write_bytes(
            edited_json(raw, rng) if chosen in telling or chosen.suffix == ".json" else flipped(raw, rng)
        )
    else:
        chosen.write_bytes(EDITS[what](raw, rng))
    return f"{what} {name}"


@pytest.mark.slow
@pytest.mark.parametrize(("form", "whose"), diagonals(list(FORMATS), ["written", "foreign"]))
def test_no_mutant_fuses_into_something_else(sound, tmp_path, capsys, form, whose):
    """A result is wrong if it is not that of the sound source; of a foreign one no format can tell all changes."""
    rng = random.Random(f"{form} {whose}")
    source, out = sound[form][whose], tmp_path / "out"
    words = ["self-fuse", "-q", "--max-memory", "64MiB", "--no-sync"]
    assert run([*words, str(source), "-o", str(tmp_path / "right")]) == 0
    right = contents(tmp_path / "right")
    before = peak_rss_bytes()
    codes = []
    for _ in range(MUTANTS // (2 * len(FORMATS))):
        damaged = tmp_path / "damaged"
        shutil.copytree(source, damaged)
        what = mutate(damaged, rng)
        capsys.readouterr()
        began = time.monotonic()
        code = run([*words, str(damaged), "-o", str(out)])
        lasted = time.monotonic() - began
        err = capsys.readouterr().err
        assert code in {0, 2, 4, 5, 6, 8, 9}, f"{what}: {code}\n{err}"
        assert "Traceback" not in err, what
        assert lasted < LONGEST_S, what
        if code == 0 and whose == "written":
            assert contents(out) == right, what
        assert code == 0 or not out.exists(), what
        assert run(["inspect", "--fsck", "-q", str(damaged)]) in {0, 4, 5, 6, 8, 9}, what
        codes.append(code)
        for path in (damaged, out, staging_of(out)):
            shutil.rmtree(path, ignore_errors=True)
    assert sum(code != 0 for code in codes) > len(codes) // 4, "the control: most of them are noticed"
    assert peak_rss_bytes() - before < MOST_BYTES
