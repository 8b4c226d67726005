"""A checkpoint of which nothing, or not everything, was read does not pass: what an index lists is read, or refused."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from cases import slow
from models import WRITTEN_LAYERS, state

from fusectl.errors import Corrupt, FusectlError, Incompatible, NotFound, UsageError
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.inspection.diff import diff
from fusectl.inspection.fsck import fsck
from fusectl.operations.convert import plan_conversion
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.verification import verify
from fusectl.verification.report import FilesResult, FunctionResult, Report
from fusectl.writing.carrying_out import carry_out


DATA = Path(__file__).parents[1] / "data/orbax-written.tar.xz"
AGGREGATING = "0.5.3"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What Orbax 0.5.3, which aggregates leaves, and 0.3.5, without `_METADATA`, wrote of a T5 with its slots."""
    root = tmp_path_factory.mktemp("orbax")
    with tarfile.open(DATA) as archive:
        wanted = [
            member
            for member in archive
            if member.name.startswith(
                (f"{AGGREGATING}/t5", "0.3.5/t5/", "0.12.8/v1_pytree", "0.12.8/strings", "0.12.8/random_keys")
            )
        ]
        archive.extractall(root, wanted, filter="data")
    return root


def converted(path, out, **options):
    plan, opened = plan_conversion(str(path), Options(**options))
    return carry_out(plan, opened, Path(out))


def edit(index, change):
    tree = json.loads(index.read_text())
    change(tree["tree_metadata"])
    index.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "which",
    ["t5_slots_aggregated", *map(slow, ["0.3.5/t5", "t5", "t5_step_aggregated", "t5_norms_aggregated"])],
)
def test_a_t5_with_aggregated_leaves_is_whole(written, tmp_path, which):
    path = written / (which if "/" in which else f"{AGGREGATING}/{which}")
    values = state("t5-1.1", 0, layers=WRITTEN_LAYERS)

    opened = open_checkpoint(str(path))

    assert opened.leaves.keys() == values.keys()
    assert all(np.array_equal(opened.read(name), values[name]) for name in values)
    plan, sources = plan_fusion([str(path)] * 2, Options())
    out = carry_out(plan, sources, tmp_path / "wide")
    report = verify(str(out))
    assert (report.passed, report.weights.slots) == (True, sum("param_states" in name for name in values))
    assert open_checkpoint(str(out)).step == values["state/step"]


def aggregated_slots(path):
    return sorted(name for name, leaf in open_checkpoint(str(path)).leaves.items() if leaf.value is not None)


LOSSES = {
    "the file of aggregated leaves": lambda at: (at / "checkpoint").unlink(),
    "half of that file": lambda at: (at / "checkpoint").write_bytes((at / "checkpoint").read_bytes()[:-2000]),
    "an aggregated leaf's entry in it": lambda at: edit(
        at / "_METADATA",
        lambda tree: tree.update(
            {
                "('target', 'more')": {
                    "key_metadata": [{"key": "target", "key_type": 2}, {"key": "more", "key_type": 2}],
                    "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": True},
                }
            }
        ),
    ),
    "the database": lambda at: (at / "manifest.ocdbt").unlink(),
}


@pytest.mark.parametrize("what", LOSSES)
def test_what_is_lost_of_a_checkpoint_with_aggregated_leaves_is_missed(written, tmp_path, fusectl, what):
    path = tmp_path / "t5"
    shutil.copytree(written / AGGREGATING / "t5_slots_aggregated", path)
    assert fsck(str(path)).problems == ()
    LOSSES[what](path)

    assert fsck(str(path)).problems
    for words in (["inspect"], ["convert", "-o", tmp_path / "out"], ["self-fuse", "-o", tmp_path / "out", "--verify"]):
        done = fusectl(words[0], path, *words[1:])
        assert done.code == 5, (words, done.err)
    assert not (tmp_path / "out").exists()


def test_an_array_that_the_index_calls_aggregated_does_not_vanish(tmp_path, fusectl):
    """The smallest of such losses, without an old Orbax: the tensor was taken for an empty node."""
    save(tmp_path / "20", {"w": np.ones((2, 3), np.float32), "v": np.ones(2, np.float32)}, "orbax-zarr2")
    edit(
        tmp_path / "20/state/_METADATA",
        lambda tree: tree["('v',)"]["value_metadata"].update(skip_deserialize=True),
    )
    shutil.rmtree(tmp_path / "20/state/v")

    for words in (["inspect"], ["inspect", "--fsck"], ["convert", "-o", tmp_path / "out"], ["diff", tmp_path / "20"]):
        done = fusectl(words[0], tmp_path / "20", *words[1:])
        assert (done.code, "v: kept in the file `checkpoint`, which has no such leaf" in done.err) == (5, True), done


