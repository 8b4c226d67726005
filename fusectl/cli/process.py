"""The process that a command runs in: its arguments, its standard streams, its signals, its devices."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from fusectl.cli.screen import Terminated


# What the program was called with: the line that resumes it says it again.
ARGUMENTS: list[str] = []

# After a signal; what it was doing has half of that to come to an end.
# Schedulers send SIGKILL some seconds after SIGTERM; tests hold the end of a run to two seconds.
LAST_MOMENT_S = 1.8
_TIMERS: list[threading.Timer] = []


def prepare_streams() -> None:
    """Makes standard streams that are closed or know few characters harmless."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            # Names of tensors may hold any character, and a terminal in the C locale knows few: a path that cannot be
            # printed would end a run that has succeeded.
            stream.reconfigure(errors="replace")


def handle_signals() -> None:
    """Has signals end what runs in good order; what nohup, or a shell for its background jobs, has set to be ignored
    stays ignored.
    """
    for number, handler in ((signal.SIGINT, _interrupted), (signal.SIGTERM, _terminated), (signal.SIGHUP, _terminated)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupted(_: int, frame: FrameType | None) -> None:
    _end_soon(130, at_once=_importing(frame))
    raise KeyboardInterrupt


def _terminated(number: int, frame: FrameType | None) -> None:
    error = Terminated(number)
    _end_soon(error.exit_code, at_once=_importing(frame))
    raise error


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: an exception then crashes some that are written in C++."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_soon(code: int, *, at_once: bool) -> None:
    """Ends the process even if the exception is lost in a callback from C, or a library does not let go.

    What is written is kept in any case, and --resume goes on with it.
    """

    def end() -> None:
        what = b"interrupted" if code == 130 else b"terminated"
        os.write(2, b"fusectl: " + what + b"; --resume goes on with what is done\n")
        os._exit(code)

    if at_once:
        end()
    timer = threading.Timer(LAST_MOMENT_S, end)
    timer.daemon = True
    timer.start()
    _TIMERS.append(timer)


def let_end() -> None:
    """Takes back that the process is going to be ended after a signal: it ends by itself."""
    for timer in _TIMERS:
        timer.cancel()


def stay_on_the_cpu() -> None:
    """What runs beside a training job must not claim its accelerators. To be called before JAX is imported."""
    # JAX takes three quarters of a GPU's memory when it starts, and a TPU as a whole.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
