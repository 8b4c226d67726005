"""The executor's contract: whatever the Layout, the chunks, the format, the budget and the threads, what is written is
what the Layout says, computed in memory by code that the executor does not share.
"""

import math
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusectl
from fusectl.families.recognized import UNKNOWN
from fusectl.formats.kinds import Codec
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import Record
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.formats.zarr import epsilon, np_dtype
from fusectl.layout.blocks import (
    Block,
    Expansion,
    Factor,
    Layout,
    Mapped,
    Mean,
    Noise,
    Product,
    Term,
    intersect,
    is_computed,
    whole,
)
from fusectl.layout.fill import Fill
from fusectl.planning.builder import Builder
from fusectl.planning.options import Options
from fusectl.sources.opened import Opened
from fusectl.testing.evaluate import evaluate, evaluate_plan
from fusectl.writing.carrying_out import carry_out


FILL = Fill("gaussian", 0.1, 5)
DTYPES = ["float32", "float64", "bfloat16"]
# Where one of the two has been rounded in between, or has summed up in another order: units in the last place.
UNITS = 4
# What the executor's deviation of a kernel may be off by, of its largest value (noise.Moments).
DEVIATION = 2.0**-17


def cut(draw, n, most=3):
    """Lengths that add up to n."""
    places = sorted(draw(st.sets(st.integers(1, n - 1), max_size=most - 1))) if n > 1 else []
    return [b - a for a, b in zip([0, *places], [*places, n], strict=True)]


@st.composite
def regions(draw, shape, size):
    """A region of this size in a tensor of a shape that holds it."""
    starts = [draw(st.integers(0, n - m)) for n, m in zip(shape, size, strict=True)]
    return tuple(range(a, a + m) for a, m in zip(starts, size, strict=True))


