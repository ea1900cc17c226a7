"""The daemon's host: systemd's notifications and watchdog, and detaching without systemd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from typing import Any

import sdnotify

from workerd import log


class Systemd:
    """Tells systemd how the daemon is doing (sd_notify(3)); silent where there is none.

    Around sdnotify's traps, all versions: it encodes latin-1 and swallows every
    exception, so that one foreign letter would lose the whole datagram, a watchdog's beat
    with it; and its socket blocks when systemd does not read.
    """

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        socket: Any = self._notifier.socket
        if socket is not None:
            socket.setblocking(False)
        self._status = ""

    def ready(self) -> None:
        self._notifier.notify("READY=1")

    def stopping(self) -> None:
        self._notifier.notify("STOPPING=1")

    def status(self, text: str) -> None:
        line = log.safe(text).encode("ascii", "replace").decode()
        self._status = f"STATUS={line[:1000]}"
        self._notifier.notify(self._status)

    def reloading(self) -> None:
        """A reload begins; `ready` ends it, whether it succeeded or not."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def extend(self, seconds: float) -> None:
        """Ask for so much more time, from now, before the stop counts as failed."""
        self._notifier.notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    async def beat(self) -> None:
        """Feed the watchdog from the event loop itself: when that hangs, systemd must know."""
        limit = int(os.environ.get("WATCHDOG_USEC", "0")) / 1_000_000
        if not limit or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return
        while True:
            self._notifier.notify("WATCHDOG=1")
            if self._status:
                # Once more, in case that systemd had no room for it.
                self._notifier.notify(self._status)
            await asyncio.sleep(limit / 3)


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
