"""The report that ships with a checkpoint: what stands in it, when it is written, and that a failure leaves nothing."""

import dataclasses
import json

import numpy as np
import pytest
from models import checkpoint

from fusectl.formats.opening import fingerprint, open_checkpoint
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.verification import Settings, verify, write_report
from fusectl.verification.page import draw, page
from fusectl.verification.report import FILE_NAME, PAGE_NAME
from fusectl.writing.carrying_out import carry_out


LAYERS = {"encoder": 1, "decoder": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return [checkpoint(root / name, seed=i, layers=LAYERS) for i, name in enumerate("ab")]


@pytest.fixture(scope="module")
def report(sources, tmp_path_factory):
    plan, opened = plan_fusion(sources, Options())
    path = carry_out(plan, opened, tmp_path_factory.mktemp("fused") / "checkpoint_1000")
    return verify(str(path), settings=Settings(trace=True))


@pytest.mark.slow
def test_it_says_what_was_checked_on_what_with_which_numbers(report, sources):
    tree = json.loads(report.to_json())

    assert tree["schema"] == "fusectl/verify/1"
    assert tree["passed"] is True
    assert [s["path"] for s in tree["sources"]] == sources
    assert [s["fingerprint"] for s in tree["sources"]] == [fingerprint(open_checkpoint(s)) for s in sources]
    assert {"fusectl", "python", "numpy", "tensorstore", "jax", "flax"} == tree["versions"].keys()
    assert "4 rows of 16 random ones, seed 0" in tree["tokens"]
    assert tree["peak_rss_bytes"] > 1 << 20
    for level in ("algebra", "native"):
        numbers = {"max_abs", "rms", "relative_rms", "kl", "top1_agreement", "tokens", "tolerance", "tolerance_says"}
        assert numbers <= tree[level].keys()
    assert tree["algebra"]["tokens"] == 60
    assert "(float32) x 3 layers x the largest logit" in tree["algebra"]["tolerance_says"]
    assert "K = 2" in tree["algebra"]["tolerance_says"]
    assert len(tree["trace"]) == 2 + 1 + 3 + 1
    assert tree["files"]["bytes_read"] == sum(leaf.nbytes for leaf in open_checkpoint(report.path).leaves.values())


def test_the_page_is_markdown_with_every_level_and_source(report, sources):
    text = page(report)

    assert text.startswith(f"# Verification of `{report.path}`\n\n**Passed.**")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for line in tables:
        bars = line.replace("\\|", "").count("|")
        assert bars in {4, 7, 9}, line
    for name in (*sources, "files", "weights", "algebra", "native", "decoder/decoder_norm"):
        assert name in text


def test_numbers_that_are_none_are_null(report):
    odd = dataclasses.replace(report, native=dataclasses.replace(report.native, max_abs=float("nan")))

    assert json.loads(odd.to_json())["native"]["max_abs"] is None


def test_a_report_is_no_part_of_the_checkpoint(report, fusectl):
    home = open_checkpoint(report.path).location.home
    before = fingerprint(open_checkpoint(report.path))
    names = set(open_checkpoint(report.path).leaves)

    write_report(report, home)

    assert (home / PAGE_NAME).read_text() == page(report)
    assert json.loads((home / FILE_NAME).read_text())["passed"]
    assert fingerprint(open_checkpoint(report.path)) == before
    assert set(open_checkpoint(report.path).leaves) == names
    assert fusectl("verify", report.path, "--levels", "files", "--report").code == 0
    assert json.loads((home / FILE_NAME).read_text())["algebra"] is None


@pytest.mark.slow
def test_a_trace_is_drawn(report, tmp_path, fusectl):
    draw(report.trace, tmp_path / "out.svg")
    done = fusectl("verify", report.path, "--levels", "native", "--plot", tmp_path / "out.png")

    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out.svg").read_text()
    assert done.code == 0
    assert "decoder/decoder_norm" in done.out
    assert fusectl("verify", report.path, "--plot", tmp_path / "out.doc").code == 2
    assert fusectl("verify", report.path, "--levels", "files", "--trace").code == 2
    assert fusectl("verify", report.path, "--levels", "native", "--plot", tmp_path / "no" / "out.png").code == 8


@pytest.mark.slow
def test_damaged_files_are_reported_though_there_is_nothing_to_draw(sources, tmp_path, fusectl):
    path = tmp_path / "out"
    fusectl("fuse", *sources, "-o", path, "--format", "orbax-zarr2")
    (path / "state/target.decoder.decoder_norm.scale/0").unlink()

    done = fusectl("verify", path, "--plot", tmp_path / "out.png", "--report")

    assert done.code == 3
    assert "chunk" in done.err
    assert not (tmp_path / "out.png").exists()
    assert json.loads((path / FILE_NAME).read_text())["passed"] is False


@pytest.mark.slow
def test_fusing_verifies_before_anything_appears(sources, tmp_path, fusectl):
    done = fusectl("fuse", *sources, "-o", tmp_path / "out", "--verify")

    assert done.code == 0
    assert done.out == f"{tmp_path / 'out'}\n"
    assert "algebra   ok" in done.err
    tree = json.loads((tmp_path / "out" / FILE_NAME).read_text())
    assert tree["passed"]
    assert tree["path"] == str(tmp_path / "out")
    assert str(tmp_path / "out") in (tmp_path / "out" / PAGE_NAME).read_text()

    done = fusectl("self-fuse", sources[0], "-o", tmp_path / "two", "--verify", "--no-report", "--json", "-q")
    assert done.json["result"]["verification"]["passed"]
    assert not (tmp_path / "two" / FILE_NAME).exists()


@pytest.mark.slow
def test_what_fails_its_verification_does_not_appear(sources, tmp_path, fusectl, monkeypatch):
    """An executor that writes one wrong value: the proof finds it, and nothing is left."""
    from fusectl.writing import execute

    right = execute.compute

    def wrong(chunk, reader):
        values = right(chunk, reader)
        return values + np.float32(0.01) if values.ndim == 2 else values

    monkeypatch.setattr(execute, "compute", wrong)

    done = fusectl("fuse", *sources, "-o", tmp_path / "out", "--verify")

    assert done.code == 3
    assert "verification failed, nothing was kept" in done.err
    assert "weights:" in done.err
    assert list(tmp_path.iterdir()) == []
    as_json = fusectl("fuse", *sources, "-o", tmp_path / "out", "--verify", "--json").json
    assert as_json["status"] == "failed"
    assert as_json["result"]["verification"]["weights"]["passed"] is False
    # The control: without the proof it appears.
    assert fusectl("fuse", *sources, "-o", tmp_path / "out").code == 0
