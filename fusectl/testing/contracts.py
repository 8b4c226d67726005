"""What holds for every family, every format and every operation. Subclass one, name yours, and let pytest collect it.

fusectl's own tests run the same classes over its registries. They need pytest, which `fusectl[test]` brings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from fusectl.demo import parameter_shapes
from fusectl.errors import Corrupt, FusectlError, Incompatible
from fusectl.families.kinds import FactorIn
from fusectl.families.recognition import match, recognize
from fusectl.families.recognized import Recognized
from fusectl.families.table import Family
from fusectl.formats.kinds import Codec
from fusectl.formats.names import JOURNAL
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import epsilon, is_float
from fusectl.layout.fill import Fill
from fusectl.operations.convert import plan_conversion
from fusectl.planning.options import Options
from fusectl.planning.plan import Plan
from fusectl.rules.fusion import fused, line_up
from fusectl.testing.evaluate import evaluate, evaluate_plan
from fusectl.verbs import VERBS, Converted
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out
from fusectl.writing.journal import Journal


Array = npt.NDArray[Any]
# Sizes that no two axes share, for families of any trainer.
# An axis that is taken for another one then gives a wrong shape, and not the right shape of wrong values.
SIZES = {
    "vocab": 41,
    "embed": 12,
    "heads": 6,
    "kv_heads": 3,
    "kv": 4,
    "joined_kv": 24,
    "mlp": 22,
    "relpos_buckets": 32,
}


class FamilyTests:
    """What holds for every family: recognition, and the rule of fusion on the axes of its tensors."""

    families: ClassVar[Sequence[Family]] = ()
    sizes: ClassVar[Mapping[str, int]] = SIZES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Runs each test for each family."""
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", self.families, ids=[family.name for family in self.families])

    def shapes(self, family: Family) -> dict[str, tuple[int, ...]]:
        """The shapes of a small tree, by parameter: of two turns of layers, or of one and a layer that remains."""
        turn = max(row.every for row in family.rows)
        depth = turn + 1 if any(row.behind for row in family.rows) else 2 * turn
        depths = {"encoder": depth, "decoder": depth}
        return {name: shape for name, _, shape in parameter_shapes(family, self.sizes, depths)}

    def tree(self, family: Family) -> Recognized:
        """The small tree, recognised as this family."""
        return recognize(self.shapes(family), family.name, family)

    def test_every_tensor_has_a_row_and_every_row_a_tensor(self, family: Family) -> None:
        """A row that nothing matches is a mistake in its pattern."""
        rows, wrong = match(family, self.shapes(family))
        assert wrong == []
        assert {row.pattern for row in rows.values()} == {row.pattern for row in family.rows}

    def test_a_tree_that_lost_a_tensor_is_refused(self, family: Family) -> None:
        """Of each kind of tensor one."""
        shapes = self.shapes(family)
        for row in family.rows:
            lost = next(name for name in shapes if row.matches(name))
            with pytest.raises(Incompatible):
                recognize({name: shape for name, shape in shapes.items() if name != lost}, family.name, family)

    def test_copies_compute_what_the_source_does(self, family: Family) -> None:
        """Of three copies every kernel maps repeated inputs to repeated outputs, and to one where all share them."""
        copies, rng = 3, np.random.default_rng(0)
        tree = self.tree(family)
        fusion = line_up([tree] * copies, [1 / copies] * copies, [family.name] * copies)
        for name, row in tree.rows.items():
            axes, grown = row.spec.axes, fusion.widths.keys()
            reads = [axis for axis in axes if axis in row.spec.inputs & grown]
            source = rng.normal(size=tree.shapes[name])
            layout = fused(fusion, name, "float64", Fill(), [name] * copies)
            large = evaluate(layout, [{name: source}] * copies)
            if row.before_head and not family.tied:
                # What a norm multiplies with is its scale, or one more.
                one = 1.0 if row.is_norm and tree.network.norm_adds_one else 0.0
                weight = 1 / copies if fusion.factor_in == FactorIn.NORM else 1.0
                divided = np.concatenate([(source + one) * weight - one] * copies)
                np.testing.assert_allclose(large, divided, rtol=1e-12, atol=1e-12, err_msg=name)
            if not reads:
                continue
            left = [axis for axis in axes if axis not in reads]
            writes = [axis for axis in left if axis in row.spec.outputs & grown]
            inputs = rng.normal(size=[tree.sizes[axis] for axis in reads])
            repeated = np.zeros([copies * n for n in inputs.shape])
            for i in range(copies):
                repeated[_of_copy(i, reads, reads, repeated.shape, copies)] = inputs
            contracted = [axes.index(axis) for axis in reads]
            expected = np.tensordot(source, inputs, (contracted, range(len(reads))))
            if row.is_head and fusion.factor_in == FactorIn.NORM:
                # It sees copies that the scale of the norm before it has divided.
                repeated = repeated / copies
            found = np.tensordot(large, repeated, (contracted, range(len(reads))))
            for i in range(copies):
                own = found[_of_copy(i, left, writes, found.shape, copies)]
                np.testing.assert_allclose(own, expected, rtol=1e-12, atol=1e-12, err_msg=name)


