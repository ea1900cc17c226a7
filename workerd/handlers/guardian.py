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
import sys

from workerd.handlers import guard
from workerd.handlers.program import clean_environment

_ENTRY = struct.Struct("=i")


class Guardian:
    """Knows the process group of each running job, and outlives the daemon to kill them."""

    def __init__(self, *shared: int) -> None:
        """Start it. It has a share in the descriptors ``shared``, and no other of the daemon's."""
        # A program, and no fork: that would keep a copy of most of the daemon's memory.
        theirs, self._pipe = os.pipe2(os.O_CLOEXEC)
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", guard.__file__, str(theirs)],
            clean_environment(os.environ),
            # Onto itself: the copy is not closed by the exec.
            file_actions=[(os.POSIX_SPAWN_DUP2, each, each) for each in (theirs, *shared)],
            setsid=True,
            # What ends the daemon must not end it, from its first moment on.
            setsigmask=(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT),
        )
        os.close(theirs)
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
            leaving.poll(guard.LAST_MILLISECONDS)
