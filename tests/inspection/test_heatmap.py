"""Heat maps of a tensor: what is measured against numpy on the whole tensor, and the pictures and refusals."""

import gc
import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from cases import first_soon
from models import SIZES, WIDER, checkpoint, state

from fusectl.errors import Incompatible, NotFound, UsageError
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.formats.tree import Checkpoint
from fusectl.inspection import heatmap
from fusectl.inspection.heatmap import measure
from fusectl.research import pictures as picture


NAME = "encoder/layers_0/mlp/wi_0/kernel"
OUT = "encoder/layers_1/attention/out/kernel"
# Inputs and outputs of kernels whose second axis counts layers.
SCANNED = {
    "encoder/encoder/mlp/wi_0/kernel": (("embed",), ("mlp",)),
    "encoder/encoder/attention/query/kernel": (("embed",), ("heads", "kv")),
    "encoder/encoder/attention/out/kernel": (("heads", "kv"), ("embed",)),
}


def fused(tmp_path, fusectl, *words, family="t5-1.1", format="t5x", sizes=(SIZES, WIDER)):
    sources = [checkpoint(tmp_path / f"s{i}", family, seed=i, sizes=each) for i, each in enumerate(sizes)]
    done = fusectl("fuse", *sources, "-o", tmp_path / "fused", "--format", format, "-q", *words)
    assert done.code == 0, done.err
    return str(tmp_path / "fused")


def later(path, at, step, change, format="t5x"):
    """The same run at another step, written by a trainer: without a record."""
    opened = open_checkpoint(path)
    values = {name: opened.read(name) for name in opened.leaves}
    values["state/step"] = np.array(step, np.int32)
    values[f"target/{NAME}"] = change(values[f"target/{NAME}"])
    save(at, values, format)
    return str(at)


def rms(values):
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def expected(matrix, rows, columns, edges):
    """Means of |W| in the cells, and rms of the blocks between borders, one by one."""
    size = np.abs(matrix.astype(np.float64))
    mean = [[size[a:b, c:d].mean() for c, d in pairwise(edges[1])] for a, b in pairwise(edges[0])]
    r, c = ([0, *borders, n] for borders, n in zip((rows, columns), matrix.shape))
    return np.array(mean), np.array([[rms(matrix[a:b, at:to]) for at, to in pairwise(c)] for a, b in pairwise(r)])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["t5x", "orbax"])
@pytest.mark.parametrize("cells", [1, 7, 512])
def test_what_is_measured_is_what_numpy_finds_in_the_whole_tensor(tmp_path, fusectl, format, cells):
    path = fused(tmp_path, fusectl, "--fill", "gaussian", format=format)
    matrix = open_checkpoint(path).read(f"target/{NAME}")

    found = measure([path], NAME, cells=cells)

    # embed 12 + 14, mlp 22 + 26: the borders of unequal widths.
    assert (found.inputs.borders, found.outputs.borders) == ((12,), (22,))
    for side, edges in zip((found.inputs, found.outputs), found.edges):
        assert (edges[0], edges[-1]) == (0, side.size)
        assert set(side.borders) <= set(edges.tolist())
        assert len(edges) - 1 == min(side.size, cells + (cells == 1))
    mean, blocks = expected(matrix, (12,), (22,), found.edges)
    np.testing.assert_allclose(found.heats[0].mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.heats[0].rms, blocks, rtol=1e-12)
    off = rms(np.concatenate([matrix[:12, 22:].ravel(), matrix[12:, :22].ravel()]))
    own = rms(np.concatenate([matrix[:12, :22].ravel(), matrix[12:, 22:].ravel()]))
    assert found.heats[0].ratio == pytest.approx(off / own, rel=1e-12)
    # Noise of 0.1 of the kernel that it stands beside.
    assert 0.08 < found.heats[0].ratio < 0.12


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), SCANNED.items())
@pytest.mark.parametrize("format", ["t5x", "orbax-zarr3"])
def test_of_stacked_layers_one_is_measured_with_heads_and_kv_flattened(tmp_path, fusectl, name, how, format):
    path = fused(tmp_path, fusectl, "--fill", "gaussian", family="scalable-t5-1.1-scanned", format=format)
    inputs, outputs = how
    opened = open_checkpoint(path)
    values = opened.read(f"target/{name}")
    widths = opened.record.widths

    def border(axes):
        return widths[axes[0]][0] * (SIZES["kv"] if len(axes) > 1 else 1)

    for layer in range(values.shape[1]):
        picked = np.take(values, layer, axis=1)
        matrix = picked.reshape(sum(widths[inputs[0]]) * (SIZES["kv"] if len(inputs) > 1 else 1), -1)
        found = measure([path], f"target/{name}", layer=layer)
        mean, blocks = expected(matrix, (border(inputs),), (border(outputs),), found.edges)

        assert (found.inputs.axes, found.outputs.axes) == (inputs, outputs)
        assert (found.inputs.borders, found.outputs.borders) == ((border(inputs),), (border(outputs),))
        np.testing.assert_allclose(found.heats[0].mean, mean, rtol=1e-12)
        np.testing.assert_allclose(found.heats[0].rms, blocks, rtol=1e-12)


