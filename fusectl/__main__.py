"""The program: `fusectl` and `python -m fusectl`. Answers --version before anything heavy is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line on sys.argv and exits with its code."""
    if sys.argv[1:] == ["--version"]:
        import fusectl

        print(f"fusectl {fusectl.__version__}")  # noqa: T201
        sys.exit(0)
    from fusectl.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
