"""How much those who ask on the local socket may take, all together and each user."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from workerd.control.peer import Peer

#: Of everything a single user gets at most this part, and all users together leave the rest to
#: root and our own user, who must be able to look and to steer whatever others do.
SHARE = 1 / 2
USERS = 7 / 8
#: Sessions at once.
MOST_SESSIONS = 64
#: What all bodies together may take, in bytes.
MOST_BYTES = 64 << 20
#: Requests of all sessions that wait for the broker, as for the confirm of a job. Fewer than
#: sessions, so that there is room for those who ask why.
MOST_UNCONFIRMED = 32
#: A session that has owed the rest of a request for so many seconds makes room for another.
QUIET = 2.0


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


class Shared:
    """Something of which there is ``most``, and what each user has taken of it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[int] = Counter()

    def scarce(self, uid: int, size: int = 1) -> Callable[[int], bool] | None:
        """None when this user may take so much; otherwise, whose giving back would help."""
        total = self._taken.total() + size
        if total > self._most:
            return lambda _uid: True
        if is_privileged(uid):
            return None
        if self._taken[uid] + size > SHARE * self._most:
            return lambda other: other == uid
        if total - sum(_of_privileged(self._taken)) > USERS * self._most:
            return lambda other: not is_privileged(other)
        return None

    def take(self, uid: int, size: int = 1) -> None:
        self._taken[uid] += size

    def give_back(self, uid: int, size: int = 1) -> None:
        self._taken[uid] -= size
        if not self._taken[uid]:
            del self._taken[uid]


def is_privileged(uid: int) -> bool:
    """Whether this is root or our own user."""
    return uid in (0, os.geteuid())


def _of_privileged(taken: Mapping[int, int]) -> Iterator[int]:
    return (size for uid, size in taken.items() if is_privileged(uid))


class Limits:
    """Counts the sessions of a socket and what they take; each reserves before it takes."""

    def __init__(self) -> None:
        self.sessions: set[Member] = set()
        self._places = Shared(MOST_SESSIONS)
        #: Bytes of bodies that sessions have announced and that are still in memory.
        self._bytes = Shared(MOST_BYTES)
        self._unconfirmed = Shared(MOST_UNCONFIRMED)

    def enter(self, session: Member) -> bool:
        """Whether there is room for one more session, if need be that of a quiet one."""
        uid = session.peer.uid
        while (whose := self._places.scarce(uid)) is not None:
            if not self._drop_one_of(each for each in self.sessions if whose(each.peer.uid)):
                return False
        self._places.take(uid)
        self.sessions.add(session)
        return True

    def leave(self, session: Member) -> None:
        """The session is over, whether or not there was room for it."""
        if session in self.sessions:
            self.sessions.discard(session)
            self._places.give_back(session.peer.uid)

    def reserve(self, uid: int, size: int) -> bool:
        """Whether a user may send a body of so many bytes, if need be in place of a quiet one."""
        while (whose := self._bytes.scarce(uid, size)) is not None:
            owing = (each for each in self.sessions if each.owes_body and whose(each.peer.uid))
            if not self._drop_one_of(owing):
                return False
        self._bytes.take(uid, size)
        return True

    def release(self, uid: int, size: int) -> None:
        """So many bytes that a user had reserved are in memory no more."""
        self._bytes.give_back(uid, size)

    def begin_waiting(self, uid: int) -> bool:
        """Whether one more request of a user may wait for the broker, until `end_waiting`."""
        if self._unconfirmed.scarce(uid) is not None:
            return False
        self._unconfirmed.take(uid)
        return True

    def end_waiting(self, uid: int) -> None:
        """A request has its answer from the broker, or none any more."""
        self._unconfirmed.give_back(uid)

    def _drop_one_of(self, sessions: Iterable[Member]) -> bool:
        """Drop the session that has been quiet for longest, if that is long enough."""
        quiet = min(sessions, key=lambda each: each.quiet_since, default=None)
        if quiet is None or time.monotonic() - quiet.quiet_since < QUIET:
            return False
        self.leave(quiet)
        quiet.drop()
        return True
