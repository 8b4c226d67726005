"""From a path that somebody typed to the checkpoint that is meant."""

import json
import shutil

import numpy as np
import pytest
from models import checkpoint

from fusectl.errors import Corrupt, NotFound, UsageError
from fusectl.formats.locate import locate
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save


VALUES = {"w": np.ones(2, np.float32)}


@pytest.fixture
def runs(tmp_path):
    for step in (5, 30, 7):
        checkpoint(tmp_path / f"t5x/checkpoint_{step}", step=step)
        checkpoint(tmp_path / f"orbax/{step}", format="orbax", step=step)
    return tmp_path


@pytest.mark.slow
def test_a_root_of_steps_means_its_newest(runs):
    for root in ("t5x", "orbax", "t5x/latest", "orbax/latest", "orbax/"):
        opened = open_checkpoint(str(runs / root))
        assert opened.step == 30
        assert "the newest committed step" in opened.location.notes[-1]


def test_uncommitted_steps_are_skipped_with_the_reason(runs):
    (runs / "orbax/30/commit_success.txt").unlink()
    (runs / "t5x/checkpoint_30/checkpoint").unlink()

    for root in ("t5x", "orbax"):
        location = locate(str(runs / root))
        assert location.step == 7
        assert location.notes[0].startswith(f"skipped {'checkpoint_' if root == 't5x' else ''}30: ")


def test_a_step_an_item_and_a_symlink_are_the_same_checkpoint(runs):
    (runs / "link").symlink_to(runs / "orbax/30")

    for path in ("orbax/30", "orbax/30/state", "orbax/30/", "link", "orbax/../orbax/30"):
        assert open_checkpoint(str(runs / path)).step == 30


@pytest.mark.parametrize(
    "suffix", [".orbax-checkpoint-tmp", ".tmp-1700000000", ".fusectl-tmp", ".orbax-checkpoint-tmp-123"]
)
def test_temporary_directories_are_refused(runs, suffix):
    shutil.copytree(runs / "orbax/30", runs / f"orbax/31{suffix}")

    with pytest.raises(Corrupt, match="a write that did not finish"):
        locate(str(runs / f"orbax/31{suffix}"))


def test_a_step_without_commit_time_is_refused(runs):
    path = runs / "orbax/30/_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit_timestamp_nsecs": None}))

    with pytest.raises(Corrupt, match="never committed"):
        locate(str(runs / "orbax/30"))
    with pytest.raises(Corrupt, match="never committed"):
        locate(str(runs / "orbax/30/state"))


def test_ocdbt_databases_that_were_not_merged_are_refused(runs):
    (runs / "orbax/30/state/manifest.ocdbt").unlink()
    (runs / "orbax/30/state/ocdbt.process_0").mkdir()

    with pytest.raises(Corrupt, match="never committed") as error:
        locate(str(runs / "orbax/30"))

    assert "not merged" in error.value.details[0]


def test_a_step_without_its_index_is_half_written(runs):
    (runs / "orbax/30/state/_METADATA").unlink()
    (runs / "t5x/checkpoint_30/checkpoint").unlink()

    for step in ("orbax/30", "t5x/checkpoint_30"):
        with pytest.raises(Corrupt, match="without its index"):
            locate(str(runs / step))


@pytest.mark.parametrize("deep", ["orbax/30/state/d", "t5x/checkpoint_30/target.token_embedder.embedding"])
def test_one_level_too_deep_is_answered_with_the_checkpoint(runs, deep):
    with pytest.raises(NotFound, match="no checkpoint") as error:
        locate(str(runs / deep))

    assert "one level too deep" in error.value.hint
    assert "30" in error.value.hint


def test_one_level_too_high_is_answered_with_a_checkpoint(runs):
    with pytest.raises(NotFound, match="no checkpoint") as error:
        locate(str(runs))

    assert "one level too high? there is" in error.value.hint