@pytest.mark.parametrize("tree", [{}, {"a": None, "b": {}}])
def test_no_tensors_is_an_error_of_every_command(tmp_path, fusectl, tree):
    save(tmp_path / "20", {"w": np.ones(2, np.float32)}, "orbax-zarr2")
    entries = {
        f"('{name}',)": {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "None" if value is None else "Dict", "skip_deserialize": True},
        }
        for name, value in tree.items()
    }
    index = tmp_path / "20/state/_METADATA"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tree_metadata": entries}))
    path, out = tmp_path / "20", tmp_path / "out"

    for words in (
        ["inspect", path],
        ["diff", path, path],
        ["convert", path, "-o", out, "--verify"],
        ["fuse", path, path, "-o", out],
        ["self-fuse", path, "-o", out],
        ["noise-fill", path, "-o", out],
        ["stack", path, "--layers", 4, "-o", out],
        ["verify", path, "--sources", path, path],
        ["restart-config", path],
        ["theory", path, "--copies", 2],
        ["plot", path, "--tensor", "w", "-o", tmp_path / "w.png"],
    ):
        done = fusectl(*words)
        assert (done.code, "no tensors" in done.err) == (4, True), (words, done.err)
    assert fusectl("inspect", path, "--fsck").code == 5


def test_leaving_out_everything_is_an_error(tmp_path):
    save(tmp_path / "20", {"w": np.ones(2, np.float32)}, "orbax")

    with pytest.raises(UsageError, match="no tensor is left"):
        plan_conversion(str(tmp_path / "20"), Options(drop=("*",)))


# ---- strings


def test_strings_are_carried_left_out_or_missed(written, tmp_path, fusectl):
    path = written / "0.12.8/strings"
    texts = {node.name: node.text for node in open_checkpoint(str(path)).nodes if node.text is not None}
    assert texts

    for format in ("orbax", "t5x", "orbax-zarr3"):
        out = converted(path, tmp_path / format, format=format)
        assert verify(str(out)).passed
        assert fsck(str(out)).problems == ()
        assert {n.name: n.text for n in open_checkpoint(str(out)).nodes if n.text is not None} == texts
    back = converted(tmp_path / "t5x", tmp_path / "back", format="orbax")
    assert {node.name: node.text for node in open_checkpoint(str(back)).nodes} == texts
    assert diff(str(path), str(back)).same
    less = converted(path, tmp_path / "less", drop=tuple(texts))
    assert open_checkpoint(str(less)).nodes == ()
    assert {each.name for each in diff(str(path), str(less)).metadata} == texts.keys()
    assert min(texts) in fusectl("inspect", path, "--no-tree").out

    # A text that is another one, and one that is not there.
    index = tmp_path / "orbax/_strings.json"
    index = index if index.exists() else next((tmp_path / "orbax").rglob("_strings.json"))
    changed = json.loads(index.read_text())
    changed[next(iter(changed))] = "another"
    index.write_text(json.dumps(changed))
    assert not verify(str(tmp_path / "orbax")).passed
    index.unlink()
    with pytest.raises(Corrupt, match="_strings.json"):
        open_checkpoint(str(tmp_path / "orbax"))


def test_stock_orbax_restores_strings_that_were_carried(written, tmp_path):
    import orbax.checkpoint as ocp

    out = converted(written / "0.12.8/strings", tmp_path / "out", format="orbax")
    found = ocp.PyTreeCheckpointer().restore(open_checkpoint(str(out)).location.index)
    texts = {node.name: node.text for node in open_checkpoint(str(out)).nodes if node.text is not None}

    def at(name):
        node = found
        for part in name.split("/"):
            node = node[int(part) if isinstance(node, list | tuple) else part]
        return node

    assert {name: at(name) for name in texts} == texts


def test_leaves_of_types_that_nobody_knows_are_left_out_on_purpose_only(tmp_path, fusectl):
    save(tmp_path / "20", {"w": np.ones(2, np.float32), "odd": np.ones(2, np.float32)}, "orbax-zarr2")
    edit(
        tmp_path / "20/state/_METADATA",
        lambda tree: tree["('odd',)"]["value_metadata"].update(value_type="my.Handler"),
    )
    shutil.rmtree(tmp_path / "20/state/odd")

    with pytest.raises(Incompatible, match="leaves that fusectl cannot carry: 1"):
        plan_conversion(str(tmp_path / "20"), Options())
    assert open_checkpoint(str(converted(tmp_path / "20", tmp_path / "out", drop=("odd",)))).leaves.keys() == {"w"}
    assert "odd: a leaf of type my.Handler, not looked at" in fsck(str(tmp_path / "20")).notes
    assert "odd (my.Handler)" in fusectl("inspect", tmp_path / "20").out


