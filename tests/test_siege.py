"""What appears, goes or changes where a checkpoint is written, and files from outside that are made to do harm."""

import errno
import io
import json
import os
import re
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
from models import checkpoint as whole_checkpoint
from models import contents, write_record

from fusectl.errors import Corrupt, FusectlError, NotFound, OutputExists, UsageError
from fusectl.families.config import read_config
from fusectl.families.userfile import parse_family
from fusectl.formats import staging
from fusectl.formats.names import JOURNAL
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import Sink, save
from fusectl.formats.staging import can_be_resumed, staging_of
from fusectl.inspection.fsck import fsck
from fusectl.networks.tokens import read_tokens
from fusectl.operations.convert import plan_conversion
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.system.escape import caption
from fusectl.system.given import read_given
from fusectl.verification import Report
from fusectl.verification.claim import nothing_known
from fusectl.verification.page import page
from fusectl.verification.report import FilesResult
from fusectl.writing.carrying_out import carry_out


LAYERS = {"encoder": 1, "decoder": 1}


def checkpoint(at, **kwargs):
    return whole_checkpoint(at, layers=LAYERS, **kwargs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A T5, for what only a known family can be used for."""
    return checkpoint(tmp_path_factory.mktemp("model") / "a")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Trees of three tensors, which are converted in milliseconds."""
    at, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    values = {f"target/{name}": rng.normal(size=(40, 30)).astype(np.float32) for name in ("v", "w")}
    values["state/step"] = np.array(7, np.int32)
    for form in FORMATS:
        save(at / form, values, form, chunks={"target/w": (20, 30)})
    return {form: str(at / form) for form in FORMATS}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def write(source, out, *, check=None, kept=lambda: None, **how):
    plan, opened = plan_conversion(source, Options(codec="zstd"))
    notes = []
    carry_out(plan, opened, out, check=check, note=notes.append, kept=kept, sync=False, **how)
    return notes


# What appears.


def somebodys_work(at):
    at.mkdir()
    (at / "thesis.txt").write_text("precious")


def another_checkpoint(at):
    elsewhere = at.parent / "elsewhere"
    save(elsewhere, {"target/w": np.ones(3, np.float32)}, "t5x")
    elsewhere.rename(at)


def a_file(at):
    at.write_text("precious")


def a_link(at):
    (at.parent / "far").mkdir()
    (at.parent / "far/thesis.txt").write_text("precious")
    at.symlink_to("far")


def a_link_to_nothing(at):
    at.symlink_to("nowhere")


def an_empty_directory(at):
    at.mkdir()


def state_of(at):
    """What stands at a path, and all that is below it."""
    if at.is_symlink():
        return at.readlink(), state_of(at.parent / at.readlink())
    if at.is_dir():
        return {str(p.relative_to(at)): p.read_bytes() for p in at.rglob("*") if p.is_file()}
    return at.read_bytes() if at.exists() else None


APPEARING = [somebodys_work, another_checkpoint, a_file, a_link, a_link_to_nothing]


@pytest.fixture(params=["renameat2", "without it"])
def renaming(request, monkeypatch):
    """With Linux's call, and on a file system that does not know its flags."""
    if request.param == "without it":
        monkeypatch.setattr(staging, "_renameat2", lambda *_: errno.EINVAL)


@pytest.mark.parametrize("obstacle", [*APPEARING, an_empty_directory])
@pytest.mark.usefixtures("renaming")
def test_what_appears_while_it_is_written_is_left_as_it_is(sources, out, obstacle):
    kept, seen = [], []

    def appear(_):
        obstacle(out)
        seen.append(state_of(out))

    with pytest.raises(OutputExists, match="has appeared") as caught:
        write(sources["t5x"], out, check=appear, kept=lambda: kept.append(True))

    assert [state_of(out)] == seen
    assert "--resume" in caught.value.hint
    assert kept == [True]
    assert can_be_resumed(out)
    out.rename(out.parent / "away")
    assert any("going on with" in note for note in write(sources["t5x"], out, resume=True))
    assert contents(out) == contents(sources["t5x"])
    assert not (out / JOURNAL).exists()
    assert not staging_of(out).exists()


@pytest.mark.parametrize("obstacle", [o for o in APPEARING if o is not another_checkpoint])
@pytest.mark.usefixtures("renaming")
def test_force_asks_again_what_it_replaces(sources, out, obstacle):
    """What was a checkpoint when the run began, hours ago, is something else."""
    another_checkpoint(out)
    seen = []

    def appear(_):
        shutil.rmtree(out)
        obstacle(out)
        seen.append(state_of(out))

    with pytest.raises(OutputExists, match="is no checkpoint"):
        write(sources["t5x"], out, check=appear, force=True)

    assert [state_of(out)] == seen
    assert can_be_resumed(out)


def test_what_comes_between_the_question_and_the_exchange_is_put_back(sources, out, monkeypatch):
    another_checkpoint(out)
    exchange = staging._exchange

    def late(a, b):
        if not (out / "thesis.txt").exists() and not (staging_of(out) / "thesis.txt").exists():
            shutil.rmtree(out)
            somebodys_work(out)
        exchange(a, b)

    monkeypatch.setattr(staging, "_exchange", late)
    with pytest.raises(OutputExists, match="is no checkpoint"):
        write(sources["t5x"], out, force=True)

    assert (out / "thesis.txt").read_text() == "precious"
    assert can_be_resumed(out)


@pytest.mark.usefixtures("renaming")
def test_force_replaces_a_checkpoint_and_leaves_nothing_of_it(sources, out):
    another_checkpoint(out)

    write(sources["t5x"], out, force=True)

    assert contents(out) == contents(sources["t5x"])
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert not (out / JOURNAL).exists()


def test_a_checkpoint_that_was_half_removed_is_fusectls_to_remove(sources, out, monkeypatch):
    """Killed right after the exchange: the old checkpoint stands where the new one was written."""
    another_checkpoint(out)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(staging, "REMOVALS", 1)
        notes = write(sources["t5x"], out, force=True)
    assert any("could not be removed" in note for note in notes)
    assert (staging_of(out) / JOURNAL).exists()

    write(sources["t5x"], out, force=True)

    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_the_program_says_what_appeared_and_how_to_go_on(sources, out, fusectl, monkeypatch):
    finish = Sink.finish
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "finish", lambda self, *args: (finish(self, *args), somebodys_work(out)))
        done = fusectl("convert", sources["orbax-ocdbt-zarr3"], "-o", out)

    assert (done.code, done.out) == (7, ""), done.err
    words = done.err.partition("to go on: fusectl ")[2].split()
    assert fusectl(*words).code == 7
    shutil.rmtree(out)
    assert fusectl(*words).code == 0
    assert fsck(str(out)).problems == ()


