"""The README against the program: its two commands, its tables, the options that it names."""

import re
from pathlib import Path

import pytest
from cases import COMMANDS

from fusectl import errors
from fusectl.formats.registry import FORMATS


README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_two_commands_of_a_newcomer_stand_in_it():
    install = "python3 -m venv .venv && .venv/bin/pip install -q"

    assert f"    {install} . && .venv/bin/fusectl demo\n" in README
    assert f"    {install} '.[test]' && .venv/bin/python -m pytest -q\n" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    assert f"`fusectl {command}" in README


def test_every_format_and_exit_code_is_documented():
    codes = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.FusectlError)}

    for code in {0, 130, 143} | codes:
        assert re.search(rf"\| {code} \|", README), code
    for name in FORMATS:
        assert f"| `{name}` |" in README, name


def test_every_option_that_it_names_exists(fusectl):
    helps = " ".join(fusectl(command, "--help").out for command in COMMANDS)

    named = set(re.findall(r"(?<![-\w])--[a-z][a-z0-9-]+", README))
    assert named
    assert {option for option in named if option not in helps} == set()


def test_every_file_that_it_names_exists():
    root = Path(__file__).parents[1]
    named = re.findall(r"`((?:fusectl|tests|completions)/[\w/.]+)`", README)

    for name in named:
        assert (root / name).exists(), name