@pytest.mark.slow
def test_inputs_are_the_rows_though_outputs_are_stored_first(tmp_path, fusectl):
    path = fused(tmp_path, fusectl)
    name = "encoder/relpos_bias/rel_embedding"

    found = measure([path], name)

    assert (found.inputs.axes, found.outputs.axes) == (("relpos_buckets",), ("heads",))
    assert (found.inputs.borders, found.outputs.borders) == ((), (3,))
    assert found.heats[0].ratio is None
    np.testing.assert_allclose(found.heats[0].mean, np.abs(open_checkpoint(path).read(f"target/{name}")).T, rtol=1e-12)


@pytest.mark.parametrize("format", ["t5x", "orbax"])
def test_small_chunks_and_a_small_budget_give_the_same(tmp_path, monkeypatch, format):
    name = "decoder/layers_0/self_attention/query/kernel"
    values = state("scalable-t5-1.1", 3, sizes={**SIZES, "heads": 4})
    for at, chunks in (("whole", {}), ("cut", {f"target/{name}": (5, 3, 2)})):
        save(tmp_path / at, values, format, chunks=chunks)
    regions = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, *args: regions.append(args) or read(self, *args))

    whole = measure([str(tmp_path / "whole")], name, copies=2, cells=6)
    assert len([args for args in regions if args[0].endswith(name)]) == 1
    regions.clear()
    cut = measure([str(tmp_path / "cut")], name, copies=2, cells=6, max_memory_bytes=1, jobs=3)

    sizes = [np.prod([len(r) for r in args[1]]) for args in regions if args[0].endswith(name)]
    assert (len(sizes), sum(sizes), max(sizes)) == (3 * 2 * 3, 12 * 4 * 5, 5 * 3 * 2)
    np.testing.assert_allclose(cut.heats[0].mean, whole.heats[0].mean, rtol=1e-12)
    np.testing.assert_allclose(cut.heats[0].rms, whole.heats[0].rms, rtol=1e-12)
    assert whole.outputs.borders == (10,)
    mean, _ = expected(values[f"target/{name}"].reshape(12, 20), (6,), (10,), whole.edges)
    np.testing.assert_allclose(whole.heats[0].mean, mean, rtol=1e-12)


@pytest.mark.slow
def test_the_tensor_is_never_in_memory_as_a_whole(tmp_path):
    sizes = {**SIZES, "embed": 1024, "mlp": 4096}
    values = state("t5-1.1", 0, sizes=sizes, layers={"encoder": 1, "decoder": 1})
    nbytes = values[f"target/{NAME}"].nbytes
    save(tmp_path / "cut", values, "t5x", chunks={f"target/{NAME}": (64, 256)})
    save(tmp_path / "whole", values, "t5x")
    del values

    def peak(at):
        gc.collect()
        tracemalloc.start()
        try:
            measure([str(tmp_path / at)], NAME, cells=32, max_memory_bytes=1 << 20, jobs=2)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # The first call may import and cache; that memory is not the tensor's.
    peak("cut")
    assert nbytes == 16 << 20
    assert peak("cut") < nbytes / 2
    assert peak("whole") > nbytes


