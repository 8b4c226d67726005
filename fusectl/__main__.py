"""The program: `fusectl` and `python -m fusectl`. Answers --version before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Runs the command line on sys.argv and exits with its code."""
    # Until the program's own handlers are in place, an interrupt ends it without a traceback.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:] == ["--version"]:
        import fusectl

        print(f"fusectl {fusectl.__version__}")  # noqa: T201
        sys.exit(0)
    from fusectl.cli import run

    code = run(sys.argv[1:])
    if code:
        # After a failure or a signal, threads of tensorstore may still be at work, and Python's tidy end aborts them
        # by aborting the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