def test_an_operator_replaces_nothing_that_appears_either(out, monkeypatch):
    finish = Sink.finish
    monkeypatch.setattr(Sink, "finish", lambda self, **more: (finish(self, **more), somebodys_work(out)))
    for force in (False, True):
        with pytest.raises(OutputExists):
            save(out, {"w": np.ones(3, np.float32)}, "orbax", item=None, force=force)
        assert state_of(out) == {"thesis.txt": b"precious"}
        shutil.rmtree(out)


# What stands where it is written first, and what goes from there.


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_in_the_temporary_ones_place_is_not_emptied(sources, out, resume):
    somebodys_work(staging_of(out))

    with pytest.raises(OutputExists, match="not of fusectl's making"):
        write(sources["t5x"], out, resume=resume)

    assert state_of(staging_of(out)) == {"thesis.txt": b"precious"}
    shutil.rmtree(staging_of(out))
    staging_of(out).mkdir()
    write(sources["t5x"], out)


@pytest.mark.parametrize("form", FORMATS)
def test_what_goes_while_it_is_written_is_missed_before_it_appears(sources, out, form):
    def delete(written):
        # Of a database the data file that most of its values are in.
        files = [p for p in Path(str(written.location.index)).rglob("*") if p.is_file() and p.stat().st_size > 400]
        chunks = [p for p in files if re.fullmatch(r"\d+(\.\d+)*|\d", p.name)]
        max(chunks or [p for p in files if p.parent.name == "d"], key=lambda p: p.stat().st_size).unlink()

    with pytest.raises(Corrupt, match="gone that had been written|cannot be decoded|data is missing|cannot be read"):
        write(sources[form], out, check=delete)

    assert list(out.parent.iterdir()) == []


