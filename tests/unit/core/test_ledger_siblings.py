"""Several instances on one host: together they lose nothing and run nothing twice for nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.harness.siblings import STEPS, Host
from tests.harness.waiting import examples
from workerd.core.decode import decode
from workerd.core.job import Delivery, Message, Run
from workerd.core.ledger import PATIENCE, Ledger, Rejoined, Settle
from workerd.core.retry import Verdict
from workerd.runlog.writer import RunLog

EXAMPLES = examples(300, 50)


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[[str], Ledger]:
    """Makes the ledger of an instance of one host."""
    return lambda name: Ledger({"queue": 1}, RunLog(tmp_path, name, 3600.0, pytest.fail))


def deliver(
    ledger: Ledger, channel: int, redelivered: bool = False
) -> tuple[Delivery, Run | Settle | Rejoined | None]:
    """The message arrives on a new channel."""
    ledger.opened(channel)
    job = decode(Message(message_id="id"), "queue", redelivered)
    delivery = Delivery(channel, 1, 0.0, job)
    return delivery, ledger.delivered(delivery)


def dies(ledger: Ledger) -> None:
    assert isinstance(ledger.dedup, RunLog)
    ledger.dedup.close()
    os.close(ledger.dedup._lock)


@pytest.mark.parametrize("stale_before", [0.0, 1.0], ids=["the worker did not know", "it knew"])
def test_a_job_that_timed_out_is_not_run_beside_the_instance_that_still_runs_it(
    ledger: Callable[[str], Ledger], stale_before: float
) -> None:
    one, two = ledger("1"), ledger("2")
    _, run = deliver(one, 1)
    assert isinstance(run, Run)
    one.retired(1, stale_before)
    delivery, decision = deliver(two, 1, redelivered=True)
    assert decision is None
    assert two.look_again(2 * PATIENCE) == []
    one.finished(run, Verdict.DONE)
    assert two.look_again(3 * PATIENCE) == [Settle(delivery, Verdict.DONE)]


def test_a_held_job_that_the_other_instance_gives_back_is_run_and_then_remembered(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = ledger("1"), ledger("2")
    _, run = deliver(one, 1)
    assert isinstance(run, Run)
    one.lost(1)
    _, decision = deliver(two, 1, redelivered=True)
    assert decision is None
    one.finished(run, Verdict.RETURN)
    (run_here,) = two.look_again(1.0)
    assert isinstance(run_here, Run)
    two.finished(run_here, Verdict.DONE)
    two.lost(1)
    delivery, decision = deliver(one, 2, redelivered=True)
    assert decision == Settle(delivery, Verdict.DONE)


def test_the_last_verdict_of_an_instance_that_died_settles_a_redelivery_at_once(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = ledger("1"), ledger("2")
    _, run = deliver(one, 1)
    assert isinstance(run, Run)
    one.finished(run, Verdict.DONE)
    dies(one)
    delivery, decision = deliver(two, 1, redelivered=True)
    assert decision == Settle(delivery, Verdict.DONE)


@pytest.mark.campaign
@pytest.mark.timeout(1800)  # a campaign computes for a minute; on a busy machine that takes a while
@settings(max_examples=EXAMPLES, report_multiple_bugs=False)
@given(st.binary(min_size=50, max_size=50))
def test_two_instances_lose_no_job_and_run_none_twice_for_nothing(steps: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        try:
            for step in steps:
                STEPS[step % len(STEPS)](host)
            host.conclude()
        finally:
            note("\n".join(host.story))
            host.close()
