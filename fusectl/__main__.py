"""The program: `fusectl` and `python -m fusectl`. Answers --version before anything heavy is imported."""

from __future__ import annotations

import gc
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
    # Most of a short run is imports, which make objects that live; looking for garbage among them costs a tenth.
    gc.set_threshold(50_000)
    from fusectl.cli import run

    code = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's tidy end takes a sixth of a short run, and after a failure or a signal, when threads of tensorstore may
    # still be at work, it aborts them by aborting the process.
    os._exit(code)


if __name__ == "__main__":
    main()
