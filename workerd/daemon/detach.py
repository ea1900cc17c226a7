"""Detaching from the terminal, for hosts without systemd."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable


def open_standard_descriptors() -> None:
    """Put /dev/null where a starter has closed standard input, output or error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest one that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
    # Python has none for a descriptor that was closed when it started.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - stay open
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def shed_inheritance() -> None:
    """Undo what a careless starter leaves behind, for us and for the jobs."""
    # A signal that is blocked could not stop us.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # While it is ignored, the kernel reaps the jobs and nobody learns their exit status.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # An open file or socket of the starter's is no business of a job's.
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            os.set_inheritable(descriptor, descriptor <= 2)


def detach(pidfile: str | None, log_file: str | None, keep: Iterable[int]) -> None:
    """Become a daemon of its own, for hosts without systemd; returns in the new process.

    ``log_file`` takes what would go to stderr, ``/dev/null`` when None; the descriptors
    ``keep`` stay open. Raises OSError.
    """
    # Here and not above: Debian 12's version costs 34 MB for a set of all descriptors.
    import daemon

    out = open(log_file or os.devnull, "a", buffering=1)  # noqa: SIM115 - stays open
    # Opened while there is somebody to tell when it cannot be.
    number = open(pidfile, "a") if pidfile else None  # noqa: SIM115 - closed below
    context = daemon.DaemonContext(
        working_directory=os.getcwd(),
        umask=0o077,
        stdout=out,
        stderr=out,
        files_preserve=[out, *([number] if number else []), *keep],
        signal_map={},
    )
    context.open()
    if number:
        with number:
            number.truncate(0)
            number.write(f"{os.getpid()}\n")
