"""How much those who ask on the local socket may take."""

from __future__ import annotations

import os
import time

import pytest

from workerd.control import limits
from workerd.control.limits import Limits
from workerd.control.peer import Peer

NOW = float("inf")
LONG_AGO = 0.0
ALICE, BOB, CAROL = 1001, 1002, 1003
#: Sessions of one user, and of all but root and our own.
SHARE, USERS = 32, 56


class Asker:
    """A session of a user that has been quiet since an instant; ``inf``: it is being served."""

    def __init__(self, uid: int, quiet_since: float = NOW, owes_body: bool = False) -> None:
        self.peer = Peer(uid, 1, frozenset())
        self.quiet_since = quiet_since
        self.owes_body = owes_body
        self.dropped = False

    def drop(self) -> None:
        self.dropped = True


def enter(room: Limits, uid: int, count: int, quiet_since: float = NOW) -> list[bool]:
    return [room.enter(Asker(uid, quiet_since)) for _ in range(count)]


def test_a_user_gets_no_more_than_a_share() -> None:
    room = Limits()
    assert enter(room, ALICE, SHARE + 2) == [True] * SHARE + [False, False]
    assert room.enter(Asker(BOB))


@pytest.mark.parametrize("uid", [0, os.geteuid()])
def test_users_leave_room_for_root_and_for_our_own_user(uid: int) -> None:
    """Two users with 32 sessions each locked root out."""
    room = Limits()
    entered = [enter(room, user, SHARE).count(True) for user in (ALICE, BOB, CAROL)]
    assert entered == [SHARE, USERS - SHARE, 0]
    assert enter(room, uid, limits.MOST_SESSIONS - USERS + 1) == [
        *([True] * (limits.MOST_SESSIONS - USERS)),
        False,
    ]


def test_root_makes_room_for_itself_where_somebody_is_quiet() -> None:
    room = Limits()
    assert all(enter(room, 0, limits.MOST_SESSIONS - 1))
    quiet = Asker(ALICE, LONG_AGO)
    assert room.enter(quiet)
    assert room.enter(Asker(0))
    assert quiet.dropped


def test_the_one_that_is_quiet_for_longest_makes_room() -> None:
    room = Limits()
    quiet = [Asker(ALICE, LONG_AGO + 1), Asker(ALICE, LONG_AGO)]
    assert all(room.enter(each) for each in quiet)
    assert all(enter(room, ALICE, SHARE - 1))
    assert [each.dropped for each in quiet] == [False, True]


def test_who_was_quiet_for_a_moment_only_is_left_alone() -> None:
    room = Limits()
    assert all(enter(room, ALICE, SHARE, quiet_since=time.monotonic()))
    assert enter(room, ALICE, 1) == [False]


def test_who_leaves_makes_room() -> None:
    room = Limits()
    session = Asker(ALICE)
    assert room.enter(session)
    assert all(enter(room, ALICE, SHARE - 1))
    room.leave(session)
    room.leave(Asker(ALICE))  # one that was refused
    assert enter(room, ALICE, 2) == [True, False]


def test_bodies_are_bounded_for_each_user_and_together() -> None:
    room = Limits()
    most = limits.MOST_BYTES
    assert room.reserve(ALICE, most // 2)
    assert not room.reserve(ALICE, 1)
    assert room.reserve(BOB, most // 4)
    assert not room.reserve(BOB, most // 4)
    assert room.reserve(0, most // 4)
    assert not room.reserve(0, 1)
    room.release(ALICE, 1)
    assert room.reserve(ALICE, 1)


def test_a_body_that_does_not_come_makes_room_for_others_of_the_same_user() -> None:
    room = Limits()

    class Owes(Asker):
        def drop(self) -> None:
            super().drop()
            room.release(self.peer.uid, limits.MOST_BYTES // 4)

    alice, bob = (Owes(uid, LONG_AGO, owes_body=True) for uid in (ALICE, BOB))
    for each in (alice, bob):
        assert room.enter(each)
        assert room.reserve(each.peer.uid, limits.MOST_BYTES // 4)
    assert room.reserve(ALICE, limits.MOST_BYTES // 4)
    assert not alice.dropped
    assert room.reserve(ALICE, limits.MOST_BYTES // 4)
    assert (alice.dropped, bob.dropped) == (True, False)


def test_requests_that_wait_for_the_broker_are_bounded_for_each_user_and_together() -> None:
    room = Limits()
    most = limits.MOST_UNCONFIRMED
    waiting = [sum(room.begin_waiting(uid) for _ in range(most)) for uid in (ALICE, BOB, CAROL, 0)]
    assert waiting == [most // 2, most * 7 // 8 - most // 2, 0, most // 8]
    room.end_waiting(ALICE)
    assert room.begin_waiting(0)
