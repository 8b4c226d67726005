"""The playbooks in the rooms' docstrings, each followed with a toy in a copy of the package; the files are counted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import checkpoint, save

import fusectl


PACKAGE = Path(fusectl.__file__).parent


class House:
    """A copy of the package that a stranger adds something to."""

    def __init__(self, at: Path):
        self.at = at
        shutil.copytree(PACKAGE, at / "fusectl", ignore=shutil.ignore_patterns("__pycache__"))

    def write(self, name: str, text: str) -> None:
        (self.at / "fusectl" / name).write_text(text)

    def edit(self, name: str, *changes: tuple[str, str]) -> None:
        file = self.at / "fusectl" / name
        text = file.read_text()
        for before, after in changes:
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        file.write_text(text)

    @property
    def touched(self) -> dict[str, int]:
        """The files that are new or changed, with how many lines they have more."""
        found = {}
        for path in (self.at / "fusectl").rglob("*.py"):
            name = str(path.relative_to(self.at / "fusectl"))
            before = (PACKAGE / name).read_text() if (PACKAGE / name).exists() else ""
            if path.read_text() != before:
                found[name] = len(path.read_text().splitlines()) - len(before.splitlines())
        return found

    def run(self, *words: object) -> str:
        env = {**os.environ, "PYTHONPATH": str(self.at)}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=self.at, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout

    def contract(self, text: str) -> None:
        """Runs a test file of the stranger's."""
        (self.at / "test_toy.py").write_text(text)
        assert " passed" in self.run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "test_toy.py")


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path / "house")


# ---- an operation

NEGATE_PLAN = '''"""Every parameter times -1."""

from dataclasses import replace

from fusectl.layout.blocks import Block, Layout, Term, whole
from fusectl.operations.one_source import open_one
from fusectl.planning.builder import Builder
from fusectl.planning.places import target_of
from fusectl.planning.records import own_record, source_record
from fusectl.planning.step import plan_step
from fusectl.verbs import Negated


def plan_negation(path, options, *, times=1):
    """The plan that negates so many times."""
    opened = open_one(path, options)
    out_format, item, naming = target_of(opened, options)
    builder = Builder([opened], options, out_format)
    for parameter, shape in opened.tree.shapes.items():
        tensor = opened.full(parameter)
        term = Term(0, tensor, whole(shape), (-1.0) ** times)
        axes, dtype = opened.tree.rows[parameter].spec.axes, opened.checkpoint.leaves[tensor].dtype
        builder.add(naming.full(parameter), Layout(axes, shape, dtype, (Block(whole(shape), (term,)),)), like=tensor)
    plan_step(builder, opened, options, out_format)
    record = replace(own_record(opened, "negate"), parameters=naming.prefix, made=Negated(source_record(opened), times))
    return builder.plan(record, item, []), [opened.checkpoint]
'''
NEGATE_CHECK = '''"""A negation against its source."""

from dataclasses import replace

import numpy as np

from fusectl.formats.opening import open_checkpoint
from fusectl.verification.report import WeightsResult


def check(fused, declared, settings, progress, report):
    """The report with the weights compared."""
    if report.damaged:
        return report
    made = fused.record.made
    source = open_checkpoint(declared.source or made.source.path)
    wrong = tuple(
        name
        for name in fused.leaves
        if name.startswith("target/")
        and not np.array_equal(fused.read(name), (-1.0) ** made.times * source.read(name))
    )
    return replace(report, weights=WeightsResult(not wrong, len(fused.leaves), 0, 0, 0, wrong))
'''
NEGATE_ROWS = (
    (
        "# How a checkpoint came to be:",
        '''@dataclass(frozen=True, slots=True)
class Negated(OfOne):
    """Made from `source` by negating it so many times."""

    source: SourceRecord
    times: int


# How a checkpoint came to be:''',
    ),
    ("Original = Fused | Stacked | Mapped\n", "Original = Fused | Stacked | Mapped | Negated\n"),
    (
        "VERBS = {\n",
        '''@dataclass(eq=False, repr=False)
class Times(OwnOptions):
    """Of negate."""

    times: Annotated[int, Option("How often.")] = 1


VERBS = {
''',
    ),
    (
        '        Verb("fuse", Fused,',
        """        Verb(
            "negate",
            Negated,
            "negate:plan_negation",
            ".negated",
            says="Negate a checkpoint.",
            about="Negate every parameter of a checkpoint.",
            example="fusectl negate a",
            groups=(Group.DESCRIBED, Group.STEP),
            options=Times,
        ),
        Verb("fuse", Fused,""",
    ),
)
NEGATE_TEST = """
from fusectl.testing.contracts import OperationTests
from fusectl.operations.negate import plan_negation


class TestNegate(OperationTests):
    verb = "negate"

    def plan(self, at, options):
        return plan_negation({source!r}, options)
"""


