"""Detaching from the terminal, for hosts without systemd."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable

from workerd.errors import SettingsError


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


def _umask() -> int:
    """The umask of whoever starts us, which is the jobs' as well."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def detach(pidfile: str | None, log_file: str | None, keep: Iterable[int]) -> None:
    """Become a daemon of its own, for hosts without systemd; returns in the new process.

    ``log_file`` takes what would go to stderr, ``/dev/null`` when None; the descriptors ``keep``
    stay open. Raises SettingsError when a file cannot be opened.
    """
    # Here and not above: Debian 12's version costs 34 MB for a set of all descriptors.
    import daemon

    try:
        out = open(log_file or os.devnull, "a", buffering=1)  # noqa: SIM115 - stays open
        # Opened while there is somebody to tell when it cannot be.
        number = open(pidfile, "a") if pidfile else None  # noqa: SIM115 - closed below
        context = daemon.DaemonContext(
            working_directory=os.getcwd(),
            umask=_umask(),
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
    except OSError as error:
        raise SettingsError(f"cannot detach: {error}") from None


def reopen(log_file: str) -> None:
    """Go on in a new file of this name, when somebody has renamed the old one. Raises OSError."""
    # In one step: the thread that writes the log knows the descriptor's number alone.
    new = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for descriptor in (1, 2):
            os.dup2(new, descriptor)
    finally:
        os.close(new)