# ---- keys of random numbers, and two leaves in one array


@pytest.fixture
def keyed(written):
    return written / "0.12.8/random_keys"


def generators(path):
    return {name: leaf.random_key for name, leaf in open_checkpoint(str(path)).leaves.items() if leaf.random_key}


def test_keys_of_random_numbers_keep_their_type_through_t5x_and_back(keyed, tmp_path):
    t5x = converted(keyed, tmp_path / "t5x", format="t5x")
    back = converted(t5x, tmp_path / "back", format="orbax")

    for path in (keyed, t5x, back):
        assert generators(path) == generators(keyed)
    assert set(generators(keyed).values()) == {"threefry2x32", "rbg"}
    assert verify(str(t5x)).passed
    assert verify(str(back)).passed
    assert diff(str(keyed), str(back)).same
    import jax
    import orbax.checkpoint as ocp

    target = {"w": np.zeros(3, np.float32), "fry": jax.random.key(0), "rbg": jax.random.key(0, impl="rbg")}
    restored = ocp.StandardCheckpointer().restore(open_checkpoint(str(back)).location.index, target)
    assert {name: str(restored[name].dtype) for name in generators(keyed)} == {"fry": "key<fry>", "rbg": "key<rbg>"}


def test_keys_that_have_lost_their_type_differ(keyed, tmp_path):
    back = converted(keyed, tmp_path / "back", format="orbax")
    shutil.rmtree(open_checkpoint(str(back)).location.index / "array_metadatas")
    # The list has a checksum in fusectl.json, but nobody looks for what is not there.
    found = diff(str(keyed), str(back))

    assert {(each.name, each.what, each.b) for each in found.metadata} == {
        (name, "keys of", "no generator") for name in generators(keyed)
    }
    assert not verify(str(back)).passed


def test_two_leaves_in_one_array_are_a_fault(tmp_path):
    import orbax.checkpoint as ocp

    w = np.ones((2, 2), np.float32)
    ocp.PyTreeCheckpointer().save(tmp_path / "20", {"a.b": {"c": w}, "a": {"b.c": w + 1}})

    (problem,) = {each for each in fsck(str(tmp_path / "20")).problems if "one array" in each}
    assert "a.b/c and a/b.c lie in one array, a.b.c" in problem or "a/b.c and a.b/c lie in one array" in problem
    with pytest.raises(Corrupt, match="lie in one array"):
        open_checkpoint(str(tmp_path / "20"))


# ---- names, markers, verdicts


def test_a_leaf_may_have_the_name_of_a_database_s_directory(tmp_path):
    values = {name: np.full(2, i, np.float32) for i, name in enumerate(("d", "checkpoint", "_METADATA", "c"))}
    save(tmp_path / "20", {"d": values["d"], "c": values["c"]}, "orbax-zarr3")

    for format in ("t5x", "orbax", "orbax-zarr2", "orbax-ocdbt-zarr2"):
        out = converted(tmp_path / "20", tmp_path / format, format=format)
        assert verify(str(out)).passed
    save(tmp_path / "30", values, "orbax")
    assert verify(str(converted(tmp_path / "30", tmp_path / "o30", format="orbax-ocdbt-zarr2"))).passed
    with pytest.raises(Incompatible, match="cannot hold"):
        converted(tmp_path / "30", tmp_path / "t30", format="t5x")


def test_a_step_whose_items_have_no_markers_is_committed(written):
    found = fsck(str(written / "0.12.8/v1_pytree"))

    assert found.problems == ()
    assert found.tensors


def function(passed):
    return FunctionResult(passed, 0, 0, 0, 0, 1, None, "", None, 1, 1, 60, "")


@pytest.mark.parametrize(
    ("levels", "passed", "verdict"),
    [
        ({"files": True, "weights": True, "algebra": True, "native": None}, True, "passed"),
        ({"files": True, "weights": True}, True, "passed: files and weights; the function was not checked"),
        ({"files": True}, True, "passed: files; weights and the function were not checked"),
        (
            {"files": True, "weights": True, "native": None},
            True,
            "passed: files and weights; the function was not checked",
        ),
        ({"native": None}, None, "nothing was judged"),
        ({"files": True, "algebra": False}, False, "FAILED"),
    ],
)
def test_a_verdict_names_what_was_not_checked(levels, passed, verdict):
    from fusectl.verification.claim import nothing_known
    from fusectl.verification.report import WeightsResult

    made = {
        "files": lambda ok: FilesResult(ok, 1, 1, 0, ()),
        "weights": lambda ok: WeightsResult(ok, 1, 1, 0, 0, ()),
        "algebra": function,
        "native": function,
    }
    report = Report("p", nothing_known(), **{name: made[name](ok) for name, ok in levels.items()})

    assert report.passed is passed
    assert report.verdict.startswith(verdict)
    tree = report.as_json()
    assert (tree["passed"], tree["function_checked"]) == (passed, "algebra" in levels)


