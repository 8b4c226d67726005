"""Checkpoints written to buckets: nothing is one before it is complete, and what was interrupted is gone on with."""

import os
import random
import signal
import time

import pytest
import servers
from cases import diagonals, exhaustive, first_soon
from models import checkpoint as whole_checkpoint
from models import contents, ends_at, start

from fusectl.errors import Corrupt, Incompatible, NotFound, OutputExists, VerificationFailed
from fusectl.formats import objects, servercopy, target, upload
from fusectl.formats.locate import locate
from fusectl.formats.names import COMMITTED, JOURNAL, LEASE, T5X_INDEX
from fusectl.formats.objects import ObjectPath
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import Sink
from fusectl.formats.store import Files
from fusectl.inspection.fsck import fsck
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion
from fusectl.planning import resources
from fusectl.planning.options import Options
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out
from fusectl.writing.journal import Journal


def checkpoint(at, **kwargs):
    """A model small enough for servers that answer a few hundred requests a second."""
    return whole_checkpoint(at, **{"layers": {"encoder": 1, "decoder": 1}, **kwargs})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    at = tmp_path_factory.mktemp("sources")
    return {
        form: [checkpoint(at / form / name, seed=i, format=form) for i, name in enumerate("ab")] for form in FORMATS
    }


@pytest.fixture
def place(bucket, request):
    """A place of its own in a bucket."""
    return ObjectPath.parse(f"{bucket.url}/{request.node.name.partition('[')[0]}-{random.randrange(10**9)}")


@pytest.fixture
def soon(monkeypatch):
    """A lease that is given up within two seconds."""
    monkeypatch.setattr(upload, "BEAT_S", 0.2)
    monkeypatch.setattr(upload, "PATIENCE_S", 2.0)
    monkeypatch.setattr(upload, "LOOK_S", 0.1)


def write(paths, out, *, fill=Fill(), **kwargs):
    options = {key: kwargs.pop(key) for key in list(kwargs) if key in {"sparse", "max_memory_bytes"}}
    plan, opened = plan_fusion([str(path) for path in paths], Options(fill=fill, optimizer="drop", **options))
    notes = []
    carry_out(plan, opened, out, note=notes.append, **kwargs)
    return notes


def names(place):
    return place.anew().files()


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [form if form in {"t5x", "orbax-ocdbt-zarr3"} else exhaustive(form) for form in FORMATS]
)
def test_what_is_written_to_a_bucket_is_what_is_written_here(sources, place, tmp_path, form):
    fill = Fill("gaussian", 0.1)
    write(sources[form], tmp_path / "here", fill=fill)

    write(sources[form], place, fill=fill)

    assert contents(place) == contents(tmp_path / "here")
    assert not {name for name in names(place) if name.startswith((JOURNAL, LEASE))}
    assert fsck(str(place)).problems == ()
    assert verify(str(place), settings=Settings(("files", "weights"))).passed


