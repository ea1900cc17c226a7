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
    entered = enter(room, ALICE, limits.MOST_PER_USER + 2)
    assert entered == [True] * limits.MOST_PER_USER + [False, False]
    assert room.enter(Asker(BOB))


@pytest.mark.parametrize("uid", [0, os.geteuid()])
def test_root_and_our_own_user_have_no_share(uid: int) -> None:
    assert all(enter(Limits(), uid, limits.MOST_PER_USER + 1))


def test_the_one_that_is_quiet_for_longest_makes_room() -> None:
    room = Limits()
    quiet = [Asker(ALICE, LONG_AGO + 1), Asker(ALICE, LONG_AGO)]
    assert all(room.enter(each) for each in quiet)
    assert all(enter(room, ALICE, limits.MOST_PER_USER - 1))
    assert [each.dropped for each in quiet] == [False, True]


def test_who_was_quiet_for_a_moment_only_is_left_alone() -> None:
    room = Limits()
    assert all(enter(room, ALICE, limits.MOST_PER_USER, quiet_since=time.monotonic()))
    assert enter(room, ALICE, 1) == [False]


def test_who_leaves_makes_room() -> None:
    room = Limits()
    session = Asker(ALICE)
    assert room.enter(session)
    assert all(enter(room, ALICE, limits.MOST_PER_USER - 1))
    room.leave(session)
    room.leave(Asker(ALICE))  # one that was refused
    assert enter(room, ALICE, 2) == [True, False]


def test_bodies_are_bounded_together_and_one_that_does_not_come_makes_room() -> None:
    room = Limits()
    assert room.reserve(limits.MOST_BYTES)
    assert not room.reserve(1)
    room.release(1)
    assert room.reserve(1)

    class Owes(Asker):
        def drop(self) -> None:
            super().drop()
            room.release(limits.MOST_BYTES)

    owes = Owes(ALICE, LONG_AGO, owes_body=True)
    assert room.enter(owes)
    assert room.reserve(1)
    assert owes.dropped


def test_requests_that_wait_for_the_broker_are_bounded() -> None:
    room = Limits()
    assert all(room.begin_waiting() for _ in range(limits.MOST_UNCONFIRMED))
    assert not room.begin_waiting()
    room.end_waiting()
    assert room.begin_waiting()