# What was complete.


def chunk_of(at, form):
    """A file with a chunk in it, and where in the file a byte of the values is."""
    opened = open_checkpoint(str(at))
    name = "target/w"
    extent = opened.files.place(opened.key(name, (0, 0)))
    return Path(extent.path), extent.offset + extent.nbytes // 2


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 0x10
    file.write_bytes(raw)


DAMAGES = {
    "a flipped bit": lambda at, form: flip(*chunk_of(at, form)),
    "a file that is gone": lambda at, form: chunk_of(at, form)[0].unlink(),
    "a record that was changed": lambda at, form: flip(at / "fusectl.json", 99),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FORMATS)
def test_what_was_complete_and_is_damaged_is_not_called_complete(sources, out, fusectl, form, damage):
    words = ["convert", sources[form], "-o", out, "--resume", "--no-sync"]
    assert fusectl(*words).code == 0
    whole = contents(out)
    again = fusectl(*words)
    assert (again.code, again.out, "complete already" in again.err) == (0, f"{out}\n", True)
    DAMAGES[damage](out, form)

    done = fusectl(*words)

    assert (done.code, done.out, "--force writes it anew" in done.err) == (5, "", True), done.err
    assert fusectl(*words, "--force").code == 0
    assert contents(out) == whole


def test_chunks_that_were_taken_over_unread_are_compared_with_the_sources(sources, out, fusectl, tmp_path):
    """No checksum tells of them."""
    assert fusectl("convert", sources["t5x"], "--codec", "none", "-o", tmp_path / "raw", "--no-sync").code == 0
    (tmp_path / "raw/fusectl.json").unlink()
    words = ["convert", tmp_path / "raw", "-o", out, "--no-check", "--resume", "--no-sync"]
    assert fusectl(*words).code == 0
    assert "unread" in (out / "fusectl.json").read_text()
    assert fusectl(*words).code == 0
    flip(*chunk_of(out, "t5x"))

    done = fusectl(*words)

    assert (done.code, "is not the source's" in done.err) == (5, True), done.err


def test_values_that_are_not_finite_are_no_damage_where_they_may_pass(out, tmp_path, fusectl):
    save(tmp_path / "a", {"target/w": np.array([1, np.nan], np.float32)}, "t5x")
    words = ["convert", tmp_path / "a", "-o", out, "--allow-nonfinite", "--resume"]

    assert [fusectl(*words).code for _ in range(2)] == [0, 0]


# What is written beside it.


@pytest.mark.slow
def test_a_table_of_rates_is_replaced_only_where_it_is_this_runs(model, tmp_path, fusectl):
    rates = tmp_path / "t.json"
    rates.write_bytes(b"precious \xff")
    words = ["self-fuse", model, "--lr-table", rates, "--no-sync"]

    for more in ([], ["--resume"]):
        done = fusectl(*words, "-o", tmp_path / "new", *more)
        assert (done.code, "exists" in done.err) == (7, True), done.err
        assert rates.read_bytes() == b"precious \xff"
        assert not (tmp_path / "new").exists()
    assert fusectl(*words, "-o", tmp_path / "new", "--force").code == 0
    assert "labels" in rates.read_text()
    assert fusectl(*words, "-o", tmp_path / "new", "--resume").code == 0
    assert fusectl(*words, "-o", tmp_path / "other").code == 7