@pytest.mark.slow
def test_orbax_restores_what_was_written_to_a_bucket(sources, bucket, place, tmp_path):
    import orbax.checkpoint as ocp

    write(sources["orbax-ocdbt-zarr3"], place, sparse=False)
    here = bucket.get(place.key, tmp_path / "here")

    restored = ocp.PyTreeCheckpointer().restore(here / "state")

    assert (
        restored["target"]["decoder"]["logits_dense"]["kernel"].tobytes()
        == (contents(place)["target/decoder/logits_dense/kernel"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["t5x", "orbax-ocdbt-zarr3"])
def test_what_makes_it_a_checkpoint_is_written_last(sources, bucket, place, monkeypatch, form):
    """Every state in between that a reader could meet is refused."""
    seen = []
    original = objects._Bucket.write

    def watched(self, key, value, generation=None):
        name = key.removeprefix(f"{place.key}/")
        if not name.startswith(("fusectl-journal", "fusectl-lease")):
            with pytest.raises(Corrupt, match="never committed"):
                locate(str(place))
            with pytest.raises((Corrupt, NotFound)):
                open_checkpoint(f"{place}/state")
            seen.append(name)
        return original(self, key, value, generation)

    monkeypatch.setattr(objects._Bucket, "write", watched)
    write(sources[form], place)

    assert seen[0] == "fusectl.json"
    assert seen[-1] == (T5X_INDEX if form == "t5x" else COMMITTED)
    assert len(seen) == (2 if form == "t5x" else 5)
    assert locate(str(place)).step is None


@pytest.mark.slow
@pytest.mark.parametrize("form", ["t5x", "orbax-ocdbt-zarr3"])
def test_an_interrupted_upload_is_gone_on_with(sources, place, tmp_path, monkeypatch, form):
    monkeypatch.setattr(resources, "LARGEST_COMMIT_BYTES", 4096)
    fill = Fill("gaussian", 0.1)
    write(sources[form], tmp_path / "here", fill=fill)
    kept = []
    with monkeypatch.context() as patch:
        ends_at(30, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            write(sources[form], place, fill=fill, kept=lambda: kept.append(True))
    assert kept == [True]
    with pytest.raises(Corrupt, match="never committed"):
        open_checkpoint(str(place))
    with pytest.raises(Incompatible, match="another plan"):
        write(sources[form], place, resume=True)

    written = []
    with monkeypatch.context() as patch:
        for name in ("write", "take"):

            def counted(self, name, chunk, *args, original=getattr(Sink, name)):
                written.append((name, chunk))
                return original(self, name, chunk, *args)

            patch.setattr(Sink, name, counted)
        notes = write(sources[form], place, fill=fill, resume=True)
        again = len(written)
        write(sources[form], tmp_path / "all", fill=fill)

    assert again <= len(written) - again - 15
    # Given back at once when it was interrupted.
    assert not any("watching" in note for note in notes)
    assert contents(place) == contents(tmp_path / "here")
    assert not {name for name in names(place) if name.startswith((JOURNAL, LEASE))}
    # Once more: it is there.
    assert any("complete already" in note for note in write(sources[form], place, fill=fill, resume=True))


@pytest.mark.slow
def test_what_exists_is_never_replaced(sources, place):
    write(sources["t5x"], place)
    before = names(place)
    for force in (False, True):
        with pytest.raises(OutputExists, match="exists"):
            write(sources["t5x"], place, force=force)
    (place / "note.txt").write_bytes(b"mine")
    with pytest.raises(OutputExists, match="the source"):
        write([place, place], place / "inside")
    assert set(names(place)) == {*before, "note.txt"}


@pytest.mark.slow
def test_what_a_trainer_writes_there_meanwhile_is_left_as_it_is(sources, place):
    """It knows no lease."""
    kept = []

    def appear(_):
        (place / T5X_INDEX).write_bytes(b"precious")

    def fail(_):
        appear(_)
        raise VerificationFailed("no")

    for check, error in ((appear, OutputExists), (fail, VerificationFailed)):
        with pytest.raises(error):
            write(sources["t5x"], place, check=check, kept=lambda: kept.append(True))
        assert (place.anew() / T5X_INDEX).read_bytes() == b"precious"
        assert "fusectl.json" not in names(place)
        place.anew().remove()
    assert kept == [True]


@pytest.mark.slow
def test_a_record_leads_into_no_bucket_that_nobody_has_named(sources, bucket, place, tmp_path, fusectl, monkeypatch):
    remote = bucket.put(sources["t5x"][0], f"{place.key}/source")
    words = ["self-fuse", remote, "-o", tmp_path / "out", "--optimizer", "drop", "--no-sync"]
    # Whoever fuses has named it.
    assert fusectl(*words, "--verify").code == 0
    copy = fusectl("convert", remote, "-o", tmp_path / "copy", "--no-sync", "--verify")
    assert copy.code == 0, copy.err
    for out, named in (("out", [remote, remote]), ("copy", [remote])):
        with monkeypatch.context() as patch:
            patch.setattr(objects._Bucket, "_store", property(lambda self: pytest.fail(f"{self.name} is asked")))
            done = fusectl("verify", tmp_path / out, "--levels", "files,weights")
            assert (done.code, f"--sources {remote}" in done.err) == (2, True), done.err
            assert fusectl("verify", tmp_path / out, "--levels", "files").code == 0
        assert fusectl("verify", tmp_path / out, "--levels", "files,weights", "--sources", *named).code == 0


def test_a_run_that_fails_for_good_leaves_nothing(sources, place):
    def refuse(_):
        raise VerificationFailed("no")

    with pytest.raises(VerificationFailed):
        write(sources["orbax-ocdbt-zarr3"], place, check=refuse)
    assert names(place) == []


@pytest.mark.slow
def test_a_proof_ships_with_it(sources, place, fusectl):
    done = fusectl("fuse", *sources["t5x"], "-o", place, "--optimizer", "drop", "--verify")
    assert (done.code, done.out) == (0, f"{place}\n"), done
    assert {"fusectl-verify.json", "fusectl-verify.md"} <= set(names(place))


@pytest.mark.slow
def test_of_two_that_write_one_output_one_wins(sources, place, soon):
    paths, begun = sources["t5x"], []

    def second(_):
        begun.append(True)
        with pytest.raises(OutputExists, match="another process is writing"):
            write(paths, place)

    write(paths, place, check=second)

    assert begun
    assert verify(str(place), settings=Settings(("files", "weights"))).passed


@pytest.mark.slow
def test_who_has_lost_the_place_stops_and_touches_nothing(sources, place, soon, monkeypatch):
    """As a machine that slept while another one took over."""
    monkeypatch.setattr(upload, "BEAT_S", 60.0)

    def taken(_):
        (place / LEASE).write_bytes(b'{"holder": "another"}')

    with pytest.raises(OutputExists, match="taken it over"):
        write(sources["t5x"], place, check=taken)
    assert LEASE in names(place)
    assert JOURNAL in names(place)
    assert T5X_INDEX not in names(place)


@pytest.mark.slow
def test_a_lease_whose_writer_is_gone_is_taken(sources, place, soon):
    (place / LEASE).write_bytes(b'{"holder": "gone"}')
    (place / JOURNAL).write_bytes(b'{"schema": "fusectl/journal/1", "plan": "x", "names": ["target.old"]}\n')
    (place / "target.old/0").write_bytes(b"1234")

    notes = write(sources["t5x"], place)

    assert any("watching" in note for note in notes)
    assert verify(str(place), settings=Settings(("files",))).passed
    assert "target.old/0" not in names(place)


@pytest.mark.slow
def test_nothing_is_removed_that_fusectl_has_not_written(sources, place, soon):
    (place / "checkpoint_1000/checkpoint").write_bytes(b"of somebody else")
    for resume in (False, True):
        (place / LEASE).write_bytes(b'{"holder": "gone"}')
        with pytest.raises(OutputExists, match="checkpoint_1000, which it has not written"):
            write(sources["t5x"], place, resume=resume)
    assert "checkpoint_1000/checkpoint" in names(place)
    # Nor is anything written below a place where somebody else is writing.
    (place / LEASE).write_bytes(b'{"holder": "alive"}')
    with pytest.raises(OutputExists, match="lies inside"):
        write(sources["t5x"], place / "checkpoint_2000")


@pytest.mark.slow
def test_who_comes_while_another_one_finishes_leaves_what_that_one_has_written(sources, place, soon, monkeypatch):
    """The lease goes while it is watched: its writer has finished."""
    write(sources["t5x"], place)
    finished, index = set(names(place)), (place / T5X_INDEX).read_bytes()
    (place / LEASE).write_bytes(b'{"holder": "finishing"}')
    (place / T5X_INDEX).remove()
    watch = upload.Lease._watch

    def watched(self, generation):
        (place / T5X_INDEX).write_bytes(index)
        (place / LEASE).remove()
        return watch(self, generation)

    monkeypatch.setattr(upload.Lease, "_watch", watched)
    with pytest.raises(OutputExists):
        write(sources["t5x"], place)
    assert set(names(place)) == finished
    assert verify(str(place), settings=Settings(("files",))).passed


@pytest.mark.slow
def test_a_writer_that_slept_touches_nothing_of_its_successors(sources, place, soon, monkeypatch):
    """The first one is stopped while it writes; the second one takes over, and finishes; then the first one goes on."""
    monkeypatch.setattr(upload, "BEAT_S", 60.0)
    add, asleep = Journal.add, []

    def slow(self, *args):
        add(self, *args)
        if len(asleep) == 0:
            asleep.append(True)
            monkeypatch.setattr(Journal, "add", add)
            write(sources["t5x"], place, fill=Fill("gaussian", 0.1, 7))
            monkeypatch.setattr(upload, "FENCE_S", 0.0)

    monkeypatch.setattr(Journal, "add", slow)
    with pytest.raises(OutputExists, match="taken it over"):
        write(sources["t5x"], place, fill=Fill("gaussian", 0.1, 1), jobs=1)
    assert asleep
    report = verify(str(place), settings=Settings(("files", "weights")))
    assert report.passed, report.failures()
    assert report.record.fill.seed == 7
    assert not {name for name in names(place) if name.startswith(LEASE)}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["publish", "clear_journal"])
def test_an_interrupt_at_the_end_loses_nothing(sources, place, monkeypatch, moment):
    original = getattr(upload, moment, None) or upload._publish

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        if T5X_INDEX in names(place):
            raise KeyboardInterrupt

    monkeypatch.setattr(upload, "_publish" if moment == "publish" else moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(sources["t5x"], place)
    monkeypatch.undo()
    assert verify(str(place), settings=Settings(("files", "weights"))).passed
    assert any("complete already" in note for note in write(sources["t5x"], place, resume=True))
    assert not {name for name in names(place) if name.startswith((JOURNAL, LEASE))}


@pytest.mark.slow
@pytest.mark.parametrize("garbage", first_soon([b"\xff\x00", b"[" * 100_000, b"[]", b"7"]))
def test_garbage_in_a_lease_is_another_ones(sources, place, soon, garbage):
    def spoil(_):
        (place / LEASE).write_bytes(garbage)

    with pytest.raises(OutputExists, match="taken it over"):
        write(sources["t5x"], place, check=spoil)
    assert JOURNAL in names(place)


@pytest.mark.slow
def test_the_proof_stands_before_what_makes_it_a_checkpoint(sources, place, monkeypatch, fusectl):
    order, original = [], objects._Bucket.write

    def watched(self, key, value, generation=None):
        order.append(key.rpartition("/")[2])
        return original(self, key, value, generation)

    monkeypatch.setattr(objects._Bucket, "write", watched)
    done = fusectl("fuse", *sources["t5x"], "-o", place, "--optimizer", "drop", "--verify")
    assert done.code == 0, done.err
    assert order.index("fusectl-verify.json") < order.index(T5X_INDEX)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("{}/../other/x", ". and .. mean nothing"),
        ("{}/a/./b", ". and .. mean nothing"),
        ("s3://", "names no bucket"),
        ("gs:///x", "names no bucket"),
    ],
)
def test_urls_that_lead_elsewhere_are_refused(sources, s3, fusectl, url, says):
    done = fusectl("fuse", *sources["t5x"], "-o", url.format(s3.url))
    assert (done.code, says in done.err) == (2, True), done.err
    assert fusectl("inspect", url.format(s3.url)).code == 2


def test_an_object_is_no_place_for_a_checkpoint(sources, place, fusectl):
    place.write_bytes(b"mine")
    done = fusectl("fuse", *sources["t5x"], "-o", str(place).replace("s3:", "S3:"))
    assert (done.code, "an object" in done.err) == (7, True), done.err
    assert place.anew().read_bytes() == b"mine"


@pytest.mark.slow
def test_sources_in_a_bucket_that_were_replaced_are_not_mixed(sources, s3, tmp_path, monkeypatch):
    paths = [s3.put(path, f"replaced/{i}") for i, path in enumerate(sources["t5x"])]
    with monkeypatch.context() as patch:
        ends_at(30, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            write(paths, tmp_path / "out")
    s3.put(sources["t5x"][1], "replaced/0")
    with pytest.raises(Incompatible, match="another plan"):
        write(paths, tmp_path / "out", resume=True)


@pytest.mark.slow
def test_a_source_in_a_bucket_that_is_replaced_while_it_is_read_is_not_mixed(sources, s3, tmp_path, monkeypatch):
    path = s3.put(sources["t5x"][0], "moving/0")
    add, count = Journal.add, iter(range(10**9))

    def replacing(self, *args):
        add(self, *args)
        if next(count) == 20:
            s3.put(sources["t5x"][1], "moving/0")

    monkeypatch.setattr(Journal, "add", replacing)
    with pytest.raises(Corrupt, match="changed while it was being read"):
        write([path, path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def through(s3, monkeypatch):
    """Everything goes through a proxy that answers what `faults["fault"](method, path)` says."""
    faults, asked = {}, []

    def fault(method, path):
        asked.append((method, path))
        return faults["fault"](method, path) if faults else None

    with servers.proxy(s3.port, fault) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield faults, asked


@pytest.mark.slow
def test_what_stands_in_the_bucket_is_copied_there(sources, s3, through, tmp_path, monkeypatch):
    _, asked = through
    write(sources["t5x"], tmp_path / "here")
    paths = [s3.put(path, f"copied/{i}") for i, path in enumerate(sources["t5x"])]
    asked.clear()

    plan, opened = plan_fusion(paths, Options(check=False, optimizer="drop"))
    carry_out(plan, opened, ObjectPath.parse(f"{s3.url}/copied/out"))

    taken = [o for o in plan.outputs if o.passed]
    assert len(taken) > 10
    read = [p for m, p in asked if m == "GET" and "wo.kernel/" in p and "zarray" not in p and "out" not in p]
    assert read == []
    assert contents(f"{s3.url}/copied/out") == contents(tmp_path / "here")
    # Without the library the same comes about, through this machine.
    monkeypatch.setattr(servercopy, "find_spec", lambda _: None)
    asked.clear()
    notes = []
    carry_out(plan, opened, ObjectPath.parse(f"{s3.url}/copied/by-hand"), note=notes.append)
    assert any("fusectl[s3]" in note for note in notes)
    assert [p for m, p in asked if m == "GET" and "wo.kernel/" in p and "zarray" not in p and "by-hand" not in p]
    assert contents(f"{s3.url}/copied/by-hand") == contents(tmp_path / "here")


@pytest.mark.slow
def test_gcs_copies_within_itself(sources, gcs, tmp_path, monkeypatch):
    write(sources["t5x"], tmp_path / "here")
    paths = [gcs.put(path, f"copied/{i}") for i, path in enumerate(sources["t5x"])]
    copied, read = [], []
    take, bytes_of = target.Objects.take, Files.bytes_of

    def taken(self, key, files, name):
        copied.append(name)
        return take(self, key, files, name)

    def asked(self, name):
        read.append(name)
        return bytes_of(self, name)

    monkeypatch.setattr(target.Objects, "take", taken)
    monkeypatch.setattr(Files, "bytes_of", asked)
    plan, opened = plan_fusion(paths, Options(check=False, optimizer="drop"))
    carry_out(plan, opened, ObjectPath.parse(f"{gcs.url}/copied/out"))

    assert len(copied) > 10
    assert set(copied).isdisjoint(read)
    assert contents(f"{gcs.url}/copied/out") == contents(tmp_path / "here")


@pytest.mark.slow
def test_a_busy_server_is_asked_again(sources, s3, through, tmp_path):
    faults, _ = through
    write(sources["t5x"], tmp_path / "here")
    refused = random.Random(0)

    def busy(_method, _path):
        return (503, b"<Error><Code>SlowDown</Code></Error>") if refused.random() < 0.1 else None

    faults["fault"] = busy
    out = ObjectPath.parse(f"{s3.url}/busy-{random.randrange(10**9)}")
    write(sources["t5x"], out)
    faults.clear()
    assert contents(out) == contents(tmp_path / "here")


@pytest.mark.slow
def test_connections_that_are_cut_are_made_again(sources, s3, through, tmp_path):
    faults, _ = through
    write(sources["t5x"], tmp_path / "here")
    cut = random.Random(1)
    faults["fault"] = lambda _method, _path: "cut" if cut.random() < 0.05 else None
    out = ObjectPath.parse(f"{s3.url}/cut-{random.randrange(10**9)}")
    write(sources["t5x"], out)
    faults.clear()
    assert contents(out) == contents(tmp_path / "here")


ERRORS = {
    "denied": (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
    "expired": (400, b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"),
    "busy": (503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"),
    "failing": (500, b"<Error><Code>InternalError</Code></Error>"),
    "cut": "cut",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"),
    diagonals(list(ERRORS), ["t5x", "orbax-ocdbt-zarr3"]),
)
def test_storage_that_fails_for_good_is_told_and_gone_on_with(
    sources, s3, through, tmp_path, monkeypatch, fusectl, soon, kind, form
):
    monkeypatch.setitem(objects._RETRIES, "max_retries", 2)
    faults, _ = through
    out = f"{s3.url}/fails-{random.randrange(10**9)}"
    write(sources[form], tmp_path / "here", fill=Fill("gaussian", 0.1))
    puts = []

    def fault(method, _path):
        puts.append(method == "PUT")
        return ERRORS[kind] if sum(puts) > (40 if form == "t5x" else 8) else None

    faults["fault"] = fault
    words = ("fuse", *sources[form], "-o", out, "--fill", "gaussian", "--optimizer", "drop", "--max-memory", "64MiB")
    done = fusectl(*words)

    assert (done.code, "Traceback" in done.err) == (8, False), done.err
    assert "--resume" in done.err
    faults.clear()
    with pytest.raises(Corrupt, match="never committed"):
        open_checkpoint(out)
    done = fusectl(*words, "--resume")
    assert done.code == 0, done.err
    assert contents(out) == contents(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["denied", "expired", "busy", "failing"])
def test_sources_that_storage_refuses_are_told(sources, s3, through, monkeypatch, fusectl, kind):
    monkeypatch.setitem(objects._RETRIES, "max_retries", 2)
    faults, _ = through
    url = s3.put(sources["t5x"][0], "refused/a")
    faults["fault"] = lambda _method, _path: ERRORS[kind]

    done = fusectl("inspect", url)

    assert (done.code, "Traceback" in done.err) == (8, False), done.err
    assert ("credentials" in done.err) == (kind in {"denied", "expired"}), done.err


@pytest.mark.slow
@pytest.mark.parametrize(("form", "bucket"), diagonals(list(FORMATS), ["s3", "gcs"]), indirect=["bucket"])
def test_killed_at_any_moment_and_resumed(sources, bucket, tmp_path, form, soon):
    words = ["fuse", *sources[form], "--fill", "gaussian", "--optimizer", "drop", "--max-memory", "64MiB", "-q"]
    write(sources[form], tmp_path / "here", fill=Fill("gaussian", 0.1))
    wanted = contents(tmp_path / "here")
    out = ObjectPath.parse(f"{bucket.url}/killed-{random.randrange(10**9)}")
    begun = time.monotonic()
    whole = start(*words, "-o", out)
    whole.join()
    took = time.monotonic() - begun
    assert whole.exitcode == 0
    rng, resumed = random.Random(0), 0
    for i in range(5):
        out = ObjectPath.parse(f"{bucket.url}/killed-{random.randrange(10**9)}")
        process = start(*words, "-o", out)
        time.sleep(rng.uniform(0.1, 1.0) * took)
        process.kill()
        process.join()
        left = set(names(out))
        committed = not left.isdisjoint({T5X_INDEX, COMMITTED})
        if not committed and left:
            with pytest.raises(Corrupt):
                open_checkpoint(str(out))
        resumed += bool(left) and not committed
        write(sources[form], out, fill=Fill("gaussian", 0.1), max_memory_bytes=64 << 20, resume=True)
        assert contents(out) == wanted, i
        bucket.clear()
    assert resumed


@pytest.mark.slow
def test_a_signal_ends_an_upload_within_two_seconds(sources, s3, tmp_path, soon):
    words = ["fuse", *sources["t5x"], "--fill", "gaussian", "--optimizer", "drop", "--max-memory", "64MiB"]
    out = ObjectPath.parse(f"{s3.url}/signal-{random.randrange(10**9)}")
    process = start(*words, "-o", out)
    while JOURNAL not in names(out):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    told = time.monotonic()
    process.join(10)
    assert time.monotonic() - told < 2.5
    assert process.exitcode == 143
    write(sources["t5x"], out, fill=Fill("gaussian", 0.1), max_memory_bytes=64 << 20, resume=True)
    write(sources["t5x"], tmp_path / "here", fill=Fill("gaussian", 0.1))
    assert contents(out) == contents(tmp_path / "here")
