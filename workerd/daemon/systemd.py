"""The daemon's host: systemd's notifications and watchdog, and detaching without systemd."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import sdnotify

from workerd import log_formats


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
        line = log_formats.safe(text).encode("ascii", "replace").decode()
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