def test_a_table_that_appears_while_it_is_written_is_left(model, tmp_path, fusectl, monkeypatch):
    rates = tmp_path / "t.json"
    finish = Sink.finish
    monkeypatch.setattr(Sink, "finish", lambda self, *args: (finish(self, *args), rates.write_text("precious")))

    done = fusectl("self-fuse", model, "-o", tmp_path / "new", "--lr-table", rates)

    assert (done.code, rates.read_text()) == (7, "precious"), done.err


def test_a_proof_is_not_written_through_a_link(sources, tmp_path, fusectl):
    (tmp_path / "precious").write_text("precious")
    assert fusectl("convert", sources["orbax-ocdbt-zarr3"], "-o", tmp_path / "out").code == 0
    (tmp_path / "out/fusectl-verify.md").symlink_to(tmp_path / "precious")

    assert fusectl("verify", tmp_path / "out", "--levels", "files,weights", "--report").code == 0

    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "out/fusectl-verify.md").read_text().startswith("# Verification")


# Names that do more than to name.

HOSTILE = "x\x1b[1A\x1b[2K\nfiles     ok   all is well\n\x1b]52;c;cm0=\x07\u202egnp\u2028\x9bm\r\x85|`<b>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    at = tmp_path_factory.mktemp("hostile") / "a"
    values = {f"target/{HOSTILE}": np.ones((3, 2), np.float32), f"target/v{HOSTILE}": np.ones(3, np.float32)}
    save(at, values, "t5x")
    return at


@pytest.mark.parametrize(
    "words",
    [
        "inspect {at}",
        "inspect {at} --arch t5-1.1",
        "inspect {at} --fsck",
        "self-fuse {at}",
        "convert {at} -o {out} --dry-run",
        "convert {at} -o {out} --verify",
        "convert {at} -o {out} --format orbax",
        "diff {at} {other}",
        "verify {at} --sources {at} {at}",
        "plot {at} --tensor y -o {out}.png",
        "restart-config {at}",
        "theory {at} --copies 2",
        "fuse {at} {other}",
    ],
)
def test_names_from_a_checkpoint_cannot_write_on_the_terminal(hostile, tmp_path, fusectl, words):
    values = {f"target/{HOSTILE}": np.zeros((3, 3), np.float32), f"target/2{HOSTILE}": np.ones(3, np.float32)}
    save(tmp_path / "b", {**values, f"target/v{HOSTILE}": np.zeros(3, np.float32)}, "t5x")
    if not words.startswith("diff"):
        (tmp_path / "b" / f"target.{HOSTILE}" / "0.0").write_bytes(b"")
    shown = [each.format(at=hostile, other=tmp_path / "b", out=tmp_path / "out") for each in words.split()]

    done = fusectl(*shown)

    printed = done.out + done.err
    assert printed.replace("\n", "").isprintable(), ascii(printed)
    assert not [line for line in printed.splitlines() if line.startswith("files     ok   all")]
    assert done.code != 1, done.err


def test_the_control_names_are_printed_where_they_can_be(hostile, fusectl):
    done = fusectl("inspect", hostile)
    assert r"target/x\x1b[1A\x1b[2K\nfiles     ok   all is well\n\x1b]52;c;cm0=\x07\u202egnp" in done.out
    done = fusectl("inspect", hostile, "--json")
    assert f"target/{HOSTILE}" in {each["name"] for each in done.json["result"]["tensors"]}


def test_a_path_with_colons_is_printed_as_it_is(tmp_path, fusectl):
    """Rich has pictures for words between them."""
    save(tmp_path / "a:star:", {"target/w": np.ones(3, np.float32)}, "t5x")
    assert str(tmp_path / "a:star:") in fusectl("inspect", tmp_path / "a:star:").out


def test_a_line_to_paste_is_one_whatever_is_in_it(tmp_path, fusectl, monkeypatch):
    """bash takes it for the same words."""
    import subprocess

    path = checkpoint(tmp_path / "a\x1b[2Kb\n'c")
    finish = Sink.finish
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "finish", lambda self, *args: (finish(self, *args), a_file(tmp_path / "out")))
        done = fusectl("self-fuse", path, "-o", tmp_path / "out")
    line = done.err.partition("to go on: ")[2].splitlines()[0]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout

    assert line.isprintable()
    assert words.decode().split("\0")[1:3] == ["self-fuse", path]


