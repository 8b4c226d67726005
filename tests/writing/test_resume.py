"""Interrupted runs: what they leave, what goes on with it, and that nobody sees it in the result."""

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from cases import diagonals, exhaustive, first_soon, slow
from models import checkpoint, contents, ends_at, start, state

from fusectl.errors import Corrupt, FusectlError, Incompatible, NotEnoughSpace, OutputExists, StorageError
from fusectl.formats import target
from fusectl.formats.encoding import Encoding
from fusectl.formats.names import JOURNAL
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import Sink, save
from fusectl.formats.staging import can_be_resumed, staging_of
from fusectl.formats.store import new_ocdbt
from fusectl.formats.target import Database
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.ligo import begin_operator
from fusectl.planning import resources
from fusectl.planning.options import Options
from fusectl.sources.operator import save_operator
from fusectl.system.memory import peak_rss_bytes
from fusectl.writing.carrying_out import carry_out
from fusectl.writing.journal import Journal


NOISES = {kind: Fill(kind, 0.1) for kind in ("gaussian", "antisymmetric")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    at = tmp_path_factory.mktemp("sources")
    return {
        form: [checkpoint(at / form / name, seed=i, format=form) for i, name in enumerate("ab")] for form in FORMATS
    }


def interrupted(n, error, monkeypatch, *args, **options):
    """A run that ends when the n-th chunk is noted in its journal."""
    with monkeypatch.context() as patch:
        ends_at(n, error, patch)
        with pytest.raises(type(error)):
            write(*args, **options)


def counting(monkeypatch):
    """The chunks that are written, of zeros or not, or taken over from now on."""
    written = []
    for name in ("write", "write_zeros", "take"):

        def counted(self, name, chunk, *args, original=getattr(Sink, name)):
            written.append((name, chunk))
            return original(self, name, chunk, *args)

        monkeypatch.setattr(Sink, name, counted)
    return written


def write(paths, out, fill=Fill(), *, resume=False, **options):
    notes = []
    plan, opened = plan_fusion(paths, Options(fill=fill, **options))
    carry_out(plan, opened, out, resume=resume, note=notes.append)
    return notes


@pytest.mark.parametrize("kind", first_soon(["zeros", "gaussian", "antisymmetric"]))
@pytest.mark.parametrize(
    ("form", "error"),
    [
        slow("t5x", KeyboardInterrupt()),
        ("orbax-ocdbt-zarr3", StorageError("may pass")),
        *(slow(form, KeyboardInterrupt()) for form in FORMATS if form != "t5x"),
        slow("t5x", NotEnoughSpace("may pass")),
        slow("t5x", StorageError("may pass")),
        slow("orbax-ocdbt-zarr3", NotEnoughSpace("may pass")),
    ],
)
def test_an_interrupted_run_is_gone_on_with(sources, tmp_path, monkeypatch, form, kind, error):
    # Many commits of a database, which keeps nodes of its own for more than sixteen versions.
    monkeypatch.setattr(resources, "LARGEST_COMMIT_BYTES", 4096)
    fill = NOISES.get(kind, Fill())
    paths = sources[form] if kind == "zeros" else sources[form][:1] * 2
    write(paths, tmp_path / "whole", fill)
    interrupted(150, error, monkeypatch, paths, tmp_path / "out", fill)
    assert can_be_resumed(tmp_path / "out")
    assert not (tmp_path / "out").exists()

    with monkeypatch.context() as patch:
        written = counting(patch)
        notes = write(paths, tmp_path / "out", fill, resume=True)

    assert any("going on with" in note for note in notes)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    assert not (tmp_path / "out" / JOURNAL).exists()
    with monkeypatch.context() as patch:
        every = counting(patch)
        write(paths, tmp_path / "again", fill)
    # All but what was in flight, or in a transaction that was not committed.
    assert len(written) <= len(every) - 100


def test_a_chunk_that_the_journal_claims_and_the_disk_does_not_have_is_written_again(sources, tmp_path, monkeypatch):
    """As after a power loss: the journal's line has reached the disk, the chunk's bytes have not, or others."""
    write(sources["t5x"], tmp_path / "whole")
    interrupted(60, KeyboardInterrupt(), monkeypatch, sources["t5x"], tmp_path / "out")
    chunks = [p for p in staging_of(tmp_path / "out").rglob("0*") if p.stat().st_size]
    assert len(chunks) > 20
    for i, chunk in enumerate(chunks):
        if i % 3 == 0:
            chunk.write_bytes(b"")
        elif i % 3 == 1:
            chunk.unlink()
        else:
            raw = bytearray(chunk.read_bytes())
            raw[len(raw) // 2] ^= 0x10
            chunk.write_bytes(raw)

    write(sources["t5x"], tmp_path / "out", resume=True)

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["t5x", "orbax-ocdbt-zarr3"])
def test_links_that_were_left_are_never_written_into(sources, tmp_path, monkeypatch, form):
    before = [contents(path) for path in sources[form]]
    interrupted(30, KeyboardInterrupt(), monkeypatch, sources[form], tmp_path / "out", link=True)
    # Nothing that is there counts as done any more.
    journal = staging_of(tmp_path / "out") / JOURNAL
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b"\n")

    write(sources[form], tmp_path / "out", resume=True, link=True)

    assert [contents(path) for path in sources[form]] == before
    write(sources[form], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_database_whose_files_did_not_reach_the_disk_is_begun_again(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "LARGEST_COMMIT_BYTES", 4096)
    write(sources["orbax-ocdbt-zarr3"], tmp_path / "whole", NOISES["gaussian"])
    for share in (1, 2):
        interrupted(
            150, KeyboardInterrupt(), monkeypatch, sources["orbax-ocdbt-zarr3"], tmp_path / "out", NOISES["gaussian"]
        )
        for file in list(staging_of(tmp_path / "out").rglob("d/*"))[::share]:
            file.write_bytes(file.read_bytes()[: 10 if share > 1 else 0])

        write(sources["orbax-ocdbt-zarr3"], tmp_path / "out", NOISES["gaussian"], resume=True)

        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_a_database_with_a_damaged_history_is_begun_again(tmp_path):
    """Whoever writes the next version reads it, though nobody else does."""
    base = f"{tmp_path}/"
    store = ts.KvStore.open(new_ocdbt(base)).result()
    for i in range(40):
        store[f"{i}"] = b"x" * 5000
    history = ts.ocdbt.dump(ts.KvStore.open(f"file://{base}").result()).result()["version_tree_nodes"]
    Path(base + history[-1]["location"].split(":")[2]).write_bytes(b"")

    written = Database(tmp_path, links=False, commit_bytes=1, resumed=True)
    for i in range(20):
        written.write(f"new{i}", [b"y"])

    assert set(ts.KvStore.open(new_ocdbt(base)).result().list().result()) == {f"new{i}".encode() for i in range(20)}


def test_a_source_that_was_written_anew_is_not_gone_on_with(tmp_path, monkeypatch):
    """Of the same size, and with the same index: only the clock tells."""
    for seed in (0, 1):
        save(tmp_path / f"a{seed}", state("t5-1.1", seed), "t5x", encoding=Encoding())
    source = tmp_path / "a0"
    interrupted(30, KeyboardInterrupt(), monkeypatch, [str(source)] * 2, tmp_path / "out", NOISES["gaussian"])
    for chunk in (tmp_path / "a1").rglob("0*"):
        shutil.copy(chunk, source / chunk.relative_to(tmp_path / "a1"))

    with pytest.raises(Incompatible, match="another plan"):
        write([str(source)] * 2, tmp_path / "out", NOISES["gaussian"], resume=True)


@pytest.mark.parametrize("form", ["t5x", "orbax-zarr3"])
def test_a_source_that_is_replaced_while_it_is_read_is_not_mixed(tmp_path, monkeypatch, form):
    """Both are sound, and without a record neither chunks nor shapes tell one from the other."""
    for seed, name in enumerate("ab"):
        checkpoint(tmp_path / name, seed=seed, format=form)
    add, count = Journal.add, iter(range(10**9))

    def replacing(self, *args):
        add(self, *args)
        if next(count) == 30:
            (tmp_path / "a").rename(tmp_path / "old")
            (tmp_path / "b").rename(tmp_path / "a")

    monkeypatch.setattr(Journal, "add", replacing)
    plan, opened = plan_fusion([str(tmp_path / "a")] * 2, Options(fill=NOISES["gaussian"]))
    with pytest.raises(Corrupt, match="changed while it was being read"):
        # With one thread no read falls between the two renames, where the source is missing.
        carry_out(plan, opened, tmp_path / "out", jobs=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "old"]


def test_what_is_put_beside_a_source_while_it_is_read_does_no_harm(sources, tmp_path, monkeypatch):
    source = Path(shutil.copytree(sources["t5x"][0], tmp_path / "a"))
    add = Journal.add

    def noting(self, *args):
        add(self, *args)
        (source / "notes.txt").write_text("mine")

    monkeypatch.setattr(Journal, "add", noting)
    write([str(source)] * 2, tmp_path / "out")
    assert open_checkpoint(str(tmp_path / "out")).leaves


def test_what_was_let_pass_before_is_not_let_pass_now(tmp_path, fusectl, monkeypatch):
    values = state("t5-1.1", 0)
    values["target/decoder/layers_0/mlp/wo/kernel"][3, 4] = np.nan
    save(tmp_path / "a", values, "t5x")
    words = ["self-fuse", tmp_path / "a", "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "finish", raising(KeyboardInterrupt()))
        assert fusectl(*words, "--allow-nonfinite").code == 130

    done = fusectl(*words, "--resume")

    assert (done.code, "another plan" in done.err, "to go on" in done.err) == (6, True, False)
    assert not (tmp_path / "out").exists()


def raising(error):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.slow
def test_what_is_complete_is_proved_where_that_is_asked_for(sources, tmp_path, fusectl):
    words = ["fuse", *sources["t5x"], "-o", tmp_path / "out", "--resume"]
    assert fusectl(*words).code == 0
    chunk = tmp_path / "out/target.decoder.layers_0.mlp.wo.kernel/0.0"
    raw = chunk.read_bytes()

    done = fusectl(*words, "--verify")
    assert (done.code, "weights" in done.err) == (0, True), done.err
    chunk.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    assert fusectl(*words, "--verify").code == 5


@pytest.mark.slow
def test_the_line_that_resumes_names_what_came_through_a_pipe(sources, fusectl, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "finish", raising(KeyboardInterrupt()))
        patch.setattr(sys, "stdin", io.StringIO(sources["t5x"][0] + "\n"))
        stopped = fusectl("self-fuse", "-o", tmp_path / "out")

    words = stopped.err.partition("to go on: fusectl ")[2].split()

    assert words[:4] == ["self-fuse", "-o", str(tmp_path / "out"), sources["t5x"][0]]
    assert fusectl(*words).code == 0


def test_another_plan_is_not_gone_on_with(sources, tmp_path, monkeypatch):
    interrupted(30, KeyboardInterrupt(), monkeypatch, sources["t5x"], tmp_path / "out", NOISES["gaussian"])

    with pytest.raises(Incompatible, match="another plan"):
        write(sources["t5x"], tmp_path / "out", Fill("gaussian", 0.1, seed=1), resume=True)

    assert can_be_resumed(tmp_path / "out"), "it is still there for the run that it belongs to"
    notes = write(sources["t5x"], tmp_path / "out")
    assert any("starting anew" in note for note in notes)
    write(sources["t5x"], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_complete_is_left_as_it_is(sources, tmp_path):
    write(sources["t5x"], tmp_path / "out")
    before = (tmp_path / "out/fusectl.json").stat().st_mtime_ns

    assert write(sources["t5x"], tmp_path / "out", resume=True) == [
        f"{tmp_path / 'out'}: complete already, each chunk read and compared"
    ]
    assert (tmp_path / "out/fusectl.json").stat().st_mtime_ns == before

    with pytest.raises(FusectlError, match="exists"):
        write(sources["t5x"], tmp_path / "out", NOISES["gaussian"], resume=True)
    for other in ({"dtype": "bfloat16"}, {"codec": "zstd"}, {"sparse": False}):
        with pytest.raises(FusectlError, match="exists"):
            write(sources["t5x"], tmp_path / "out", resume=True, **other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", first_soon(['[["x"],[0],"a"]', '["x",5,"a"]', '["x",[[0]],"a"]', "[" * 200_000, "\0\0", "7"], 2)
)
def test_a_line_that_makes_no_sense_is_passed_over(sources, tmp_path, monkeypatch, line):
    interrupted(30, KeyboardInterrupt(), monkeypatch, sources["t5x"], tmp_path / "out")
    journal = staging_of(tmp_path / "out") / JOURNAL
    journal.write_text(journal.read_text() + line)

    write(sources["t5x"], tmp_path / "out", resume=True)

    write(sources["t5x"], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["t5x", "orbax-ocdbt-zarr3"])
def test_what_does_not_belong_to_the_output_is_not_published(sources, tmp_path, monkeypatch, form):
    interrupted(150, KeyboardInterrupt(), monkeypatch, sources[form], tmp_path / "out")
    (staging_of(tmp_path / "out") / "fusectl-verify.json").write_text("{}")
    (staging_of(tmp_path / "out") / "target.stray.kernel").mkdir()
    (staging_of(tmp_path / "out") / "target.stray.kernel/.zarray").write_text("{}")
    # As after copying the directory with cp -al: another name of a file that is written at the end.
    (tmp_path / "mine").write_text("mine")
    (staging_of(tmp_path / "out") / "fusectl.json").hardlink_to(tmp_path / "mine")

    write(sources[form], tmp_path / "out", resume=True)

    assert not [p for p in (tmp_path / "out").rglob("*") if "stray" in p.name or "verify" in p.name]
    assert (tmp_path / "mine").read_text() == "mine"
    write(sources[form], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["t5x", "orbax-ocdbt-zarr3"])
def test_what_has_no_end_in_staging_is_not_read(sources, tmp_path, monkeypatch, form):
    """Links to a device, and pipes: in place of chunks, data files and the journal."""
    monkeypatch.setattr(resources, "LARGEST_COMMIT_BYTES", 4096)
    write(sources[form], tmp_path / "whole")
    before = peak_rss_bytes()
    for journal in (False, True):
        interrupted(150, KeyboardInterrupt(), monkeypatch, sources[form], tmp_path / "out")
        staging = staging_of(tmp_path / "out")
        chunks = [p for p in staging.rglob("*") if p.is_file() and (p.name[0] == "0" or p.parent.name == "d")]
        for i, file in enumerate([staging / JOURNAL] if journal else chunks[:10]):
            file.unlink()
            file.symlink_to("/dev/zero") if i % 2 == 0 else os.mkfifo(file)

        write(sources[form], tmp_path / "out", resume=True)

        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
        shutil.rmtree(tmp_path / "out")
    assert peak_rss_bytes() - before < 200 << 20


def test_a_staging_directory_that_is_a_link_is_left_alone(sources, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/gold").write_text("gold")
    staging_of(tmp_path / "out").symlink_to(tmp_path / "precious")

    with pytest.raises(OutputExists, match="a symbolic link"):
        write(sources["t5x"], tmp_path / "out")

    assert (tmp_path / "precious/gold").read_text() == "gold"


def test_a_failure_that_will_not_pass_leaves_nothing(sources, tmp_path, monkeypatch):
    interrupted(30, Incompatible("never"), monkeypatch, sources["t5x"], tmp_path / "out")

    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_line_that_resumes_does(sources, tmp_path, fusectl, monkeypatch):
    out = tmp_path / "out"
    add, count = Journal.add, iter(range(10**9))

    def failing(self, *args):
        add(self, *args)
        if next(count) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", failing)
        stopped = fusectl("fuse", *sources["t5x"], "-o", out, "--json")
    assert stopped.code == 130
    assert f"to go on: fusectl fuse {sources['t5x'][0]}" in stopped.err
    line = json.loads(stopped.out)["error"]["resume"]

    done = fusectl(*line.split()[1:])

    assert done.code == 0, done.err
    write(sources["t5x"], tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


# The writing commands that came later; all of them share one executor.
OTHERS = ["convert", "stack", "ligo"]


@pytest.fixture(scope="module")
def operator(sources, tmp_path_factory):
    """An operator that makes the first source wider, as `ligo` keeps it: the tests do without learning one."""
    kept = tmp_path_factory.mktemp("operators") / "operator"
    sizes = {"embed": 14, "heads": 4, "mlp": 26}
    growing, _, found = begin_operator(sources["t5x"][0], sizes, None, {"decoder": 3}, "pinv", "random", 0, Options())
    save_operator(found, growing, kept)
    return kept


def words_of(kind, sources, fused, out, operator=""):
    words = {
        "fuse": ["fuse", *sources],
        "self-fuse": ["self-fuse", sources[0], "--fill", "antisymmetric"],
        "noise-fill": ["noise-fill", fused],
        # What is converted is cast, or it would only be copied.
        "convert": ["convert", sources[0], "--dtype", "bfloat16"],
        "stack": ["stack", sources[0], "--layers", "6", "--how", "interleave"],
        "ligo": ["ligo", sources[0], "--operator", operator],
    }[kind]
    return [*words, "-o", str(out), "--no-sync", "-q"]


def exit_code(*words):
    """None of a program that has not ended within a minute."""
    process = start(*words)
    process.join(60)
    return process.exitcode


def writing(words, out):
    """The program in a process, from the first sign of its staging directory on."""
    running = start(*words)
    while not staging_of(out).exists() and running.is_alive():
        time.sleep(0.001)
    return running


# For each operation in each format.
KILLS = 10


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kind"), diagonals(list(FORMATS), ["fuse", "self-fuse", "noise-fill", *OTHERS]))
def test_killed_at_random_moments(sources, operator, tmp_path, form, kind):
    """SIGKILL from the first sign of the staging directory on: never a half output, and --resume gives the same."""
    rng = random.Random(f"{form} {kind}")
    fused, out = tmp_path / "fused", tmp_path / "out"
    write(sources[form], fused)
    assert exit_code(*words_of(kind, sources[form], fused, tmp_path / "whole", operator)) == 0
    wanted = contents(tmp_path / "whole")
    words = words_of(kind, sources[form], fused, out, operator)
    running = writing(words, out)
    began = time.monotonic()
    running.join(60)
    lasts_s = time.monotonic() - began
    shutil.rmtree(out)
    killed = 0
    for _ in range(KILLS):
        running = writing(words, out)
        time.sleep(rng.uniform(0, lasts_s))
        running.kill()
        running.join(60)
        if not out.exists():
            killed += 1
            assert exit_code(*words, "--resume") == 0
        assert contents(out) == wanted
        assert not staging_of(out).exists()
        shutil.rmtree(out)
    assert killed > KILLS // 5, "it was too fast to be killed"


@pytest.mark.slow
@pytest.mark.parametrize("times", [5, exhaustive(20)])
def test_four_at_once_into_one_root_of_steps(sources, tmp_path, times):
    """Each to a step of its own, and two of them to the same one: one wins, the other says so."""
    root = tmp_path / "root"
    write(sources["t5x"], tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    for _ in range(times):
        outs = [root / "checkpoint_1", root / "checkpoint_2", root / "checkpoint_3", root / "checkpoint_3"]
        running = [start(*words_of("fuse", sources["t5x"], "", out)) for out in outs]
        for process in running:
            process.join(60)
        codes = [process.exitcode for process in running]
        assert codes[:2] == [0, 0]
        assert sorted(codes[2:]) == [0, 7]
        assert sorted(p.name for p in root.iterdir()) == ["checkpoint_1", "checkpoint_2", "checkpoint_3"]
        assert all(contents(out) == wanted for out in outs[:3])
        shutil.rmtree(root)


FAILURES = {errno.EIO: 8, errno.EACCES: 8, errno.ENOSPC: 9, errno.EDQUOT: 9}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["t5x", exhaustive("orbax-zarr3")])
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *(("fuse", number) for number in FAILURES),
        ("convert", errno.ENOSPC),
        *(pytest.param(kind, errno.ENOSPC, marks=pytest.mark.slow) for kind in ("stack", "ligo")),
    ],
)
def test_errors_of_the_operating_system_at_random_points(
    sources, operator, tmp_path, fusectl, monkeypatch, form, kind, number
):
    rng = random.Random(f"{form} {number}")
    words = words_of(kind, sources[form], "", tmp_path / "out", operator)
    assert fusectl(*words_of(kind, sources[form], "", tmp_path / "whole", operator)).code == 0
    wanted = contents(tmp_path / "whole")
    for _ in range(3):
        left = iter(range(rng.randrange(1, 150), -1, -1))

        def failing(original, left=left):
            def call(*args):
                if next(left, 0) == 0:
                    raise OSError(number, os.strerror(number))
                return original(*args)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(target, "write", failing(target.write))
            patch.setattr(target, "copy", failing(target.copy))
            stopped = fusectl(*words)
        assert (stopped.code, "Traceback" in stopped.err) == (FAILURES[number], False), stopped.err
        assert not (tmp_path / "out").exists()
        assert fusectl(*words, "--resume").code == 0
        assert contents(tmp_path / "out") == wanted
        shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("fuse", "t5x"),
        ("fuse", "orbax-ocdbt-zarr3"),
        *(pytest.param(kind, "orbax-ocdbt-zarr3", marks=pytest.mark.slow) for kind in OTHERS),
    ],
)
def test_a_file_size_limit_at_random_points(tmp_path, sources, operator, kind, form):
    """A limit on the size of files stands in for a disk that is full at one tensor or another."""
    words = words_of(kind, sources[form], "", tmp_path / "out", operator)
    assert exit_code(*words_of(kind, sources[form], "", tmp_path / "whole", operator)) == 0
    wanted = contents(tmp_path / "whole")
    sizes = sorted({p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file()})
    failed = 0
    for limit in {sizes[len(sizes) * i // 5] // 1024 for i in range(5)}:
        command = ["bash", "-c", f"trap '' XFSZ; ulimit -f {limit}; exec \"$@\"", "-", sys.executable, "-m", "fusectl"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in {0, 9}, done.stderr
        failed += done.returncode == 9
        if done.returncode:
            assert not (tmp_path / "out").exists()
            assert exit_code(*words, "--resume") == 0
        assert contents(tmp_path / "out") == wanted
        shutil.rmtree(tmp_path / "out")
    assert failed