@pytest.mark.slow
def test_an_operation_takes_two_files_and_a_row(house, tmp_path):
    source = checkpoint(tmp_path / "a")
    house.write("operations/negate.py", NEGATE_PLAN)
    house.write("verification/negated.py", NEGATE_CHECK)
    house.edit("verbs.py", *NEGATE_ROWS)

    assert set(house.touched) == {"operations/negate.py", "verification/negated.py", "verbs.py"}
    assert "Negate a checkpoint" in house.run("-m", "fusectl", "--help")
    assert "--times" in house.run("-m", "fusectl", "negate", "--help")
    out = house.run("-m", "fusectl", "negate", source, "--verify").strip()
    assert out == f"{tmp_path / 'a'}.negated"
    house.contract(NEGATE_TEST.format(source=source))


# ---- a format

TOY_FORMAT = '''"""Arrays in directories, an index in JSON."""

import json
from dataclasses import dataclass
from typing import ClassVar

from fusectl.errors import Corrupt
from fusectl.formats.format import Format
from fusectl.formats.kinds import FormatName
from fusectl.formats.names import step_of
from fusectl.formats.store import Files, directory
from fusectl.formats.tree import Checkpoint, Leaf, Location, array_directory, dict_keys, stored_arrays


INDEX = "toy.json"


@dataclass(frozen=True, slots=True)
class Toy(Format):
    """One directory for each tensor, and a list of them."""

    kind: ClassVar[FormatName] = FormatName.TOY
    index: ClassVar[str] = INDEX
    completing: ClassVar[frozenset[str]] = frozenset({INDEX})
    keeps_tree: ClassVar[bool] = False
    reads_left_out: ClassVar[bool] = True

    @property
    def reserved(self):
        return {INDEX}

    def is_read_by(self, trainer):
        return False

    def find(self, at, names):
        return Location(at, at, self.kind, step=step_of(at.name)) if INDEX in names else None

    def open(self, location, record, fault=None):
        try:
            listed = json.loads((location.index / INDEX).read_text())["tensors"]
        except ValueError as error:
            raise Corrupt(f"{location.index / INDEX}: not JSON") from error
        where = str(location.home)
        files = Files(directory(str(location.index)), where)
        file_of = {name: array_directory(dict_keys(name), where) for name in listed}
        leaves = {
            name: Leaf(
                name,
                dict_keys(name),
                stored.shape,
                stored.dtype,
                stored=stored,
                store=directory(str(location.index / file_of[name])),
            )
            for name, stored in stored_arrays(files, file_of, 2, record, fault).items()
        }
        return Checkpoint(location, "toy", leaves, files=files, file_of=file_of, lenient=True, record=record)

    def closing_files(self, written):
        return {INDEX: json.dumps({"tensors": list(written.leaves)}).encode()}

    def names(self, arrays, item):
        return {INDEX, *arrays}


FORMATS = (Toy(FormatName.TOY, "A toy", 2, ocdbt=False),)
'''


@pytest.mark.slow
def test_a_format_takes_a_file_and_a_line(house, tmp_path):
    house.write("formats/toy.py", TOY_FORMAT)
    house.edit("formats/kinds.py", ('    ORBAX = "orbax"\n', '    TOY = "toy", "toy"\n    ORBAX = "orbax"\n'))

    assert house.touched.keys() == {"formats/toy.py", "formats/kinds.py"}
    assert house.touched["formats/kinds.py"] == 1
    out = house.run("-m", "fusectl", "self-fuse", checkpoint(tmp_path / "a"), "--format", "toy", "--verify").strip()
    assert "toy" in house.run("-m", "fusectl", "inspect", out)
    house.contract(
        "from fusectl.testing.contracts import FormatTests\n\n\nclass TestToy(FormatTests):\n    formats = ('toy',)\n"
    )


# ---- an optimizer

LION = '''"""optax's Lion: one average of gradients, and steps that are signs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from fusectl.optimizer.state import OptimizerState, Order, Steps, without_root
from fusectl.optimizer.trees import COLLECTION, COUNT, moment_of


@dataclass(frozen=True)
class Lion(OptimizerState):
    """The state of optax's Lion."""

    kind: str = "lion"
    orders: ClassVar[Mapping[str, Order]] = {"mu": Order.GRADIENT}
    steps: ClassVar[Steps | None] = Steps.ADAM

    @classmethod
    def find(cls, own, tree):
        moments = {name: moment_of(name, COLLECTION) for name in own}
        if any(each is None and not COUNT.fullmatch(without_root(name)) for name, each in moments.items()):
            return None
        wrong = [name for name, each in moments.items() if each and own[name] != tree.shapes.get(each[0])]
        found = {each for each in moments.values() if each}
        wrong += [name for name in tree.shapes if found & {(name, "mu"), (name, "nu")} != {(name, "mu")}]
        return cls(tuple(own), beside={name: own[name] for name, each in moments.items() if each is None}), wrong

    def slot(self, parameter, moment):
        return self._slots[parameter]

    def names_of(self, slot):
        return moment_of(slot, COLLECTION) or (None, without_root(slot))

    @cached_property
    def _slots(self):
        return {each[0]: name for name in self.names if (each := moment_of(name, COLLECTION))}
'''
LION_CHECK = """
from fusectl.formats.opening import open_checkpoint

source, fused = (open_checkpoint(path) for path in {paths!r})
name = "opt_state/0/mu/params/decoder/layers_0/mlp/wo/kernel"
small, large = source.read(name), fused.read(name)
assert (large.reshape(2, small.shape[0], 2, small.shape[1]) == small[None, :, None] / 2).all()
assert len(fused.leaves) == len(source.leaves)
"""