def test_a_page_of_a_proof_cannot_be_forged_by_a_path(model, tmp_path, fusectl):
    """GitHub's Markdown makes headings, columns, HTML and links of what is not escaped."""
    evil = tmp_path / "a|b<img src=x onerror=alert(1)>`x`\n# PASSED [l](javascript:1)"
    shutil.copytree(model, evil)
    out = tmp_path / "out"
    assert fusectl("self-fuse", evil, "-o", out, "--no-sync").code == 0
    record = json.loads((out / "fusectl.json").read_text())
    for source in record["made"]["sources"]:
        source["fingerprint"] = "1`|<b>\n\n# FORGED"
    write_record(out, record)
    (out / "target.decoder.logits_dense.kernel/0.0").write_bytes(b"")

    fusectl("verify", out, "--levels", "files,weights", "--report")

    text = (out / "fusectl-verify.md").read_text()
    assert next(line for line in text.splitlines() if line.startswith("#")).startswith("# Verification of ")
    assert not [line for line in text.splitlines() if re.match(r"# (PASSED|FORGED)", line)]
    row = next(line for line in text.splitlines() if "onerror" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert not re.search(r"(?<!\\)[<`]", row), row
    assert not re.search(r"(?<!\\)\]\(", text)


def test_notes_and_failures_cannot_forge_a_page_either():
    failed = FilesResult(passed=False, tensors=1, bytes_read=0, checksums=0, problems=("x\n# PASSED <b>|",))
    report = Report("a", nothing_known(), files=failed, notes=("[l](javascript:1)\n# PASSED",))
    lines = page(report).splitlines()

    assert sum(line.startswith("# ") for line in lines) == 1
    assert r"- files: x\\n\# PASSED \<b\>\|" in lines


def test_dollars_in_a_name_are_no_formula():
    from matplotlib.figure import Figure

    for text, fails in (("$\\foo$", True), (caption("$\\foo$"), False)):
        figure = Figure()
        figure.suptitle(text)
        if fails:
            with pytest.raises(ValueError, match="foo"):
                figure.savefig(io.BytesIO())
        else:
            figure.savefig(io.BytesIO())


# Files that are named by options.


@pytest.fixture
def at_once():
    """Ends a test that waits for what never comes."""

    def late(*_):
        # No OSError, which would be told as one of storage.
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(at):
    os.mkfifo(at)
    return at


ENDLESS = {"a pipe": fifo, "a device": lambda at: (at.symlink_to("/dev/zero"), at)[1]}


@pytest.mark.parametrize("endless", ENDLESS)
@pytest.mark.parametrize(
    "words",
    [
        "self-fuse {a} --config {file}.yml",
        "inspect {a} --arch {file}.toml",
        "fuse {a} {a} --equalize --tokens {file}.jsonl",
        "fuse {a} {a} --equalize --tokens {file}.npz",
        "theory {a} --copies 2 --data {file}.txt",
        "ligo {a} --emb 24 --heads 6 --data {file}.jsonl",
        "when {file}.csv --cost-ratio 4",
        "when {file}.jsonl --cost-ratio 4",
        "when {file}.tfevents --cost-ratio 4",
        "grow {a} --to {file}.gin",
        "grow {a} --to {file}.yml",
    ],
)
@pytest.mark.usefixtures("at_once")
def test_what_has_no_end_is_not_read(model, tmp_path, fusectl, words, endless):
    suffix = re.search(r"\{file\}(\.\w+)", words)[1]
    ENDLESS[endless](tmp_path / f"f{suffix}")

    done = fusectl(*[each.format(a=model, file=tmp_path / "f") for each in words.split()])

    assert done.code in {2, 4, 8}, done.err


def bomb(levels=9):
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels))]
    return "\n".join([*lines, "base_emb_dim: 8"])


