"""How a script and the processes that it has started end with each other."""

from __future__ import annotations

import ctypes
import signal
import sys


def exit_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does, by an exception, so that it takes along what it has started. A second SIGTERM,
    as `timeout` sends one to the whole group, does not cut that short."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("terminated")


def end_with_parent() -> None:
    """In a new process: it is asked to end, and what it started with it, when the one that started it has ended."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