def _of_copy(
    copy: int, axes: Sequence[str], grown: Sequence[str], shape: Sequence[int], copies: int
) -> tuple[slice, ...]:
    """The part of an array that is a copy's, along the axes that grow; all of the others."""
    return tuple(
        slice(copy * n // copies, (copy + 1) * n // copies) if axis in grown else slice(None)
        for axis, n in zip(axes, shape, strict=True)
    )


class OperationTests:
    """What holds for every operation: it writes what it planned, is resumed, proved, and remembered by copies."""

    verb: ClassVar[str]

    def plan(self, at: Path, options: Options) -> tuple[Plan, list[Checkpoint]]:
        """The plan of the operation on small sources, which it may write below `at`."""
        raise NotImplementedError

    def planned(self, at: Path) -> tuple[Plan, list[Checkpoint]]:
        """The plan, its chunks uncompressed and none of them taken from a source, so that all of it is computed."""
        return self.plan(at, Options(codec=Codec.NONE, passthrough=False))

    def test_the_row_says_what_the_record_does(self, tmp_path: Path) -> None:
        """The kind of origin, and the name of the command."""
        plan, _ = self.planned(tmp_path)
        assert isinstance(plan.record.made, VERBS[self.verb].made)
        assert plan.record.command == self.verb

    def test_what_is_written_is_what_was_planned(self, tmp_path: Path) -> None:
        """Every tensor, to a few units in the last place of its largest value."""
        plan, sources = self.planned(tmp_path)
        written = open_checkpoint(str(carry_out(plan, sources, tmp_path / "out", sync=False)))
        expected = evaluate_plan(plan, sources)
        assert written.leaves.keys() == expected.keys()
        for name, values in expected.items():
            found = written.read(name).astype(np.float64)
            dtype = written.leaves[name].dtype
            limit = max(UNITS * epsilon(dtype) if is_float(dtype) else 0.0, NOISE * self._noisy(plan, name))
            assert np.all(np.abs(found - values) <= limit * np.abs(values).max(initial=0.0)), name

    def _noisy(self, plan: Plan, name: str) -> bool:
        layout = next(output.layout for output in plan.outputs if output.name == name)
        return any(term.is_random for block in layout.blocks for term in block.terms)

    def test_an_interrupted_run_is_resumed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing appears, and the second run ends with the same bytes as one that nobody has interrupted."""
        plan, sources = self.planned(tmp_path)
        whole = carry_out(plan, sources, tmp_path / "whole", sync=False)
        with monkeypatch.context() as patch:
            # A chunk is in the journal once it is written: ending there leaves some of the output written, and one
            # thread makes that the same part each time.
            patch.setattr(Journal, "add", _ending_after(len(plan.outputs) // 2, Journal.add))
            with pytest.raises(KeyboardInterrupt):
                carry_out(plan, sources, tmp_path / "out", sync=False, jobs=1)
        assert not (tmp_path / "out").exists()
        out = carry_out(plan, sources, tmp_path / "out", sync=False, resume=True)
        assert _values(out) == _values(whole)

    def test_the_proof_passes_and_fails_for_one_changed_value(self, tmp_path: Path) -> None:
        """Of a chunk in the middle of the largest tensor the first: the files' checksums and the weights notice it."""
        plan, sources = self.planned(tmp_path)
        out = Path(str(carry_out(plan, sources, tmp_path / "out", sync=False)))
        assert verify(str(out), settings=PROOF).passed
        opened = open_checkpoint(str(out))
        largest = max((leaf for leaf in opened.leaves.values() if leaf.stored), key=lambda leaf: leaf.nbytes)
        _flip(opened, largest.name)
        assert verify(str(out), settings=replace(PROOF, levels=("files",))).passed is False
        # What has been written wrong has the checksum of what is wrong.
        assert opened.record is not None
        (out / FILE_NAME).write_bytes(replace(opened.record, tensors={}, files={}).to_json())
        assert verify(str(out), settings=replace(PROOF, levels=("weights",))).passed is False

    def test_a_copy_says_how_its_source_was_made(self, tmp_path: Path) -> None:
        """In another format, and proved there."""
        plan, sources = self.planned(tmp_path)
        out = carry_out(plan, sources, tmp_path / "out", sync=False)
        other = "orbax-zarr3" if plan.format != "orbax-zarr3" else "t5x"
        copy = carry_out(*plan_conversion(str(out), Options(format=other)), tmp_path / "copy", sync=False)
        made, original = (open_checkpoint(str(each)).record for each in (copy, out))
        assert made is not None
        assert original is not None
        assert isinstance(made.made, Converted)
        own = original.made
        assert made.made.of == (own.of if isinstance(own, Converted) else own)
        assert verify(str(copy), settings=PROOF).passed


# Units in the last place that an output may be off by: it was rounded in another order.
UNITS = 4
# What the executor's deviation of a kernel may be off by, relative to its largest value (noise.Moments).
# A deviation errs by less than 2**-18 of the kernel's largest value, and noise of the scales that tests use multiplies
# it with less than 2.
NOISE = 2.0**-17
PROOF = Settings(levels=("files", "weights"))


def _ending_after(chunks: int, add: Callable[..., None]) -> Callable[..., None]:
    """Journal.add that ends the run, as ctrl-c does, when so many chunks have been noted."""
    count = itertools.count()

    def ending(*args: Any) -> None:
        add(*args)
        if next(count) == chunks:
            raise KeyboardInterrupt

    return ending


def _values(path: Any) -> dict[str, bytes]:
    opened = open_checkpoint(str(path))
    return {name: opened.read(name).tobytes() for name in opened.leaves}


def _flip(opened: Checkpoint, name: str) -> None:
    """Changes the sign of a value of a tensor whose chunks are files and not compressed."""
    leaf = opened.leaves[name]
    assert leaf.stored is not None
    home = Path(str(opened.location.index)) / opened.file_of[name]
    index = tuple((n - 1) // (2 * c) for n, c in zip(leaf.shape, leaf.chunks, strict=True))
    file = home / leaf.stored.chunk_key(index)
    raw = bytearray(file.read_bytes())
    # Little-endian numbers end with the byte that holds their sign.
    raw[leaf.itemsize - 1] ^= 0x80
    file.write_bytes(raw)


class FormatTests:
    """What holds for every format: values and records come back, what is missing or damaged is noticed."""

    formats: ClassVar[Sequence[str]] = ()
    # Formats differ in how they treat each of these: chunks that are ragged at the edge, zeros that may be left out, a
    # dtype that numpy does not have by itself, and scalars, which T5X keeps in its index.
    values: ClassVar[Mapping[str, Array]] = {
        "target/encoder/kernel": np.arange(60, dtype=np.float32).reshape(5, 12),
        "target/encoder/zeros": np.zeros((4, 3), np.float64),
        "target/decoder/half": np.linspace(-1, 1, 7).astype(ml_dtypes.bfloat16),
        "state/param_states/0/count": np.array(7, np.int32),
        "state/step": np.array(3, np.int32),
    }
    chunks: ClassVar[Mapping[str, tuple[int, ...]]] = {"target/encoder/kernel": (2, 5)}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Runs each test for each format."""
        if "form" in metafunc.fixturenames:
            metafunc.parametrize("form", self.formats)

    def source(self, at: Path) -> str:
        """A checkpoint of these values, in T5X's format."""
        save(at / "source", self.values, "t5x", chunks=self.chunks)
        return str(at / "source")

    def written(self, at: Path, form: str, **options: Any) -> Checkpoint:
        """These values in a format, converted by the executor and opened."""
        plan, sources = plan_conversion(self.source(at), Options(format=form, **options))
        return open_checkpoint(str(carry_out(plan, sources, at / "out", sync=False)))

    @pytest.mark.parametrize("options", [{}, {"passthrough": False}, {"codec": "zstd", "sparse": True}], ids=str)
    def test_values_come_back(self, tmp_path: Path, form: str, options: Mapping[str, Any]) -> None:
        """To the bit, with their dtypes and the step, whether chunks were taken over, encoded anew or left out."""
        opened = self.written(tmp_path, form, **options)
        assert opened.format == form
        assert opened.step == 3
        assert opened.leaves.keys() == self.values.keys()
        for name, values in self.values.items():
            found = opened.read(name)
            assert (found.dtype, found.tobytes()) == (values.dtype, values.tobytes()), name

    def test_it_is_found_by_its_path(self, tmp_path: Path, form: str) -> None:
        """From the path alone, and not before it is complete."""
        opened = self.written(tmp_path, form)
        assert FORMATS[form].kind == opened.location.kind
        for name in FORMATS[form].completing:
            (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / JOURNAL).touch()
        with pytest.raises(FusectlError):
            open_checkpoint(str(tmp_path / "out"))

    def test_the_record_knows_its_checkpoint(self, tmp_path: Path, form: str) -> None:
        """The record comes back, and next to another index it is refused."""
        opened = self.written(tmp_path, form)
        assert opened.record is not None
        assert isinstance(opened.record.made, Converted)
        record = opened.record
        name = next(n for n in record.files if n.rpartition("/")[2] == FORMATS[form].index)
        others = replace(record, files={**record.files, name: "00000000"})
        (tmp_path / "out" / FILE_NAME).write_bytes(others.to_json())
        with pytest.raises(Corrupt, match="not what was written"):
            open_checkpoint(str(tmp_path / "out"))

    def test_a_chunk_that_is_gone_is_noticed(self, tmp_path: Path, form: str) -> None:
        """By the proof of files; a database whose file is gone cannot even be opened."""
        opened = self.written(tmp_path, form)
        home, name = Path(str(opened.location.index)), "target/encoder/kernel"
        stored = opened.leaves[name].stored
        assert stored is not None
        if FORMATS[form].ocdbt:
            for path in (home / "d").iterdir():
                path.unlink()
            with pytest.raises(FusectlError):
                verify(str(tmp_path / "out"), settings=Settings(levels=("files",)))
            return
        (home / opened.file_of[name] / stored.chunk_key((1, 1))).unlink()
        assert verify(str(tmp_path / "out"), settings=Settings(levels=("files",))).passed is False

    def test_an_interrupted_run_is_resumed(self, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the values of one that nobody has interrupted."""
        plan, sources = plan_conversion(self.source(tmp_path), Options(format=form, passthrough=False))
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", _ending_after(2, Journal.add))
            with pytest.raises(KeyboardInterrupt):
                carry_out(plan, sources, tmp_path / "out", sync=False, jobs=1)
        assert not (tmp_path / "out").exists()
        out = carry_out(plan, sources, tmp_path / "out", sync=False, resume=True)
        assert _values(out) == {name: values.tobytes() for name, values in self.values.items()}
