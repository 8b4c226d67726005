"""What was fused, said of checkpoints that a trainer has saved since, without fusectl.json."""

import json
import shutil

import pytest
from models import checkpoint, write_record

from fusectl.errors import Incompatible, UsageError
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME
from fusectl.inspection.inspect import inspect
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.restart import restart
from fusectl.sources.lineage import Lineage, for_each, lineages, remembered
from fusectl.writing.carrying_out import carry_out


LAYERS = {"encoder": 1, "decoder": 1}
FUSED = "--fused-from"
GROUPS = "--norm-groups"


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """A fusion of two models with a norm per source, and the same as a trainer saves it: without fusectl.json."""
    root = tmp_path_factory.mktemp("lineage")
    sources = [checkpoint(root / name, seed=i, layers=LAYERS) for i, name in enumerate("ab")]
    plan, opened = plan_fusion(sources, Options(norm="property"))
    path = carry_out(plan, opened, root / "fused/checkpoint_1000")
    trained = root / "trained/checkpoint_1010"
    shutil.copytree(path, trained)
    (trained / FILE_NAME).unlink()
    return str(path), str(trained)


def record_of(path):
    return open_checkpoint(str(path)).record


@pytest.mark.slow
@pytest.mark.parametrize("said", ["fused", "groups"])
def test_stages_after_a_fusion_with_a_norm_per_source_keep_its_groups(fused, tmp_path, fusectl, said):
    path, trained = fused
    words = [FUSED, path] if said == "fused" else [GROUPS, "12,12"]

    done = fusectl("self-fuse", trained, *words, "-o", tmp_path / "checkpoint_1010", "--verify")

    assert done.code == 0, done.err
    assert "taken for models with one norm" not in done.err
    record = record_of(tmp_path / "checkpoint_1010")
    assert (record.norm, record.norm_groups) == ("property", (12, 12, 12, 12))
    proof = json.loads((tmp_path / "checkpoint_1010/fusectl-verify.json").read_text())
    assert (proof["native"]["passed"], proof["function_checked"]) == (True, True)
    assert "norm_groups = (12, 12, 12, 12)" in restart(str(tmp_path / "checkpoint_1010")).text()


@pytest.mark.slow
def test_without_a_lineage_one_norm_is_assumed_and_said(fused, tmp_path, fusectl):
    _, trained = fused

    done = fusectl("self-fuse", trained, "-o", tmp_path / "checkpoint_1010")

    assert "taken for models with one norm (--fused-from)" in done.err
    assert record_of(tmp_path / "checkpoint_1010").norm_groups == (24, 24)
    assert "one norm over the whole width is assumed" in restart(trained).text()
    assert "24 (assumed: no fusectl.json)" in fusectl("inspect", trained, "--no-tree").out
    # One that was made without a lineage only repeats the assumption.
    copied = tmp_path / "copy/checkpoint_1010"
    assert fusectl("convert", trained, "-o", copied, "--format", "orbax").code == 0
    assert "(assumed)" in fusectl("inspect", copied, "--no-tree").out
    assert inspect(str(copied), lineage=Lineage(None, (12, 12))).checkpoint.record.norm_groups == (12, 12)


def test_restart_and_inspect_go_by_the_lineage(fused, fusectl):
    path, trained = fused

    for words in ([FUSED, path], [GROUPS, "12,12"]):
        text = fusectl("restart-config", trained, *words).out
        assert "norm_groups = (12, 12)" in text
        assert "is assumed" not in text
        assert "12 + 12" in fusectl("inspect", trained, *words, "--no-tree").out


@pytest.mark.slow
def test_a_fusion_inherits_a_norm_per_source(fused, tmp_path, fusectl):
    """Also from a record: what was printed for the trainer before had one norm."""
    path, _ = fused

    assert fusectl("self-fuse", path, "-o", tmp_path / "checkpoint_1000").code == 0

    record = record_of(tmp_path / "checkpoint_1000")
    assert (record.norm, record.norm_groups) == ("property", (12, 12, 12, 12))
    other = checkpoint(tmp_path / "other", seed=5, layers=LAYERS)
    done = fusectl("fuse", path, other, "--norm", "rule", "-o", tmp_path / "mixed")
    assert "with one norm the result computes another function" in done.err


@pytest.mark.slow
def test_sources_that_lost_their_records_are_verified_by_their_lineage(fused, tmp_path, fusectl):
    path, trained = fused
    wide = tmp_path / "checkpoint_1010"
    assert fusectl("self-fuse", trained, FUSED, path, "-o", wide).code == 0
    (wide / FILE_NAME).unlink()
    asked = ("verify", wide, "--sources", trained, trained, "--levels", "algebra", "--json")

    told = fusectl(*asked, FUSED, path).json["result"]
    assumed = fusectl(*asked).json["result"]

    assert told["norm_groups"] == [12, 12, 12, 12]
    # Of copies both are exact, but of different networks.
    assert (told["passed"], assumed["norm_groups"]) == (True, [24, 24])
    assert told["algebra"]["reference_rms"] != assumed["algebra"]["reference_rms"]


def test_the_symmetry_of_what_was_trained_on_needs_no_copies(fused, fusectl):
    path, trained = fused

    assert fusectl("theory", trained, "--symmetry").code == 2
    assert fusectl("theory", trained, FUSED, path, "--symmetry").code == 0


def test_one_lineage_for_all_or_one_for_each():
    two = lineages([], ["8,8", "none"])

    assert two == (Lineage(None, (8, 8)), None)
    assert for_each(two, 2) == list(two)
    assert for_each(two[:1], 3) == [two[0]] * 3
    assert for_each((), 2) == [None, None]
    with pytest.raises(UsageError, match="2 lineages for 3 sources"):
        for_each(two, 3)


@pytest.mark.parametrize("text", ["", "8,", "0,8", "-8", "8.5", "eight", "9" * 5000])
def test_what_are_no_widths_is_refused(text):
    with pytest.raises(UsageError, match="no widths"):
        lineages([], [text])


def test_lineages_that_contradict_the_checkpoint_are_refused(fused, tmp_path, fusectl):
    path, trained = fused
    plain = checkpoint(tmp_path / "plain", layers=LAYERS)

    assert fusectl("self-fuse", trained, FUSED, path, GROUPS, "12,12").code == 2
    with pytest.raises(UsageError, match="says what was fused"):
        remembered(open_checkpoint(path), Lineage(None, (12, 12)))
    with pytest.raises(UsageError, match="has no fusectl.json"):
        remembered(open_checkpoint(trained), Lineage(plain))
    for words in ([GROUPS, "12,16"], [FUSED, path]):
        done = fusectl("self-fuse", plain if words[0] == FUSED else trained, *words, "-o", tmp_path / "no")
        assert (done.code, "norm groups" in done.err) == (6, True), done.err
    with pytest.raises(Incompatible, match="norm groups"):
        restart(trained, lineage=Lineage(None, (8, 8)))


def test_of_a_fusion_that_trained_with_one_norm_the_lineage_is_one_norm(fused, tmp_path):
    path, trained = fused
    rule = tmp_path / "rule"
    shutil.copytree(path, rule)
    write_record(rule, {**json.loads((rule / FILE_NAME).read_text()), "norm": "rule"})

    assert remembered(open_checkpoint(trained), Lineage(str(rule))).record.norm_groups == (24,)