@pytest.mark.slow
def test_zero_blocks_catch_up_from_step_to_step(tmp_path, fusectl):
    first = fused(tmp_path, fusectl)

    def grown(share):
        def change(values):
            noise = np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
            return np.where(values == 0, share * rms(values) * noise, values)

        return change

    third = later(first, tmp_path / "x", 3000, grown(0.5))
    second = later(first, tmp_path / "y", 2000, grown(0.1), "orbax")
    done = fusectl("plot", first, "--tensor", NAME, "--over-time", third, second, "-o", tmp_path / "p.png", "--json")

    assert done.code == 0, done.err
    result = done.json["result"]
    assert [each["step"] for each in result["checkpoints"]] == [1000, 2000, 3000]
    ratios = [each["ratio"] for each in result["checkpoints"]]
    assert ratios[0] == 0.0
    matrix = open_checkpoint(third).read(f"target/{NAME}")
    off = rms(np.concatenate([matrix[:12, 22:].ravel(), matrix[12:, :22].ravel()]))
    own = rms(np.concatenate([matrix[:12, :22].ravel(), matrix[12:, 22:].ravel()]))
    assert ratios[2] == pytest.approx(off / own, rel=1e-12)
    assert ratios[2] == pytest.approx(5 * ratios[1], rel=1e-5)
    assert result["checkpoints"][2]["rms"][0][1] == pytest.approx(rms(matrix[:12, 22:]), rel=1e-12)
    assert (result["shape"], result["inputs"]["borders"], result["outputs"]["widths"]) == ([26, 48], [12], [22, 26])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_of_many_checkpoints_some_are_drawn_and_all_are_measured(tmp_path, fusectl, monkeypatch):
    monkeypatch.setattr(heatmap, "MOST_MAPS", 3)
    first = fused(tmp_path, fusectl, "--fill", "gaussian")
    others = [later(first, tmp_path / str(i), 1000 * i, lambda values, i=i: values * i) for i in range(2, 6)]

    found = measure([first, *others], NAME)

    assert [heat.mean is not None for heat in found.heats] == [True, False, True, False, True]
    np.testing.assert_allclose([h.rms[1, 0] / found.heats[0].rms[1, 0] for h in found.heats], range(1, 6), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", first_soon(picture.PICTURES, 2))
def test_a_picture_is_drawn_in_every_format_with_its_path_on_standard_output(tmp_path, fusectl, suffix):
    path = fused(tmp_path, fusectl)
    file = tmp_path / f"out{suffix}"

    done = fusectl("plot", path, "--tensor", NAME, "-o", file)

    assert (done.code, done.out, done.err) == (0, f"{file}\n", "")
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".jpg": b"\xff\xd8"}[suffix]
    assert file.read_bytes().startswith(begins)
    assert fusectl("plot", path, "--tensor", NAME, "-o", file).code == 7
    before = file.read_bytes()
    assert fusectl("plot", path, "--tensor", OUT, "-o", file, "--force").code == 0
    assert file.read_bytes() != before


@pytest.mark.slow
def test_what_is_not_finite_is_said_and_not_drawn_as_zero(tmp_path, fusectl):
    first = fused(tmp_path, fusectl)

    def change(values):
        values = values.copy()
        values[0, 0], values[25, 1], values[3, 40] = np.nan, np.inf, -np.inf
        return values

    path = later(first, tmp_path / "odd", 2000, change)
    found = measure([first, path], NAME)
    words = ("plot", first, "--tensor", NAME, "-o", tmp_path / "o.png", "--json", "--over-time", path)
    done = fusectl(*words)

    odd = np.argwhere(~np.isfinite(found.heats[1].mean))
    assert {tuple(map(int, at)) for at in odd} == {(0, 0), (25, 1), (3, 40)}
    assert np.isfinite(found.heats[0].mean).all()
    assert done.code == 0
    assert f"note: {path}: 3 values of {NAME} are NaN or Inf" in done.err
    assert f"{first}: " not in done.err
    sound, broken = done.json["result"]["checkpoints"]
    assert (sound["nonfinite"], sound["ratio"]) == (0, 0.0)
    assert (broken["nonfinite"], broken["ratio"]) == (3, None)
    # One block of four holds none of them.
    assert [[x is None for x in row] for row in broken["rms"]] == [[True, True], [True, False]]


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_tensor_of_nothing_but_zeros_or_nan_is_drawn(tmp_path, fusectl, value):
    first = fused(tmp_path, fusectl)
    paths = [later(first, tmp_path / str(i), i, lambda values: np.full_like(values, value)) for i in (2, 3)]

    alone = fusectl("plot", paths[0], "--tensor", NAME, "-o", tmp_path / "a.png")
    done = fusectl("plot", first, "--tensor", NAME, "--over-time", *paths, "-o", tmp_path / "o.png", "--json")

    assert (alone.code, done.code) == (0, 0), alone.err + done.err
    assert [each["ratio"] for each in done.json["result"]["checkpoints"]] == [None, None, 0.0]


def test_without_a_record_there_are_no_borders_unless_copies_are_told(tmp_path, fusectl):
    path = checkpoint(tmp_path / "a")
    words = ("plot", path, "--tensor", NAME, "--force", "--json", "-o", tmp_path / "o.png")
    without, halves = fusectl(*words), fusectl(*words, "--copies", 2)

    assert without.json["result"]["inputs"]["widths"] == [12]
    assert "no fusectl.json, so no borders" in without.err
    assert "no fusectl.json" not in fusectl(*words, "--copies", 2, "--arch", "t5-1.1").err
    assert halves.code == 6
    assert "axis 'heads': 3" in halves.json["error"]["details"]
    sizes = {**SIZES, "heads": 4, "joined_kv": 20}
    even = measure([checkpoint(tmp_path / "b", sizes=sizes)], NAME, copies=2)
    assert (even.inputs.widths, even.outputs.borders) == ((6, 6), (11,))


