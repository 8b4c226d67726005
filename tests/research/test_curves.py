"""Loss curves: the three kinds of files, and what is no curve."""

import math
import sys

import pytest
from written import csv_of, events_of, lines_of

from fusectl.errors import Corrupt, NotFound, UsageError
from fusectl.research.curves import read_curve


STEPS = [100, 200, 400]
LOSSES = [4.5, 3.25, 3.125]


def points(curve):
    return list(zip(curve.steps.tolist(), curve.losses.tolist(), strict=True))


EXPECTED = list(zip(STEPS, LOSSES, strict=True))


def test_a_csv(tmp_path):
    assert points(read_curve(csv_of(tmp_path / "a.csv", EXPECTED))) == EXPECTED
    named = csv_of(tmp_path / "b.csv", [(s, 1, v) for s, v in EXPECTED], "it, Loss, eval")
    found = read_curve(named, step_column="it", loss_column="eval")
    assert points(found) == EXPECTED
    # Without a name it is the one that is called so, whatever its case.
    assert read_curve(named, step_column="it").losses.tolist() == [1, 1, 1]


def test_lines_of_json_of_which_some_are_about_other_things(tmp_path):
    rows = [{"step": s, "loss": v} for s, v in EXPECTED]
    path = lines_of(tmp_path / "a.jsonl", [{"note": "begun"}, *rows, {"step": 500, "accuracy": 0.5}])

    assert points(read_curve(path)) == EXPECTED


@pytest.mark.parametrize("old", [False, True])
def test_event_files_and_their_directory(tmp_path, old):
    path = events_of(tmp_path / "run", EXPECTED, old=old)
    (file,) = (tmp_path / "run").iterdir()

    assert points(read_curve(path)) == EXPECTED
    assert points(read_curve(str(file))) == EXPECTED


def test_a_run_that_began_again_counts_from_there(tmp_path):
    events_of(tmp_path / "run", [(100, 4.5), (200, 9.0), (300, 8.0)], suffix=".1")
    events_of(tmp_path / "run", [(200, 3.25), (400, 3.125)], suffix=".2")
    files = sorted((tmp_path / "run").iterdir())
    # Both were begun within a second: the order is that of their names.
    for i, file in enumerate(sorted(files, key=lambda f: f.name[-1])):
        file.rename(file.with_name(f"events.out.tfevents.{i}"))

    found = read_curve(str(tmp_path / "run"))

    assert points(found) == EXPECTED
    assert found.notes == ("the run began again at step 200: 2 points are left out",)


def test_a_tag_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    events_of(tmp_path / "run", EXPECTED, tag="train/loss")

    with pytest.raises(UsageError) as raised:
        read_curve(str(tmp_path / "run"))
    assert raised.value.details == ("there are 'train/loss'",)
    assert points(read_curve(str(tmp_path / "run"), loss_column="train/loss")) == EXPECTED


def test_without_tensorboard_the_error_names_the_extra(tmp_path, monkeypatch):
    path = events_of(tmp_path / "run", EXPECTED)
    for name in list(sys.modules):
        if name.startswith("tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)

    with pytest.raises(UsageError) as raised:
        read_curve(path)
    assert raised.value.hint == "pip install 'fusectl[tensorboard]'"


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ([], Corrupt, "no points"),
        ([(100, 4.0), (100, 3.0)], Corrupt, "do not rise"),
        ([(200, 4.0), (100, 3.0)], Corrupt, "do not rise"),
        ([(100, 4.0), (200, math.nan)], Corrupt, "line 3: loss is 'nan'"),
        ([(100, 4.0), (200, math.inf)], Corrupt, "line 3: loss is 'inf'"),
        ([(100, 4.0), ("", 3.0)], Corrupt, "line 3: step is ''"),
        ([(100, 4.0), (200, "low")], Corrupt, "line 3: loss is 'low'"),
        ([(100, ""), (200, "")], Corrupt, "no points"),
    ],
)
def test_what_is_no_curve_is_refused(tmp_path, rows, error, says):
    with pytest.raises(error, match=says):
        read_curve(csv_of(tmp_path / "a.csv", rows))


def test_columns_that_are_not_there_are_answered_with_those_that_are(tmp_path):
    path = csv_of(tmp_path / "a.csv", EXPECTED, "step,train_loss")

    with pytest.raises(UsageError, match="no column 'loss'") as raised:
        read_curve(path)
    assert raised.value.details == ("there are 'step', 'train_loss'",)
    assert raised.value.hint == "--loss-column NAME"
    with pytest.raises(UsageError, match="no column 'it'"):
        read_curve(path, step_column="it", loss_column="train_loss")
    twice = csv_of(tmp_path / "b.csv", [(1, 2, 3)], "step,Loss,loss")
    with pytest.raises(UsageError, match="more than one column 'loss'"):
        read_curve(twice)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(NotFound):
        read_curve(str(tmp_path / "none.csv"))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Corrupt, match="no text"):
        read_curve(str(tmp_path / "bytes.csv"))
    (tmp_path / "text.jsonl").write_text("step loss\n1 2\n")
    with pytest.raises(Corrupt, match="no lines of JSON"):
        read_curve(str(tmp_path / "text.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="no event files"):
        read_curve(str(tmp_path / "empty"))
    events_of(tmp_path / "nothing", [])
    with pytest.raises(Corrupt, match="no scalars"):
        read_curve(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="have one step"):
        read_curve(str(tmp_path / "nothing"), step_column="step")
