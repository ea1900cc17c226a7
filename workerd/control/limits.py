"""How much those who ask on the local socket may take, all together and each user."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Protocol

from workerd.control.peer import Peer

#: Sessions at once.
MOST_SESSIONS = 64
#: The same of one user, unless that is root or our own.
MOST_PER_USER = 32
#: A session that has owed the rest of a request for so many seconds makes room for another.
QUIET = 2.0
#: What all bodies together may take, in bytes.
MOST_BYTES = 64 << 20
#: Requests of all sessions that wait for the broker, as for the confirm of a job. Fewer than
#: sessions, so that there is room for those who ask why.
MOST_UNCONFIRMED = 32


class Member(Protocol):
    """A session, as far as limits are concerned."""

    peer: Peer

    @property
    def quiet_since(self) -> float:
        """Since when the session owes a request, or the reading of an answer; monotonic."""

    @property
    def owes_body(self) -> bool:
        """Whether a part of a body is still to come."""

    def drop(self) -> None:
        """End the session."""


class Limits:
    """Counts the sessions of a socket and what they take; each reserves before it takes."""

    def __init__(self) -> None:
        self.sessions: set[Member] = set()
        #: Bytes of bodies that sessions have announced and that are still in memory.
        self._bytes = 0
        self._unconfirmed = 0

    def enter(self, session: Member) -> bool:
        """Whether there is room for one more session, if need be that of a quiet one."""
        uid = session.peer.uid
        privileged = uid in (0, os.geteuid())
        same = {each for each in self.sessions if each.peer.uid == uid}
        if not privileged and len(same) >= MOST_PER_USER and not self._drop_one_of(same):
            return False
        if len(self.sessions) >= MOST_SESSIONS and not self._drop_one_of(self.sessions):
            return False
        self.sessions.add(session)
        return True

    def leave(self, session: Member) -> None:
        """The session is over, whether or not there was room for it."""
        self.sessions.discard(session)

    def reserve(self, size: int) -> bool:
        """Whether there is room for a body of so many bytes, if need be that of a quiet session."""
        while self._bytes + size > MOST_BYTES:
            if not self._drop_one_of(each for each in self.sessions if each.owes_body):
                return False
        self._bytes += size
        return True

    def release(self, size: int) -> None:
        """So many reserved bytes are in memory no more."""
        self._bytes -= size

    def begin_waiting(self) -> bool:
        """Whether one more request may wait for the broker; `end_waiting` ends that."""
        if self._unconfirmed >= MOST_UNCONFIRMED:
            return False
        self._unconfirmed += 1
        return True

    def end_waiting(self) -> None:
        """A request has its answer from the broker, or none any more."""
        self._unconfirmed -= 1

    def _drop_one_of(self, sessions: Iterable[Member]) -> bool:
        """Drop the session that has been quiet for longest, if that is long enough."""
        quiet = min(sessions, key=lambda each: each.quiet_since, default=None)
        if quiet is None or time.monotonic() - quiet.quiet_since < QUIET:
            return False
        self.sessions.discard(quiet)
        quiet.drop()
        return True
