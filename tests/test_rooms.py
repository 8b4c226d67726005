"""The rooms of the house: a room imports only rooms that come before it."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusectl


PACKAGE = Path(fusectl.__file__).parent
# In the order of the pass. What judges a checkpoint comes before all that makes one, and knows none of it.
ROOMS = (
    *("errors", "system", "layout", "families", "rules", "optimizer", "verbs", "formats", "sources", "networks"),
    *("verification", "planning", "operations", "writing", "demo", "inspection", "restart", "research", "testing"),
    *("cli", "__init__", "__main__"),
)


def imports(package: Path) -> Iterator[tuple[str, str, str]]:
    """Room, imported room, and where; imports inside of functions and of types alone count too."""
    for path in sorted(package.rglob("*.py")):
        here = path.relative_to(package)
        room = here.with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{here}:{node.lineno}: imports are absolute"
                base = (node.module or "").split(".")
                names = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
            else:
                continue
            for name in names:
                if name[0] == "fusectl" and len(name) > 1 and name[1] in ROOMS and name[1] != room:
                    yield room, name[1], f"{here}:{node.lineno}"


def backwards(package: Path) -> list[str]:
    return [
        f"{where}: {room} imports {imported}"
        for room, imported, where in imports(package)
        if ROOMS.index(room) < ROOMS.index(imported)
    ]


def test_no_arrow_runs_back():
    assert backwards(PACKAGE) == []


def test_every_module_and_folder_is_a_room():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found == set(ROOMS)
    assert len([path for path in PACKAGE.iterdir() if path.suffix == ".py"]) <= 5


@pytest.mark.parametrize(
    "line",
    [
        "from fusectl.cli.screen import Screen",
        "import fusectl.cli",
        "from fusectl import cli",
        "def f():\n    from fusectl.cli import app",
    ],
)
def test_an_arrow_that_runs_back_is_found(tmp_path, line):
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout/axes.py").write_text(line)
    assert len(backwards(tmp_path)) == 1


def test_the_rooms_are_rooms_of_the_pass():
    drawn = {(room, imported) for room, imported, _ in imports(PACKAGE)}
    assert {
        ("cli", "operations"),
        ("operations", "planning"),
        ("planning", "formats"),
        ("writing", "planning"),
    } <= drawn
    # What judges an output shares nothing with what planned and wrote it.
    assert not drawn & {("verification", room) for room in ("planning", "operations", "writing")}


def test_the_faults_that_are_put_in_on_purpose_are_about_lines_that_are_there():
    spec = importlib.util.spec_from_file_location("mutants", Path(__file__).parent / "bench/mutants.py")
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)

    assert len(mutants.FAULTS) >= 20
    assert mutants.problems() == []