@pytest.mark.slow
def test_a_level_that_nobody_judges_does_not_pass(tmp_path, fusectl):
    from models import checkpoint

    layers = {"encoder": 1, "decoder": 1}
    sources = [checkpoint(tmp_path / name, seed=i, layers=layers) for i, name in enumerate("ab")]
    assert fusectl("fuse", *sources, "-o", tmp_path / "fused").code == 0

    done = fusectl("verify", tmp_path / "fused", "--levels", "native")

    assert (done.code, "passed" in done.out) == (0, False)
    assert done.out.splitlines()[-1].startswith("nothing was judged")
    assert fusectl("verify", tmp_path / "fused", "--levels", "native", "--json").json["result"]["passed"] is None


# ---- what other libraries write


def foreign_files(root):
    """One of each kind, by the words that name it."""
    import msgpack

    packed = msgpack.packb({"params": {"w": b"values"}})
    (root / "model.npz").touch()
    np.savez(root / "model.npz", w=np.ones(3))
    files = {
        "a Flax msgpack file": ("checkpoint_7", packed),
        "an EasyLM stream": ("streaming_train_state_100", msgpack.packb((("params", "w"), packed))),
        "a NumPy archive": ("model.npz", (root / "model.npz").read_bytes()),
        "safetensors": ("model.safetensors", (20).to_bytes(8, "little") + b'{"w": {}}'),
        "a PyTorch file": ("pytorch_model.bin", b"PK\x03\x04" + bytes(26) + b"archive/data.pkl"),
        "a Python pickle": ("old.pt", b"\x80\x02}q\x00."),
        "an HDF5 file": ("model.h5", b"\x89HDF\r\n\x1a\n"),
    }
    for name, content in files.values():
        (root / name).write_bytes(content)
    return {words: root / name for words, (name, _) in files.items()}


def test_files_of_other_libraries_are_refused_by_name_with_the_way_out(tmp_path, fusectl):
    for words, path in foreign_files(tmp_path).items():
        for command in (["inspect", path], ["inspect", path, "--fsck"], ["convert", path, "-o", tmp_path / "out"]):
            done = fusectl(*command)
            assert (done.code, words in done.err, "hint: load it" in done.err) == (6, True, True), done.err


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["metadata.json", "manifest.ocdbt", "d/x"], "Levanter"),
        (["config.json", "model.safetensors"], "safetensors"),
        (["model.ckpt-1000.index", "model.ckpt-1000.data-00000-of-00002", "checkpoint"], "a TensorFlow checkpoint"),
        (["__0_0.distcp", ".metadata"], "a PyTorch file"),
        (["checkpoint/.zarray"], "ArrayCheckpointHandler"),
    ],
)
def test_directories_of_other_libraries_are_refused_by_name(tmp_path, fusectl, names, words):
    for name in names:
        (tmp_path / "at" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "at" / name).write_text("model_checkpoint_path: x")

    done = fusectl("inspect", tmp_path / "at")

    assert (done.code, words in done.err) == (6, True), done.err


def test_a_root_of_flax_s_files_is_refused_by_their_name(tmp_path, fusectl):
    foreign_files(tmp_path)
    (tmp_path / "streaming_train_state_100").unlink()

    done = fusectl("inspect", tmp_path / "latest")

    assert (done.code, "checkpoint_7: a Flax msgpack file" in done.err) == (6, True), done.err


def test_what_nobody_knows_is_no_checkpoint(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("text")

    for path in (tmp_path / "notes", tmp_path / "notes/a.txt"):
        with pytest.raises(NotFound):
            open_checkpoint(str(path))


def test_errors_are_the_project_s_own(tmp_path):
    for raw in (b"", b"\x81", b"\x92\x01", b"\xc1" * 9, b"\xdf\xff\xff\xff\xff"):
        (tmp_path / "at").mkdir(exist_ok=True)
        (tmp_path / "at/checkpoint").write_bytes(raw)
        with pytest.raises(FusectlError):
            open_checkpoint(str(tmp_path / "at"))