@pytest.mark.slow
def test_an_optimizer_takes_a_file_and_its_name(house, tmp_path):
    import numpy as np
    from models import state

    rng = np.random.default_rng(0)
    values = {n.removeprefix("target/"): v for n, v in state("t5-1.1", 0).items() if n.startswith("target/")}
    tree = {f"params/params/{name}": each for name, each in values.items()}
    tree |= {f"opt_state/0/mu/params/{name}": rng.normal(size=v.shape) for name, v in values.items()}
    save(tmp_path / "a", {**tree, "opt_state/0/count": np.array(7, np.int32), "step": np.array(7, np.int32)}, "orbax")
    house.write("optimizer/lion.py", LION)
    house.edit(
        "optimizer/registry.py",
        ("import Adam\n", "import Adam\nfrom fusectl.optimizer.lion import Lion\n"),
        ("= (Adam, Adafactor)", "= (Adam, Adafactor, Lion)"),
    )

    assert house.touched.keys() == {"optimizer/lion.py", "optimizer/registry.py"}
    assert house.touched["optimizer/registry.py"] == 1
    assert "lion" in house.run("-m", "fusectl", "inspect", tmp_path / "a")
    out = house.run("-m", "fusectl", "self-fuse", tmp_path / "a", "--verify").strip()
    house.run("-c", LION_CHECK.format(paths=(str(tmp_path / "a"), out)))


# ---- a family, and its trainer

TOY_FAMILY = '''"""A toy: an embedding, one kernel for each layer, an untied head."""

from fusectl.families.table import Family, Row


TOY_FAMILIES = (
    Family(
        "toy",
        (
            Row("decoder/table", "vocab -> embed", "embedding"),
            Row("decoder/block_#/scale", "-> embed"),
            Row("decoder/block_#/up", "embed -> mlp"),
            Row("decoder/block_#/down", "mlp -> embed"),
            Row("decoder/norm", "-> embed", "final_norm"),
            Row("decoder/head", "embed -> vocab", "head"),
        ),
        frozenset({"embed", "mlp"}),
        lambda shapes: "decoder/block_0: a toy",
        lacks=("it is a toy",),
        trainer="toy",
    ),
)
'''
TOY_TRAINER = '''"""The toy's trainer."""

from fusectl.families.kinds import Trainer
from fusectl.restart.base import Restart, require_no_gin


def restart_of(checkpoint, tree, lr_offset=0, gin=()):
    """What it has to be told."""
    require_no_gin(Trainer.TOY, lr_offset, gin)
    sizes = {"width": tree.sizes["embed"]}
    return Restart(Trainer.TOY, checkpoint.path, (), tuple(f"--{k}={v}" for k, v in sizes.items()), {"sizes": sizes})
'''


@pytest.mark.slow
def test_a_family_takes_a_file_and_its_name_and_so_does_a_trainer(house, tmp_path):
    import numpy as np

    house.write("families/toy.py", TOY_FAMILY)
    house.edit(
        "families/registry.py",
        ("import T5_FAMILIES\n", "import T5_FAMILIES\nfrom fusectl.families.toy import TOY_FAMILIES\n"),
        ("*GEMMA_FAMILIES)", "*GEMMA_FAMILIES, *TOY_FAMILIES)"),
    )
    assert house.touched.keys() == {"families/toy.py", "families/registry.py"}
    assert house.touched["families/registry.py"] == 1
    house.write("restart/toy.py", TOY_TRAINER)
    house.edit("families/kinds.py", ('"python"\n', '"python"\n    TOY = "toy", "the toy", "shell"\n'))
    assert house.touched.keys() == {"families/toy.py", "families/registry.py", "restart/toy.py", "families/kinds.py"}
    assert house.touched["families/kinds.py"] == 1

    house.contract(
        "from fusectl.families.toy import TOY_FAMILIES\nfrom fusectl.testing.contracts import FamilyTests\n\n\n"
        "class TestToy(FamilyTests):\n    families = TOY_FAMILIES\n"
    )
    rng = np.random.default_rng(0)
    shapes = {"table": (9, 4), "norm": (4,), "head": (4, 9)}
    shapes |= {f"block_{i}/{n}": s for i in (0, 1) for n, s in (("scale", (4,)), ("up", (4, 6)), ("down", (6, 4)))}
    save(
        tmp_path / "a", {f"decoder/{n}": rng.normal(size=s).astype("f") for n, s in shapes.items()}, "orbax", item=None
    )
    out = house.run("-m", "fusectl", "self-fuse", tmp_path / "a", "--verify").strip()
    assert "--width=8" in house.run("-m", "fusectl", "restart-config", out)
