"""Orphans: which run a redelivery rejoins."""

from __future__ import annotations

from workerd.core.decode import decode
from workerd.core.job import Delivery, Message, Run
from workerd.core.orphans import Orphans


def a_delivery(name: str, tag: int) -> Delivery:
    return Delivery(1, tag, 0.0, decode(Message(message_id=name), "queue"))


def test_a_redelivery_becomes_what_its_run_settles_and_no_other_rejoins_that() -> None:
    orphans = Orphans()
    first, again = a_delivery("id", 1), a_delivery("id", 2)
    run = Run(first.job, None)
    orphans.add(run)
    orphans.add(run)  # retired, and then lost
    assert orphans.adopt(a_delivery("other", 3)) is None
    assert orphans.adopt(again) is run
    assert run.delivery is again
    assert orphans.adopt(again) is None


def test_one_that_has_nothing_to_settle_comes_first() -> None:
    orphans = Orphans()
    first = a_delivery("id", 1)
    could, cannot = Run(first.job, first), Run(first.job, None)
    orphans.add(could)
    orphans.add(cannot)
    assert orphans.adopt(a_delivery("id", 2)) is cannot
    assert orphans.adopt(a_delivery("id", 3)) is could


def test_one_that_has_ended_is_rejoined_no_more() -> None:
    orphans = Orphans()
    first = a_delivery("id", 1)
    run = Run(first.job, None)
    orphans.add(run)
    orphans.discard(run)
    orphans.discard(run)
    assert orphans.adopt(a_delivery("id", 2)) is None
