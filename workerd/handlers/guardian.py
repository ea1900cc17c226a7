"""The guardian: a tiny process that kills the jobs of a daemon that was itself killed.

Under systemd the control group does this. Elsewhere nothing would: a job has its own
session, so that neither a terminal's ^C nor the death of its parent reaches it, and its
second run would start beside the first. What a job has put into yet another session
(a daemonised grandchild) cannot be found again without control groups, and lives on.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import sys

from workerd.handlers import guard
from workerd.handlers.program import clean_environment

#: As many jobs as no daemon has descriptors for. Only what is in use of it takes up memory.
_MOST_GROUPS = 1 << 20


class Guardian:
    """Knows the process group of each running job, and outlives the daemon to kill them.

    It reads them, once the daemon is gone, in memory that both share: while that lives, the
    guardian sleeps, and no job has to wait for it.
    """

    def __init__(self, *shared: int) -> None:
        """Start it. It has a share in the descriptors ``shared``, and no other of the daemon's."""
        # Each group in a place of its own; negative when it has ended, 0 beyond the last.
        table = os.memfd_create("workerd-groups")
        os.ftruncate(table, 4 * _MOST_GROUPS)
        self._groups = memoryview(mmap.mmap(table, 4 * _MOST_GROUPS)).cast("i")
        self._places: dict[int, int] = {}
        self._free: list[int] = []
        # Its other end tells of the daemon's death.
        theirs, self._pipe = os.pipe2(os.O_CLOEXEC)
        # A program, and no fork: that would keep a copy of most of the daemon's memory.
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", guard.__file__, str(theirs), str(table)],
            clean_environment(os.environ),
            # Onto itself: the copy is not closed by the exec.
            file_actions=[(os.POSIX_SPAWN_DUP2, each, each) for each in (theirs, table, *shared)],
            setsid=True,
            # What ends the daemon must not end it, from its first moment on.
            setsigmask=(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT),
        )
        os.close(theirs)
        os.close(table)

    def started(self, group: int) -> None:
        """A job runs in this process group."""
        place = self._free.pop() if self._free else len(self._places)
        self._places[group] = place
        self._groups[place] = group

    def ended(self, group: int) -> None:
        """That job is over; its number may soon be another's."""
        place = self._places.pop(group)
        self._groups[place] = -group
        self._free.append(place)

    def close(self) -> None:
        """Dismiss it: no job runs any more. One that is stopped is not waited for."""
        os.close(self._pipe)
        with contextlib.suppress(ProcessLookupError):
            leaving = select.poll()
            leaving.register(os.pidfd_open(self.pid), select.POLLIN)
            leaving.poll(guard.LAST_MILLISECONDS)
