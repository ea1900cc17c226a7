"""The guardian: a tiny process that kills the jobs of a daemon that was itself killed.

Under systemd the control group does this. Elsewhere nothing would: a job has its own
session, so that neither a terminal's ^C nor the death of its parent reaches it, and its
second run would start beside the first. What a job has put into yet another session
(a daemonised grandchild) cannot be found again without control groups, and lives on.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import signal
import sys
from collections.abc import Callable

from workerd import log
from workerd.backoff import backoff
from workerd.handlers import guard
from workerd.handlers.program import clean_environment

#: As many jobs as no daemon has descriptors for. Only what is in use of it takes up memory.
_MOST_GROUPS = 1 << 20
#: Seconds until a guardian that could not be started is tried again: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
#: The numbers of starts begin again after this one.
_LAST_NUMBER = (1 << 31) - 1


class Guardian:
    """Knows the process group of each running job, and outlives the daemon to kill them.

    The guardian reads them, once the daemon is gone, in memory that both share: while that lives,
    the guardian sleeps, and no job has to wait for it.
    """

    def __init__(self, *shared: int) -> None:
        """Start it. It has a share in the descriptors ``shared``, and no other of the daemon's."""
        self._shared = shared
        # The number of the start that is under way; then each group in a place of its own,
        # negative when it has ended, 0 beyond the last.
        self._table = os.memfd_create("workerd-groups")
        os.ftruncate(self._table, 4 * _MOST_GROUPS)
        self._groups = memoryview(mmap.mmap(self._table, 4 * _MOST_GROUPS)).cast("i")
        self._places: dict[int, int] = {}
        self._free: list[int] = []
        self._number = 0
        self._daemon = os.getpid()
        #: Why there is no guardian at present; "" while there is one.
        self.trouble = ""
        self._changed: Callable[[], object] = lambda: None
        self._look_away: Callable[[], object] = lambda: None
        self._start()

    def _start(self) -> None:
        """Start the process. Raises OSError."""
        # Its other end tells of the daemon's death.
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        numbers = map(str, (theirs, self._table, self._daemon))
        try:
            # A program, and no fork: that would keep a copy of most of the daemon's memory.
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", guard.__file__, *numbers],
                clean_environment(os.environ),
                # Onto itself: the copy is not closed by the exec.
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, each, each)
                    for each in (theirs, self._table, *self._shared)
                ],
                setsid=True,
                # What ends the daemon must not end it, from its first moment on.
                setsigmask=(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT),
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._pipe = ours

    def watch(self, changed: Callable[[], object]) -> None:
        """Replace the guardian whenever it ends, from now on, in the loop that runs.

        ``changed`` is called when ``trouble`` has begun, and when it is over.
        """
        self._changed = changed
        loop = asyncio.get_running_loop()
        end = os.pidfd_open(self.pid)

        def look_away() -> None:
            self._look_away = lambda: None
            loop.remove_reader(end)
            os.close(end)

        self._look_away = look_away
        loop.add_reader(end, self._ended)

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        self._look_away()
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        self._pipe = -1
        self.trouble = "guardian: it has ended; a kill of this process would leave its jobs"
        log.warning("guardian ended", status=os.waitstatus_to_exitcode(status))
        pauses = backoff(_FIRST_PAUSE, _LONGEST_PAUSE)

        def replace() -> None:
            try:
                self._start()
            except OSError as error:
                self.trouble = f"guardian: cannot run it: {error.strerror}"
                loop.call_later(next(pauses), replace)
            else:
                self.trouble = ""
                log.event("guardian replaced", child=self.pid)
                self.watch(self._changed)
            self._changed()

        replace()

    def spawning(self) -> dict[bytes, bytes]:
        """A job's process is about to be started; returns what belongs into its environment."""
        self._number = self._number + 1 if self._number < _LAST_NUMBER else 1
        self._groups[0] = self._number
        return {guard.VARIABLE.encode(): guard.token(self._daemon, self._number)}

    def not_spawned(self) -> None:
        """The process could not be started."""
        self._groups[0] = 0

    def started(self, group: int) -> None:
        """The process that was being started leads this group."""
        place = self._free.pop() if self._free else len(self._places) + 1
        self._places[group] = place
        self._groups[place] = group
        self._groups[0] = 0

    def ended(self, group: int) -> None:
        """That job is over; its number may soon be another's."""
        place = self._places.pop(group)
        self._groups[place] = -group
        self._free.append(place)

    def close(self) -> None:
        """Dismiss it: no job runs any more. One that is stopped is not waited for."""
        self._look_away()
        if self._pipe < 0:
            return  # there is none
        os.close(self._pipe)
        with contextlib.suppress(ProcessLookupError):
            leaving = select.poll()
            leaving.register(os.pidfd_open(self.pid), select.POLLIN)
            leaving.poll(guard.LAST_MILLISECONDS)
