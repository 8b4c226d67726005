"""inspect --fsck: what it finds in checkpoints of every format, and what nobody can find."""

import json
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
import zstandard
from cases import exhaustive, first_soon, slow, some_soon
from models import checkpoint, contents, state

from fusectl.formats.encoding import Encoding
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.formats.store import Extent
from fusectl.inspection.fsck import fsck
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.system.memory import peak_rss_bytes
from fusectl.writing.carrying_out import carry_out


KERNEL = "target.decoder.layers_0.mlp.wo.kernel"
PLAIN = [name for name, form in FORMATS.items() if not form.ocdbt]


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """A fusion in every format, as fusectl wrote it."""
    at = tmp_path_factory.mktemp("fused")
    pair = [checkpoint(at / name, seed=i) for i, name in enumerate("ab")]
    made = {}
    for form in FORMATS:
        plan, sources = plan_fusion(pair, Options(fill=Fill("gaussian", 0.1), format=form))
        made[form] = carry_out(plan, sources, at / form)
    return made


def copied(path, tmp_path):
    return Path(shutil.copytree(path, tmp_path / "copy"))


def index_of(path):
    return open_checkpoint(str(path)).location.index


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_sound_checkpoint_has_no_problems(fused, tmp_path, form):
    found = fsck(str(fused[form]))
    assert found.problems == ()
    assert found.compared > 0
    assert fsck(checkpoint(tmp_path / "foreign", format=form)).problems == ()


