"""The guardian: a tiny process that kills the jobs of a daemon that was itself killed.

Under systemd the control group does this. Elsewhere nothing would: a job has its own
session, so that neither a terminal's ^C nor the death of its parent reaches it, and its
second run would start beside the first. What a job has put into yet another session
(a daemonised grandchild) cannot be found again without control groups, and lives on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct

#: How long a job may take to die of SIGKILL, in milliseconds.
LAST_MILLISECONDS = 1000

_ENTRY = struct.Struct("=i")


class Guardian:
    """Knows the process group of each running job, and outlives the daemon to kill them."""

    def __init__(self, *not_its_own: int) -> None:
        """Fork it. To be called before any thread, loop or connection exists.

        The descriptors ``not_its_own`` are closed in it: the daemon's lock must be free
        when the daemon is gone.
        """
        ours, self._pipe = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            for descriptor in not_its_own:
                os.close(descriptor)
            with contextlib.suppress(BaseException):
                _watch(ours)
            os._exit(0)
        os.close(ours)
        # A guardian that is stopped or dead must not hold up a job.
        os.set_blocking(self._pipe, False)

    def started(self, group: int) -> None:
        """A job runs in this process group."""
        self._tell(group)

    def ended(self, group: int) -> None:
        """That job is over; its number may soon be another's."""
        self._tell(-group)

    def _tell(self, entry: int) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, _ENTRY.pack(entry))

    def close(self) -> None:
        """Dismiss it: no job runs any more. One that is stopped is not waited for."""
        os.close(self._pipe)
        with contextlib.suppress(ProcessLookupError):
            leaving = select.poll()
            leaving.register(os.pidfd_open(self.pid), select.POLLIN)
            leaving.poll(LAST_MILLISECONDS)


def _watch(pipe: int) -> None:
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    # Entries are written in one piece, and reads take whole multiples, so none is torn.
    while data := os.read(pipe, _ENTRY.size * 1024):
        for (entry,) in _ENTRY.iter_unpack(data):
            (groups.add if entry > 0 else groups.discard)(abs(entry))
    dying = select.poll()
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            dying.register(os.pidfd_open(group), select.POLLIN)
            os.killpg(group, signal.SIGKILL)
    # Whoever waits for the memory's lock, which ends with this process, may start them again.
    for _ in groups:
        for descriptor, _event in dying.poll(LAST_MILLISECONDS):
            dying.unregister(descriptor)