def test_a_file_is_answered_with_its_checkpoint(runs):
    with pytest.raises(NotFound, match="a checkpoint is a directory") as error:
        locate(str(runs / "t5x/checkpoint_30/checkpoint"))

    assert str(runs / "t5x/checkpoint_30") in error.value.hint


def test_a_typing_error_is_answered_with_near_names(runs):
    with pytest.raises(NotFound, match="no such directory") as error:
        locate(str(runs / "t5x/checkpoint_31"))

    assert "checkpoint_30" in error.value.hint


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(NotFound, match="no checkpoint"):
        locate(str(tmp_path))


def test_unknown_kinds_of_url_are_refused_by_name():
    with pytest.raises(UsageError, match="no such kind of URL"):
        locate("http://server/checkpoint_5")


def test_several_unknown_items_are_listed(tmp_path):
    for item in ("left", "right"):
        (tmp_path / f"3/{item}").mkdir(parents=True)
        (tmp_path / f"3/{item}/_METADATA").write_text("{}")

    with pytest.raises(NotFound, match="several items: left, right"):
        locate(str(tmp_path / "3"))


# ---- what stands side by side


def test_checkpoints_side_by_side_are_no_uncommitted_step(tmp_path):
    """Each by itself as Orbax 0.12.8 saves it: there is no step whose marker could be missing."""
    for path in ("models/teacher", "models/student", "base/params"):
        save(tmp_path / path, VALUES, "orbax", item=None)
    (tmp_path / "base/assets").mkdir()

    with pytest.raises(NotFound, match="several items: student, teacher") as error:
        locate(str(tmp_path / "models"))
    assert "name one, such as" in error.value.hint
    assert locate(str(tmp_path / "models/teacher")).home == tmp_path / "models/teacher"
    assert locate(str(tmp_path / "base")).path == tmp_path / "base/params"


def test_an_item_saved_straight_into_a_step_is_of_that_step(tmp_path):
    """As PyTreeCheckpointer().save("DIR/0/items") leaves it, which MaxText does."""
    save(tmp_path / "0/items", VALUES, "orbax", item=None)

    for path in ("0", "0/items", ""):
        location = locate(str(tmp_path / path))
        assert (location.path, location.step) == (tmp_path / "0/items", 0)
    # A step that has begun, and whose items are complete, is not.
    save(tmp_path / "1", VALUES, "orbax")
    (tmp_path / "1/commit_success.txt").unlink()
    with pytest.raises(Corrupt, match="never committed"):
        locate(str(tmp_path / "1"))


def test_hints_never_lead_to_an_unrelated_sibling(tmp_path):
    save(tmp_path / "other", VALUES, "orbax", item=None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")

    for name in ("empty", "notes.txt"):
        with pytest.raises(NotFound) as error:
            locate(str(tmp_path / name))
        assert "one level too deep" not in (error.value.hint or "")


def test_steps_may_have_a_prefix(tmp_path):
    for step in (5, 10):
        save(tmp_path / f"run/my_net_{step:08}", VALUES, "orbax", item="default")
    for path in ("run", "run/latest", "run/my_net_00000010", "run/my_net_00000010/default"):
        assert locate(str(tmp_path / path)).step == 10
    # One uncommitted is skipped, another prefix is another series: which one is meant?
    (tmp_path / "run/my_net_00000010/commit_success.txt").unlink()
    assert locate(str(tmp_path / "run")).step == 5
    save(tmp_path / "run/other_7", VALUES, "orbax", item="default")
    with pytest.raises(NotFound):
        locate(str(tmp_path / "run"))


def test_models_with_numbers_in_their_names_are_no_steps(tmp_path):
    """What has an index itself was saved without a manager: nobody says that the larger number is newer."""
    for i in (1, 2):
        save(tmp_path / f"zoo/model_{i}", VALUES, "orbax", item=None)

    with pytest.raises(NotFound, match="several items: model_1, model_2"):
        locate(str(tmp_path / "zoo"))