@st.composite
def cases(draw):
    """Sources' tensors with their chunks, and the Layouts of outputs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sources = [{}, {}]
    chunks = [{}, {}]

    def tensor(shape, dtype, values=None):
        """A new tensor of one of the sources: its place and name."""
        place = draw(st.integers(0, 1))
        name = f"params/t{len(sources[place])}"
        made = rng.normal(size=shape) if values is None else values
        sources[place][name] = made.astype(np_dtype(dtype))
        chunks[place][name] = tuple(draw(st.integers(1, n)) for n in shape)
        return place, name

    def term(size, dtype):
        shape = tuple(n + draw(st.integers(0, 3)) for n in size)
        place, name = tensor(shape, dtype)
        return Term(place, name, draw(regions(shape, size)), draw(st.sampled_from([1.0, 1.0, 0.5, 1 / 3, -2.0])))

    def product(size):
        axis = draw(st.integers(0, len(size) - 1))
        over = draw(st.integers(1, 4))
        values = rng.uniform(0.5, 2, (over, size[axis] + draw(st.integers(0, 2))))
        place, name = tensor(values.shape, "float32", values)
        return Product((Factor(Mean(place, name, (0,)), (axis,), draw(st.sampled_from([1.0, -0.5, 0.5]))),), 0.7)

    def mapped(size, dtype):
        axis = draw(st.integers(0, len(size) - 1))
        repeat = draw(st.sampled_from([r for r in (1, 2) if size[axis] % r == 0]))
        small = draw(st.integers(1, size[axis] // repeat))
        of = (*size[:axis], small * repeat, *size[axis + 1 :])
        matrix = rng.normal(size=(size[axis] // repeat, small))
        place, name = tensor(matrix.shape, "float64", matrix)
        own = term(of, dtype)
        inverse = draw(st.booleans()) and np.linalg.cond(matrix) < 1e3
        expansion = Expansion(axis, place, name, None, repeat, inverse)
        return Mapped(own, (expansion,), draw(st.sampled_from([0.0, 1.0])))

    layouts = {}
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = tuple(draw(st.integers(1, 9)) for _ in range(draw(st.integers(1, 3))))
        axis = draw(st.integers(0, len(shape) - 1))
        blocks, start = [], 0
        # Noise is relative to a kernel that stands in the same tensor.
        kernels = []
        for length in cut(draw, shape[axis]):
            at = tuple(range(start, start + length) if i == axis else range(n) for i, n in enumerate(shape))
            start += length
            size = tuple(map(len, at))
            kind = draw(st.sampled_from(["gap", "copy", "sum", "noise", "product", "mapped"]))
            if kind == "copy":
                terms = [term(size, dtype)]
                kernels += terms
            elif kind == "sum":
                terms = [term(size, dtype) for _ in range(draw(st.integers(2, 3)))]
            elif kind == "noise" and kernels:
                terms = [Noise(at, draw(st.sampled_from(kernels)), draw(st.sampled_from([0.1, -0.2])))]
                terms += [term(size, dtype)] if draw(st.booleans()) else []
            elif kind == "product":
                terms = [product(size), *([term(size, dtype)] if draw(st.booleans()) else [])]
            elif kind == "mapped":
                terms = [mapped(size, dtype)]
            else:
                continue
            blocks.append(Block(at, tuple(terms)))
        layouts[f"params/o{number}"] = Layout(tuple(f"a{i}" for i in range(len(shape))), shape, dtype, tuple(blocks))
    return sources, chunks, layouts


def planned(at, case, options):
    """The Plan of these Layouts, and the opened sources."""
    sources, chunks, layouts = case
    opened = []
    for i, values in enumerate(sources):
        # One of no tensors is no checkpoint.
        kept = values or {"params/none": np.zeros(1, np.float32)}
        save(at / f"s{i}", kept, "t5x" if i else "orbax", chunks=chunks[i] or None, force=True)
        opened.append(Opened(open_checkpoint(str(at / f"s{i}")), UNKNOWN, ()))
    builder = Builder(opened, options, FORMATS[options.format])
    for name, layout in layouts.items():
        builder.add(name, layout, like=None)
    # Of the sources nothing has to go anywhere.
    builder.used |= {name for each in opened for name in each.checkpoint.leaves}
    record = Record(version=fusectl.__version__, command="test", fill=FILL)
    return builder.plan(record, None, []), [each.checkpoint for each in opened]


def inverses(term, sources):
    """Of every pseudo-inverse that a summand's values are multiplied with: by how much its rounding may move a result.

    The error of B (B^T B)^-1 grows with the square of B's condition, and is relative to what it is multiplied with,
    however much of that cancels.
    """
    for each in term.expansions if isinstance(term, Mapped) else ():
        if each.inverse:
            matrix, own = sources[each.source][each.tensor], term.term
            values = sources[own.source][own.tensor][tuple(slice(r.start, r.stop) for r in own.region)]
            longest = np.linalg.norm(values.astype(np.float64) * own.scale, axis=each.axis).max()
            yield np.linalg.cond(matrix) ** 2 * np.linalg.norm(np.linalg.pinv(matrix), 2) * longest


def tolerance(layout, sources):
    """What each value may be off by: nothing where it is copied, or not covered."""
    allowed = np.zeros(layout.shape)
    for block in layout.blocks:
        if not is_computed(block.terms):
            continue
        at = tuple(slice(r.start, r.stop) for r in block.at)
        largest = 0.0
        for term in block.terms:
            alone = np.abs(evaluate(Layout(layout.axes, layout.shape, "float64", (Block(block.at, (term,)),)), sources))
            largest = largest + alone[at]
            if isinstance(term, Noise):
                kernel = sources[term.like.source][term.like.tensor].astype(np.float64)
                allowed[at] += abs(term.scale * term.like.scale) * np.abs(kernel).max() * DEVIATION * 5
            allowed[at] += UNITS * epsilon("float64") * sum(inverses(term, sources))
        allowed[at] += UNITS * epsilon(layout.dtype) * largest
    return allowed


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(),
    form=st.sampled_from(list(FORMATS)),
    codec=st.sampled_from(list(Codec)),
    budget=st.sampled_from([1 << 10, 1 << 28]),
    jobs=st.integers(1, 4),
    passthrough=st.booleans(),
)
def test_what_is_written_is_what_the_layouts_say(tmp_path, case, form, codec, budget, jobs, passthrough):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    options = Options(format=form, codec=codec, max_memory_bytes=budget, fill=FILL, passthrough=passthrough)
    plan, sources = planned(tmp_path, case, options)
    expected = evaluate_plan(plan, sources)

    carry_out(plan, sources, tmp_path / "out", jobs=jobs, sync=False)

    written = open_checkpoint(str(tmp_path / "out"))
    assert written.leaves.keys() == expected.keys()
    for name, layout in case[2].items():
        found = written.read(name)
        assert found.dtype == np_dtype(layout.dtype)
        off = np.abs(found.astype(np.float64) - expected[name].astype(np.float64))
        assert (off <= tolerance(layout, case[0])).all(), (name, off.max())


def test_one_value_elsewhere_is_noticed(tmp_path):
    """The control: the comparison fails for a value that is off, a block that is moved, and one that is left out."""
    kernel = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    own = Block(whole((3, 4)), (Term(0, "params/t0", whole((3, 4))),))
    layout = Layout(("a0", "a1"), (3, 8), "float32", (own,))
    moved = Layout(("a0", "a1"), (3, 8), "float32", (Block((range(3), range(1, 5)), own.terms),))
    sources = [{"params/t0": kernel}, {}]
    plan, opened = planned(tmp_path, (sources, [{}, {}], {"params/o0": layout}), Options(format="t5x", fill=FILL))

    (found,) = evaluate_plan(plan, opened).values()

    np.testing.assert_array_equal(found, evaluate(layout, sources))
    assert (found != evaluate(moved, sources)).any()
    assert not tolerance(layout, sources).any()
    assert intersect(own.at, (range(3), range(4, 8))) is None
    assert math.isclose(found.sum(), kernel.sum())
    with pytest.raises(ValueError, match="overlaps"):
        evaluate(Layout(layout.axes, layout.shape, "float32", (own, own)), sources)
