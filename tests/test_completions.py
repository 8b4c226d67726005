"""The completion scripts are what the program prints, and they complete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import COMMANDS

from fusectl.families.kinds import Trainer
from fusectl.families.registry import FAMILIES
from fusectl.formats.kinds import FormatName
from fusectl.formats.registry import FORMATS, ORBAX
from fusectl.layout.fill import FillKind


COMPLETIONS = Path(__file__).parents[1] / "completions"


def complete(**environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'fusectl'; from fusectl.__main__ import main; main()"
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_what_the_program_prints(shell):
    printed = complete(_FUSECTL_COMPLETE=f"source_{shell}").stdout

    assert (COMPLETIONS / f"fusectl.{shell}").read_text().strip() == printed.strip()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("fusectl ", COMMANDS),
        ("fusectl self", ["self-fuse"]),
        ("fusectl fuse --fi", ["--fill"]),
        ("fusectl fuse --fill ", list(FillKind)),
        ("fusectl fuse --format ", ["t5x", ORBAX, *[name for name in FORMATS if name != "t5x"]]),
    ],
)
def test_bash_is_offered_commands_options_and_values(words, offered):
    done = complete(_FUSECTL_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))

    assert done.stdout.split() == offered
    modules = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not modules & {"numpy", "tensorstore", "jax"}


def test_an_end_of_typers_is_not_one_of_a_pipe():
    """fish asks whether anything is to be offered, and goes by the exit code."""
    asked = {"_FUSECTL_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "is-args"}
    assert complete(**asked, _TYPER_COMPLETE_ARGS="fusectl ").returncode == 0
    assert complete(**asked, _TYPER_COMPLETE_ARGS="fusectl inspect ").returncode == 1
    assert complete(_FUSECTL_COMPLETE="source_bash").returncode == 0


def test_what_is_offered_is_there():
    assert set(FormatName) == {*FORMATS, ORBAX}
    assert all(Trainer(family.trainer) for family in FAMILIES)