@pytest.mark.slow
def test_many_sources_are_drawn_though_not_named(tmp_path, fusectl):
    path = fused(tmp_path, fusectl, sizes=(SIZES,) * 8)

    done = fusectl("plot", path, "--tensor", NAME, "-o", tmp_path / "o.png", "--json")

    assert done.code == 0, done.err
    assert np.array(done.json["result"]["checkpoints"][0]["rms"]).shape == (8, 8)


@pytest.mark.slow
def test_bad_requests_are_answered_before_anything_is_drawn(tmp_path, fusectl):
    path = fused(tmp_path, fusectl)
    scanned = checkpoint(tmp_path / "scanned", "scalable-t5-1.1-scanned")
    stacked = "encoder/encoder/mlp/wo/kernel"
    single = checkpoint(tmp_path / "single")
    (tmp_path / "there.png").write_text("")
    requests = [
        (path, NAME.replace("wi_0", "wi_O"), (), NotFound, f"no parameter is called .*{NAME[-11:-9]}"),
        (path, "nonsense", (), NotFound, "no parameter"),
        (path, "encoder/encoder_norm/scale", (), UsageError, "nothing to draw as a matrix"),
        (path, f"state/param_states/{NAME}/v_row", (), UsageError, "is no parameter"),
        (path, NAME, {"layer": 0}, UsageError, "stacks no layers"),
        (path, NAME, {"copies": 3}, UsageError, "is a fusion of 2"),
        (path, NAME, {"copies": 1}, UsageError, "two or more"),
        (scanned, stacked, {}, UsageError, "stacks 2 layers: which one"),
        (scanned, stacked, {"layer": 2}, UsageError, "counted from 0"),
    ]
    for at, name, how, error, words in requests:
        with pytest.raises(error, match=words):
            measure([at], name, **dict(how))
    with pytest.raises(NotFound) as raised:
        measure([path], "target/" + NAME.replace("wi_0", "wi_O"))
    assert NAME in raised.value.hint
    for paths, name, error, words in (
        ([path, path], "token_embedder/embedding", UsageError, "no zero blocks"),
        ([single, single], NAME, UsageError, "no zero blocks"),
        ([path, single], NAME, Incompatible, "not of one run"),
    ):
        with pytest.raises(error, match=words):
            measure(paths, name)
    for words, code, says in (
        (("-o", tmp_path / "o.doc"), 2, "no format of pictures"),
        (("-o", tmp_path / "there.png"), 7, "exists"),
        (("-o", tmp_path / "no" / "o.png"), 8, "no such directory"),
        ((), 2, "Missing option"),
        (("-o", tmp_path / "o.png", "--over-time"), 2, "path of the checkpoint is empty"),
        (("-o", tmp_path / "o.png", "--over-time", tmp_path / "gone"), 4, "no such directory"),
        (("-o", tmp_path / "o.png", "--max-memory", "lots"), 2, "a number of bytes"),
    ):
        done = fusectl("plot", path, "--tensor", NAME, *words)
        assert (done.code, says in done.err) == (code, True), done.err
    assert not (tmp_path / "o.png").exists()


@pytest.mark.slow
def test_checkpoints_without_a_step_have_no_place_in_time(tmp_path, fusectl):
    first = fused(tmp_path, fusectl, format="orbax")
    opened = open_checkpoint(first)
    save(tmp_path / "b", {n: opened.read(n) for n in opened.leaves if n != "state/step"}, "orbax", item=None)

    with pytest.raises(Incompatible, match="without a step") as raised:
        measure([first, str(tmp_path / "b")], NAME)

    assert raised.value.details == (str(tmp_path / "b"),)


def test_a_missing_matplotlib_is_said_before_anything_is_read(tmp_path, fusectl, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    done = fusectl("plot", tmp_path / "gone", "--tensor", NAME, "-o", tmp_path / "o.png")

    assert done.code == 2
    assert "pip install 'fusectl[plot]'" in done.err


@pytest.mark.slow
def test_damaged_chunks_are_refused(tmp_path, fusectl):
    path = fused(tmp_path, fusectl)
    chunk = next((tmp_path / "fused" / f"target.{NAME.replace('/', '.')}").glob("[0-9]*"))
    chunk.write_bytes(chunk.read_bytes()[:-9])

    done = fusectl("plot", path, "--tensor", NAME, "-o", tmp_path / "o.png")

    assert (done.code, NAME in done.err) == (5, True)
    assert not (tmp_path / "o.png").exists()
