"""The guardian: a tiny process that kills the jobs of a daemon that was itself killed.

Under systemd the control group does this. Elsewhere nothing would: a job has its own
session, so that neither a terminal's ^C nor the death of its parent reaches it, and its
second run would start beside the first. What a job has put into yet another session
(a daemonised grandchild) cannot be found again without control groups, and lives on.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import select
import signal
from collections.abc import Iterable

#: How long a job may take to die of SIGKILL, in milliseconds.
LAST_MILLISECONDS = 1000

#: As many jobs as no daemon has descriptors for. Only what is in use of it takes up memory.
_MOST_GROUPS = 1 << 20


class Guardian:
    """Knows the process group of each running job, and outlives the daemon to kill them.

    It reads them, once the daemon is gone, in memory that both share: while that lives, the
    guardian sleeps, and no job has to wait for it.
    """

    def __init__(self, *not_its_own: int) -> None:
        """Fork it. To be called before any thread, loop or connection exists.

        The descriptors ``not_its_own`` are closed in it: the daemon's lock must be free
        when the daemon is gone.
        """
        # Each group in a place of its own; negative when it has ended, 0 beyond the last.
        self._groups = memoryview(mmap.mmap(-1, 4 * _MOST_GROUPS)).cast("i")
        self._places: dict[int, int] = {}
        self._free: list[int] = []
        # Its other end tells of the daemon's death.
        ours, self._pipe = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            for descriptor in not_its_own:
                os.close(descriptor)
            with contextlib.suppress(BaseException):
                _watch(ours, self._groups)
            os._exit(0)
        os.close(ours)

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
            leaving.poll(LAST_MILLISECONDS)


def _watch(pipe: int, groups: Iterable[int]) -> None:
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    os.read(pipe, 1)  # the end of the daemon
    running = [group for group in itertools.takewhile(bool, groups) if group > 0]
    dying = select.poll()
    for group in running:
        with contextlib.suppress(ProcessLookupError):
            dying.register(os.pidfd_open(group), select.POLLIN)
            os.killpg(group, signal.SIGKILL)
    # Whoever waits for the memory's lock, which ends with this process, may start them again.
    for _ in running:
        for descriptor, _event in dying.poll(LAST_MILLISECONDS):
            dying.unregister(descriptor)