N = 250_000
CONFIGS = {
    "references": bomb(),
    "digits": "base_emb_dim: " + "9" * N,
    "sexagesimal": "base_emb_dim: 1" + ":59" * 6000,
    "sexagesimal fraction": "base_emb_dim: 1" + ":59" * 100 + ".5",
    "deep": "[" * N,
    "deep maps": "{a: " * (N // 4),
    "many": "base_emb_dim: 8\na: [" + "{}," * (N // 3) + "]",
    "no such day": "base_emb_dim: 2001-13-45",
    "no number": "base_emb_dim: !!int foo",
    "no truth": "a: !!bool foo",
    "no time": "a: !!timestamp foo",
    "an object": "a: !!python/object/apply:os.system [ls]",
    "a null": "a: \0",
    "no text": "\xff",
    "keys of keys": "? " * (N // 2),
    "too large": "#" * (1 << 20),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.usefixtures("at_once")
def test_a_config_cannot_take_the_machine(tmp_path, config):
    (tmp_path / "c.yml").write_text(CONFIGS[config], encoding="latin-1")

    with pytest.raises(UsageError):
        read_config(str(tmp_path / "c.yml"))


def test_a_config_that_makes_sense_is_read(tmp_path):
    (tmp_path / "c.yml").write_text("base_emb_dim: 2_048\nrope_max_timescale: 1e6\nname: 'a*b'\n")
    assert read_config(str(tmp_path / "c.yml")).values == {
        "base_emb_dim": 2048,
        "rope_max_timescale": 1e6,
        "name": "a*b",
    }


PARTS = ".a" * 400
TABLES = {
    "a key of many parts": "a" + ".a" * 100_000 + " = 1",
    "many keys of many parts": "".join(f"a{i}{PARTS} = 1\n" for i in range(250)),
    "a table inside of many": f"[a{PARTS}]\n" + "".join(f"b{i}.c = 1\n" for i in range(20_000)),
    "many rows": "[[row]]\n" * 30_000,
    "many tables": "".join(f"[t{i}]\n" for i in range(20_000)),
    "deep": "a = " + "[" * 200_000,
    "digits": "a = " + "9" * 200_000,
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.usefixtures("at_once")
def test_a_familys_table_cannot_take_the_machine(table):
    with pytest.raises(UsageError):
        parse_family(TABLES[table], "my.toml")


def npz(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, raw in members.items():
            packed.writestr(name.replace("_npy", ".npy"), raw)
    return file.getvalue()


def header(shape, nbytes=0, descr="<i4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(nbytes)


# Functions: made at once they would cost every worker seconds before its first test.
TOKENS = {
    "zeros.npz": lambda: npz(inputs_npy=header((5 << 12, 1 << 12), 5 << 26)),
    "a lying shape.npz": lambda: npz(inputs_npy=header((2**40,))),
    "no array.npz": lambda: npz(x=bytes(5 << 26)),
    "many.npz": lambda: npz(
        **{f"{name}_npy": header((1, 2), 4) + b"\1\0\0\0" for name in ("inputs", "targets")},
        **{f"a{i}_npy": header((1,), 4) for i in range(1500)},
    ),
    "deep.jsonl": lambda: b"[" * 200_000,
    "wide.jsonl": lambda: b'{"inputs": [' + b"1," * 3_000_000 + b"1]}",
    "digits.jsonl": lambda: b'{"inputs": [' + b"9" * 5000 + b"]}",
    "uneven.jsonl": lambda: (
        b'{"inputs": [1], "targets": [1]}\n' * 1000 + b'{"inputs": [' + b"1," * 200_000 + b'1], "targets": [1]}'
    ),
    "large.jsonl": lambda: b" " * (65 << 20),
}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.usefixtures("at_once")
def test_a_file_of_tokens_cannot_take_the_machine(tmp_path, tokens):
    import tracemalloc

    (tmp_path / tokens).write_bytes(TOKENS[tokens]())
    tracemalloc.start()
    try:
        with pytest.raises((Corrupt, UsageError)):
            read_tokens(str(tmp_path / tokens), 100, None, None)
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()


CURVES = {
    "deep.jsonl": b"[" * 200_000,
    "digits.jsonl": b'{"step": ' + b"9" * 5000 + b', "loss": 1}',
    "many.csv": b"step,loss\n" + b"1,1\n" * 3_000_000,
    "wide.csv": b"step,loss\n" + b'"' + b"x" * 200_000 + b'",1\n',
    "large.csv": b"x" * (65 << 20),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.usefixtures("at_once")
def test_a_curve_cannot_take_the_machine(tmp_path, fusectl, curve):
    (tmp_path / curve).write_bytes(CURVES[curve])

    done = fusectl("when", tmp_path / curve, "--cost-ratio", 4)

    assert done.code in {2, 5}, done.err


@pytest.mark.parametrize("to", ["emb=" + "9" * 5000, "emb=²", "layers=0"])
def test_sizes_that_are_no_numbers_are_refused(model, fusectl, to):
    done = fusectl("grow", model, "--to", to)
    assert done.code == 2, done.err


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("c.yml", b"base_emb_dim: abc"),
        ("c.yml", b"base_emb_dim: .inf"),
        ("c.yml", b"base_emb_dim: [1]"),
        ("c.gin", b"\n" * 1_000_000),
        ("c.gin", b"EMBED_DIM = " + b"9" * 5000),
        ("c.gin", b" " * 1_000_000),
    ],
)
@pytest.mark.usefixtures("at_once")
def test_targets_from_files_that_are_none_are_refused(model, tmp_path, fusectl, name, raw):
    (tmp_path / name).write_bytes(raw)
    done = fusectl("grow", model, "--to", tmp_path / name)
    assert done.code == 2, done.err


def test_files_that_are_read_are_regular_and_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "loop").symlink_to("loop")
    assert read_given(tmp_path / "a", 3, "tokens") == b"abc"
    # Of no size, as it says itself.
    assert read_given("/proc/self/status", 1 << 20, "tokens").startswith(b"Name")
    for path, error in (
        (tmp_path / "b", NotFound),
        (tmp_path, NotFound),
        (tmp_path / "a/b", NotFound),
        (f"{tmp_path}/\0", NotFound),
        (tmp_path / "loop", FusectlError),
        ("/proc/self/pagemap", UsageError),
    ):
        with pytest.raises(error):
            read_given(path, 1 << 20, "tokens")
    with pytest.raises(UsageError, match="3 bytes, more than the 2"):
        read_given(tmp_path / "a", 2, "tokens")


# What no format holds.


@pytest.mark.parametrize("form", ["t5x", "orbax-zarr2", "orbax-zarr3"])
def test_a_name_with_a_null_has_no_directory(tmp_path, fusectl, form):
    save(tmp_path / "a", {"target/a\0b": np.ones(3, np.float32)}, "orbax")

    done = fusectl("convert", tmp_path / "a", "--format", form, "-o", tmp_path / "out")

    assert (done.code, "to go on" in done.err, "no name for a directory" in done.err) == (6, False, True), done.err
    assert not staging_of(tmp_path / "out").exists()
    assert fusectl("convert", tmp_path / "a", "-o", tmp_path / "out").code == 0


def test_an_index_of_another_driver_is_no_checkpoint_of_t5x(tmp_path):
    import msgpack

    save(tmp_path / "a", {"target/w": np.ones((3, 2), np.float32)}, "t5x")
    index = msgpack.unpackb((tmp_path / "a/checkpoint").read_bytes())
    index["optimizer"]["target"]["w"]["driver"] = "neuroglancer_precomputed"
    (tmp_path / "a/checkpoint").write_bytes(msgpack.packb(index))

    assert any("neuroglancer_precomputed" in problem for problem in fsck(str(tmp_path / "a")).problems)
    with pytest.raises(Corrupt):
        plan_fusion([str(tmp_path / "a")] * 2, Options())