@pytest.mark.parametrize("files_tried", [12, slow(60)])
@pytest.mark.parametrize("form", some_soon(FORMATS, {"orbax-ocdbt-zarr3"}.__contains__))
def test_a_flipped_bit_in_each_file_is_found(fused, tmp_path, form, files_tried):
    """In every file that fusectl has written, one at a time, at a random place; the index and the markers, too.

    A database's data files also hold nodes of versions that are past, which nobody reads.
    """
    rng = random.Random(form)
    files = sorted(p.relative_to(fused[form]) for p in fused[form].rglob("*") if p.is_file() and p.stat().st_size)
    chosen = rng.sample(files, min(len(files), files_tried))
    chosen += [f for f in files if f.suffix in {".json", ".txt", ".ocdbt"} and f.name != "zarr.json"]
    chosen += [f for f in files if f.name[0] == "_"]
    missed = []
    path = copied(fused[form], tmp_path)
    before = contents(path)
    tree = open_checkpoint(str(path)).files.database
    read = [e for e in (*tree.nodes, *tree.values.values()) if isinstance(e, Extent)] if tree else []
    for file in dict.fromkeys([*chosen, *[f for f in files if f.name == "checkpoint"]]):
        raw = (path / file).read_bytes()
        places = [at for e in read if e.path == str(path / file) for at in (e.offset, e.offset + e.nbytes - 1)]
        if file.parent.name == "d" and not places:
            continue
        changed = bytearray(raw)
        changed[rng.choice(places) if places else rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (path / file).write_bytes(changed)
        # A bit that zstd does not look at changes no value.
        if not fsck(str(path)).problems and contents(path) != before:
            missed.append(str(file))
        (path / file).write_bytes(raw)
    assert not missed
    assert not fsck(str(path)).problems


FAULTS = {
    "a chunk is gone": (lambda at: (at / KERNEL / "0.0").unlink(), "is missing"),
    "a chunk is cut": (lambda at: cut(at / KERNEL / "0.0"), "cannot be decoded"),
    "a chunk is empty": (lambda at: (at / KERNEL / "0.0").write_bytes(b""), "cannot be decoded"),
    "an array has lost its metadata": (lambda at: (at / KERNEL / ".zarray").unlink(), "missing"),
    "metadata that is no JSON": (lambda at: (at / KERNEL / ".zarray").write_text("{"), "not the metadata of an array"),
    "an array that nobody names": (
        lambda at: shutil.copytree(at / KERNEL, at / "target.more.kernel"),
        "target.more.kernel: an array that the index does not name",
    ),
    "a chunk beyond the grid": (lambda at: shutil.copy(at / KERNEL / "0.0", at / KERNEL / "0.7"), "no chunk of its"),
    "another shape": (lambda at: change(at / KERNEL / ".zarray", shape=[9, 9], chunks=[9, 9]), "in its .zarray"),
    "chunks that nobody names": (
        lambda at: shutil.copytree(at / KERNEL, at / "target.more.kernel", ignore=shutil.ignore_patterns(".zarray")),
        "target.more.kernel: chunks of an array that the index does not name",
    ),
    "a dtype that is none": (
        lambda at: change(at / KERNEL / ".zarray", dtype="float32"),
        "not the metadata of an array",
    ),
    "an infinite shape": (lambda at: change(at / KERNEL / ".zarray", shape=[float("inf"), 2]), "not the metadata"),
    "a deep one": (lambda at: (at / KERNEL / ".zarray").write_text("[" * 100_000), "not the metadata of an array"),
    "another dtype": (lambda at: change(at / KERNEL / ".zarray", dtype="<i4"), "in its .zarray"),
}


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("codec", first_soon(["gzip", "zstd", "none"]))
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_foreign_t5x_checkpoints_are_listed(tmp_path, fault, codec):
    save(tmp_path / "a", state("t5-1.1", 0), "t5x", encoding=Encoding(codec, 1 if codec != "none" else 0))
    assert fsck(str(tmp_path / "a")).problems == ()
    breaks, says = FAULTS[fault]
    breaks(tmp_path / "a")

    found = fsck(str(tmp_path / "a"))

    assert [problem for problem in found.problems if says in problem], found.problems
    assert all(KERNEL.replace(".", "/") in p or KERNEL in p or "target.more" in p for p in found.problems)


def test_all_faults_are_listed_not_the_first(tmp_path, fusectl):
    path = tmp_path / "a"
    checkpoint(path)
    for stack in ("encoder", "decoder"):
        (path / f"target.{stack}.layers_0.mlp.wo.kernel/0.0").unlink()
    (path / "target.encoder.layers_1.mlp.wo.kernel/.zarray").unlink()

    done = fusectl("inspect", path, "--fsck", "--json")

    assert done.code == 5
    assert len(json.loads(done.out)["result"]["problems"]) == 3
    assert "3 problems" in done.err


@pytest.mark.parametrize("form", FORMATS)
def test_values_that_are_not_finite_are_told(tmp_path, form):
    values = state("t5-1.1", 0)
    values["target/decoder/layers_0/mlp/wo/kernel"][3, 4] = np.nan
    save(tmp_path / "a", values, form)

    assert any("nan in the chunk at [0, 0]" in problem for problem in fsck(str(tmp_path / "a")).problems)


def test_slots_that_do_not_fit_are_told(tmp_path):
    values = state("t5-1.1", 0)
    name = "state/param_states/decoder/layers_0/mlp/wo/kernel/v"
    values[name] = values[name][:-1]
    save(tmp_path / "a", values, "t5x")

    assert any(name in problem for problem in fsck(str(tmp_path / "a")).problems)


def smaller(file):
    """Makes an array half as long as it was, its chunks as they were."""
    meta = json.loads(file.read_text())
    change(file, shape=[meta["shape"][0] // 2, *meta["shape"][1:]])


@pytest.mark.parametrize(
    ("parameter", "slots"),
    [
        (
            "params/params/blocks/wi/kernel",
            ("opt_state/mu/params/blocks/wi/kernel", "opt_state/0/nu/params/blocks/wi/kernel"),
        ),
        ("model/wi/kernel/value", ("optimizer/opt_state/0/mu/wi/kernel/value",)),
        ("target/blocks/wi", ("state/param_states/0/mu/blocks/wi", "state/param_states/0/nu/blocks/wi")),
        ("target/blocks/wi", ("state/param_states/blocks/wi/v", "state/param_states/blocks/wi/m")),
    ],
)
def test_slots_of_a_tree_of_no_known_family_are_compared_by_name(tmp_path, parameter, slots):
    """A parameter that has lost a part, such as by a change to its metadata; no table says which slots are its."""
    values = {name: np.ones((24, 40), np.float32) for name in (parameter, *slots)}
    save(tmp_path / "a", values, "orbax-zarr3")
    found = fsck(str(tmp_path / "a"))
    assert found.problems == ()
    assert any("by name only" in note for note in found.notes)
    assert not any("smaller than a chunk" in note for note in found.notes)
    smaller(index_of(tmp_path / "a") / parameter.replace("/", ".") / "zarr.json")

    found = fsck(str(tmp_path / "a"))

    assert [p for p in found.problems if "of a parameter of shape [12, 40]" in p] == [*found.problems]
    assert len(found.problems) == len(slots)
    assert any("1 array is smaller than a chunk" in note for note in found.notes)


def test_factored_slots_are_told_by_the_axes_that_they_have(tmp_path):
    of = {"v_row": (3, 40), "v_col": (24,), "v": (1,), "m": (1,)}
    values = {f"state/param_states/w/{slot}": np.ones(shape, np.float32) for slot, shape in of.items()}
    save(tmp_path / "a", {"target/w": np.ones((3, 24, 40), np.float32), **values}, "t5x")
    assert fsck(str(tmp_path / "a")).problems == ()
    values["state/param_states/w/v_row"] = np.ones((40, 3), np.float32)
    save(tmp_path / "b", {"target/w": np.ones((3, 24, 40), np.float32), **values}, "t5x")
    (problem,) = fsck(str(tmp_path / "b")).problems
    assert "w/v_row: shape [40, 3]" in problem


@pytest.mark.parametrize(
    ("zarr", "changes"),
    [
        (2, {"compressor": {"id": "gzip", "level": 10}}),
        (2, {"compressor": {"id": "gzip", "level": -1}}),
        (2, {"compressor": {"id": "gzip", "level": 1, "foo": 1}}),
        (2, {"zarr_format": 1}),
        (2, {"order": "c"}),
        (2, {"dtype": "=f4"}),
        (3, {"codecs": [{"name": "bytes"}]}),
        (3, {"fill_value": "abc"}),
        (3, {"node_type": "group"}),
        (3, {"dimension_names": ["a"]}),
    ],
)
def test_metadata_that_no_reader_opens_are_a_fault_and_no_source(tmp_path, fusectl, zarr, changes):
    """Which ones there are, tests/formats/test_metadata.py asks tensorstore."""
    source = tmp_path / "a"
    codec = Encoding("gzip", 1) if zarr == 2 else Encoding()
    save(source, {"target/w": np.ones((3, 2), np.float32)}, f"orbax-zarr{zarr}", encoding=codec)
    change(index_of(source) / "target.w" / ("zarr.json" if zarr == 3 else ".zarray"), **changes)

    done = fusectl("inspect", source, "--fsck")

    assert (done.code, "not the metadata of an array" in done.err) == (5, True), done.err
    for words in (["inspect", source], ["convert", source, "-o", tmp_path / "out"]):
        done = fusectl(*words)
        assert (done.code, "target/w: not the metadata" in done.err) == (5, True), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [[], ["--fsck"]])
def test_a_codec_that_trainers_do_not_have_is_named_and_no_damage(tmp_path, fusectl, more):
    save(tmp_path / "a", {"target/w": np.ones((3, 2), np.float32)}, "orbax-zarr2")
    change(index_of(tmp_path / "a") / "target.w/.zarray", compressor={"id": "lz4", "acceleration": 1})

    done = fusectl("inspect", tmp_path / "a", *more)

    assert (done.code, "target/w: an array encoded with lz4" in done.err) == (6, True), done.err


@pytest.mark.slow
def test_a_marker_that_is_gone_is_told(fused, tmp_path):
    path = copied(fused["orbax-zarr3"], tmp_path)
    (index_of(path) / "commit_success.txt").unlink()

    problems = fsck(str(path)).problems

    assert any("commit_success.txt" in problem for problem in problems)
    foreign = tmp_path / "foreign"
    checkpoint(foreign, format="orbax-zarr3")
    for marker in foreign.rglob("commit_success.txt"):
        marker.unlink()
    found = fsck(str(foreign))
    assert found.problems == ()
    assert any("commit_success.txt" in note for note in found.notes)


@pytest.mark.parametrize("endless", ["/dev/zero", "sparse"])
def test_a_marker_without_an_end_is_told(fused, tmp_path, endless):
    path = copied(fused["orbax-zarr3"], tmp_path)
    for marker in (path / "commit_success.txt", index_of(path) / "commit_success.txt"):
        marker.unlink()
    (path / "commit_success.txt").write_text("Checkpoint commit was successful")
    if endless == "sparse":
        os.truncate(path / "commit_success.txt", 1 << 40)
    else:
        (path / "commit_success.txt").unlink()
        (path / "commit_success.txt").symlink_to(endless)
    before = peak_rss_bytes()

    problems = fsck(str(path)).problems

    assert sum("commit_success.txt" in problem for problem in problems) >= 2
    assert peak_rss_bytes() - before < 200 << 20


def test_a_database_of_a_writer_that_was_not_merged_is_told(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    checkpoint(path, format="orbax")
    checkpoint(other, family="t5-1.0", format="orbax")
    shutil.copytree(index_of(other), index_of(path) / "ocdbt.process_1")

    assert any("not in the merged database" in problem for problem in fsck(str(path)).problems)


def test_it_says_what_nobody_can_notice(tmp_path):
    """Without a checksum a flipped bit stays unseen: the limit is told, and is real."""
    save(tmp_path / "a", state("t5-1.1", 0), "t5x", encoding=Encoding())
    chunk = tmp_path / "a" / KERNEL / "0.0"
    raw = bytearray(chunk.read_bytes())
    raw[0] ^= 1
    chunk.write_bytes(raw)

    found = fsck(str(tmp_path / "a"))

    assert found.problems == ()
    assert any("none: no checksum: a changed byte does not show" in line for line in found.limits)


def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path, fusectl):
    for file in (f"{KERNEL}/0.0", f"{KERNEL}/.zarray", "checkpoint"):
        path = tmp_path / file.replace("/", "-")
        checkpoint(path)
        (path / file).unlink()
        os.mkfifo(path / file)
        assert fusectl("inspect", path, "--fsck").code in {4, 5}
        assert fusectl("self-fuse", path, "-o", tmp_path / "out").code in {4, 5}


@pytest.mark.slow
def test_a_chunk_beyond_the_budget_is_not_decoded(tmp_path, fusectl):
    """A megabyte of zstd that honestly says that it is gigabytes."""
    save(tmp_path / "a", {"target/x": np.zeros((1, 1), np.float32)}, "t5x")
    whole = {"shape": [1 << 15, 1 << 15], "chunks": [1 << 15, 1 << 15], "compressor": {"id": "zstd", "level": 1}}
    change(tmp_path / "a/target.x/.zarray", **whole)
    index = (tmp_path / "a/checkpoint").read_bytes()
    (tmp_path / "a/checkpoint").write_bytes(index.replace(b"\xa5shape\x92\x01\x01", b"\xa5shape\xc0"))
    bomb = b"".join(zstandard.ZstdCompressor(1).compress(bytes(1 << 28)) for _ in range(16))
    (tmp_path / "a/target.x/0.0").write_bytes(bomb)
    before = peak_rss_bytes()

    done = fusectl("inspect", tmp_path / "a", "--fsck")

    assert (done.code, "--max-memory" in done.err) == (9, True), done.err
    assert peak_rss_bytes() - before < 300 << 20


@pytest.mark.slow
def test_indexes_that_unfold_are_refused(tmp_path, fusectl):
    deep = [[[[0] * 60] * 60] * 60] * 60
    for i, tree in enumerate(({"target": deep}, {"target": {str(n): 0 for n in range(300_000)}})):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": tree}))
        (tmp_path / str(i) / "target.x").mkdir()
        assert fusectl("inspect", tmp_path / str(i)).code == 5
    path = tmp_path / "orbax"
    checkpoint(path, format="orbax")
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
        raw = (path / name).read_bytes()
        (path / name).write_bytes(raw + b" " * (17 << 20))
        assert fusectl("inspect", path).code == 5
        (path / name).write_bytes(raw)
    assert fusectl("inspect", path).code == 0


@pytest.mark.parametrize("number", ["999999", "999999999", "9" * 5000])
def test_a_layer_s_number_claims_nothing(tmp_path, fusectl, number):
    """A billion layers before it would be missing; of so many digits Python makes no number."""
    path = Path(checkpoint(tmp_path / "a"))
    index = msgpack.unpackb((path / "checkpoint").read_bytes(), strict_map_key=False, ext_hook=msgpack.ExtType)
    layers = index["optimizer"]["target"]["decoder"]
    layers[f"layers_{number}"] = layers.pop("layers_0")
    (path / "checkpoint").write_bytes(msgpack.packb(index))
    began, before = time.process_time(), peak_rss_bytes()

    done = fusectl("self-fuse", path, "-o", tmp_path / "out")

    assert (done.code, "unexpected" in done.err) == (6, False), done.err
    assert time.process_time() - began < 5
    assert peak_rss_bytes() - before < 200 << 20


@pytest.mark.slow
def test_names_that_no_model_has_are_not_compared_with_every_family_s(tmp_path, fusectl):
    """Twenty thousand of them, and one that is all numbers."""
    value = msgpack.ExtType(1, msgpack.packb([[], "float32", b"1234"]))
    tree = {"/".join("7" * 20_000): value, **{str(i): value for i in range(20_000)}}
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": {"target": tree}}))
    began = time.process_time()

    done = fusectl("self-fuse", tmp_path, "-o", tmp_path / "out")

    assert (done.code, "matches no model family" in done.err) == (6, True), done.err
    assert time.process_time() - began < 5


@pytest.mark.parametrize("entry", [b"[],", b"{},", b'{"a":[]},'])
def test_json_that_unfolds_in_memory_is_refused(tmp_path, fusectl, entry):
    """Sixteen megabytes of empty lists would be half a gigabyte."""
    path = Path(checkpoint(tmp_path / "a", format="orbax"))
    before = peak_rss_bytes()
    for name, most_bytes in (("state/_METADATA", 16 << 20), ("_CHECKPOINT_METADATA", 16 << 20), (FILE_NAME, 32 << 20)):
        raw = (path / name).read_bytes() if (path / name).exists() else None
        (path / name).write_bytes(b"[" + entry * (most_bytes // len(entry) - 2) + b"[]]")
        done = fusectl("inspect", path)
        assert (done.code, "entries" in done.err) == (5, True), done.err
        (path / name).unlink()
        if raw is not None:
            (path / name).write_bytes(raw)
    assert peak_rss_bytes() - before < 150 << 20
    assert fusectl("inspect", path).code == 0


def test_what_is_no_checkpoint_is_not_one(tmp_path, fusectl):
    assert fusectl("inspect", tmp_path / "nothing", "--fsck").code == 4
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": {"target": b"bytes"}}))
    assert fusectl("inspect", tmp_path, "--fsck").code == 5


def test_the_record_is_one_of_the_files(fused, tmp_path):
    path = copied(fused["t5x"], tmp_path)
    text = (path / FILE_NAME).read_text()
    (path / FILE_NAME).write_text(text.replace('"seed": 0', '"seed": 1'))

    assert any("it has been changed since it was written" in problem for problem in fsck(str(path)).problems)


FLIPS_OF_A_KIND = 40


def places_of(path):
    """Every place whose bytes somebody may read, with what it is: files, and the pieces of a database's data files."""
    files = open_checkpoint(str(path)).files
    kinds = {}
    for name in sorted(files.names):
        place = files.place(name)
        if isinstance(place, Extent):
            kinds[place] = "chunk" if re.search(r"/c(/|$)", name) else Path(name).name
    for node in files.database.nodes if files.database else ():
        kinds[node] = "node of the database"
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if file.parent.name != "d" and not any(place.path == str(file) for place in kinds):
            kinds[Extent(str(file), 0, file.stat().st_size)] = file.name
    return kinds


@pytest.mark.slow
# Orbax leaves coroutines behind when it raises.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("form", ["orbax-ocdbt-zarr3", exhaustive("orbax-zarr3")])
def test_who_notices_a_flipped_bit_in_any_file(tmp_path, form):
    """One at a time: fusectl each; unmodified Orbax each in a chunk, for the CRC-32C at the end of zarr v3's codecs.

    Of the other files Orbax reads some, and of these each bit may matter or not.
    """
    import orbax.checkpoint as ocp

    source = checkpoint(tmp_path / "a", layers={"encoder": 1, "decoder": 1})
    plan, sources = plan_fusion([source] * 2, Options(fill=Fill("gaussian", 0.1), format=form, optimizer="drop"))
    path = Path(carry_out(plan, sources, tmp_path / "out"))
    restorer, rng = ocp.PyTreeCheckpointer(), random.Random(form)

    def restored():
        leaves, tree = jax.tree.flatten(restorer.restore(path / "state"))
        return str(tree), [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, leaves)]

    right, found, missed = restored(), Counter(), []
    places = places_of(path)
    count = Counter(places.values())
    for place, kind in places.items():
        file = Path(place.path)
        raw = file.read_bytes()
        # Of what there is little of, several bits, one at a time.
        for _ in range(max(1, FLIPS_OF_A_KIND // count[kind])):
            changed = bytearray(raw)
            changed[place.offset + rng.randrange(place.nbytes)] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)
            if not fsck(str(path)).problems:
                missed.append(f"{kind}: {file}")
            try:
                found[kind, "nothing is different" if restored() == right else "silently something else"] += 1
            except Exception:
                found[kind, "refused"] += 1
        file.write_bytes(raw)
    for kind in sorted({kind for kind, _ in found}):
        says = ", ".join(f"{n} {what}" for (each, what), n in sorted(found.items()) if each == kind)
        print(f"{form}: Orbax, a flipped bit in {count[kind]} x {kind}: {says}")
    assert not missed
    assert found["chunk", "refused"] > 20
    assert {what for kind, what in found if kind == "chunk"} == {"refused"}
    assert restored() == right


def test_all_items_of_a_step_are_looked_into(tmp_path):
    """A step as Orbax's manager writes it: the model, its average, and something that is no tree of arrays."""
    import orbax.checkpoint as ocp

    # Larger than what a database keeps in its tree.
    tree = {"a": np.random.default_rng(0).random((32, 32), np.float32)}
    with ocp.CheckpointManager(tmp_path / "run", item_names=("state", "ema", "notes")) as manager:
        trees = {name: ocp.args.StandardSave(tree) for name in ("state", "ema")}
        manager.save(5, args=ocp.args.Composite(**trees, notes=ocp.args.JsonSave({"x": 1})))
    step = tmp_path / "run/5"
    sound = fsck(str(step))
    assert (sound.problems, sound.tensors) == ((), 2)
    assert any(note.startswith("notes: an item without arrays") for note in sound.notes)
    assert fsck(str(step / "state")).tensors == 1
    (place,) = (place for place, kind in places_of(step / "ema").items() if kind == "0.0")
    file = Path(place.path)
    raw = file.read_bytes()
    file.write_bytes(raw[: place.offset] + bytes(place.nbytes) + raw[place.offset + place.nbytes :])

    for at in (step, step / "ema"):
        assert any("cannot be decoded" in problem for problem in fsck(str(at)).problems)
    assert fsck(str(step / "state")).problems == ()


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("in_ocdbt", [False, True])
def test_a_list_of_arrays_that_contradicts_is_told(tmp_path, zarr3, in_ocdbt):
    """Orbax restores by it; it is sound where Orbax has cut arrays into smaller chunks, too."""
    import orbax.checkpoint as ocp

    tree = {"a": jax.numpy.ones((8, 8)), "b": {"c": jax.numpy.ones(6)}}
    saving = {"a": ocp.SaveArgs(chunk_byte_size=64), "b": {"c": ocp.SaveArgs()}}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=in_ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "a", args=ocp.args.PyTreeSave(tree, save_args=saving))
    assert fsck(str(tmp_path / "a")).problems == ()
    listing = tmp_path / "a/array_metadatas/process_0"
    text = listing.read_text()
    entries = json.loads(text)["array_metadatas"]
    assert len(entries) == 2
    for wrong, says in (
        (text.replace('"a"', '"z"'), "lists z, which the index does not name"),
        (re.sub(r'"chunk_shape": \[6\]', '"chunk_shape": [3]', text), "b.c in chunks of [3], of [6]"),
        ("{", "not a list of arrays"),
        ("[" * 100_000, "not a list of arrays"),
    ):
        assert wrong != text
        listing.write_text(wrong)
        assert any(says in problem for problem in fsck(str(tmp_path / "a")).problems), says


def test_a_bare_array_is_not_called_damaged(tmp_path, fusectl):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / "a", jax.numpy.arange(6.0))
    done = fusectl("inspect", tmp_path / "a", "--fsck")

    assert (done.code, "one bare array instead of a tree" in done.err) == (6, True), done.err


def test_what_nobody_reads_of_a_database_is_told(fused, tmp_path):
    assert not any("older versions" in note for note in fsck(str(fused["t5x"])).notes)
    path = tmp_path / "a"
    checkpoint(path, format="orbax")
    file = max((index_of(path) / "d").iterdir(), key=lambda p: p.stat().st_size)
    before = sum(int(note.split()[0].replace(",", "")) for note in fsck(str(path)).notes if "older versions" in note)
    file.write_bytes(file.read_bytes() + bytes(1234))
    assert any(note.startswith(f"{before + 1234:,} bytes") for note in fsck(str(path)).notes)
