"""Which cancelled jobs are refused, and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from workerd.core.cancellations import KEPT, MOST, MOST_OF_ONE, SKEW, Cancellations
from workerd.core.decode import decode
from workerd.core.job import COPY, REPLAY, SUBMITTER, BadJob, Job, Message
from workerd.ids import made_at, new_id

#: When the job is cancelled, in seconds since 1970.
THEN = 1_700_000_000.0


def job(**properties: Any) -> Job:
    return decode(Message(**{"message_id": "a", "timestamp": int(THEN) - 60, **properties}), "jobs")


def refused(cancellations: Cancellations, job: Job, after: float = 0.0) -> bool:
    try:
        cancellations.check(job, THEN + after)
    except BadJob as bad:
        return bad.reason == "cancelled"
    return False


@pytest.fixture
def cancellations() -> Cancellations:
    """The job "a" is cancelled."""
    cancellations = Cancellations()
    cancellations.add("a", None, THEN)
    return cancellations


def test_a_cancelled_job_is_refused_however_often_it_comes(cancellations: Cancellations) -> None:
    assert refused(cancellations, job())
    assert refused(cancellations, job(timestamp=None))
    assert refused(cancellations, job(headers={COPY: new_id()}))
    assert not refused(cancellations, job(message_id="b"))


def test_it_is_refused_for_a_day(cancellations: Cancellations) -> None:
    assert refused(cancellations, job(), KEPT - 1)
    assert not refused(cancellations, job(), KEPT + 1)
    assert len(cancellations) == 0


def test_one_submitted_later_under_the_same_id_is_another(cancellations: Cancellations) -> None:
    assert refused(cancellations, job(timestamp=int(THEN + SKEW)))
    assert not refused(cancellations, job(timestamp=int(THEN + SKEW) + 1))


def test_one_sent_back_from_the_dead_letters_later_runs() -> None:
    before, cancellations = new_id(), Cancellations()
    when = made_at(before)
    assert when is not None
    cancellations.add("a", None, when + 0.001)
    assert refused(cancellations, job(headers={REPLAY: before}))
    cancellations.add("a", None, when - 0.001)
    assert not refused(cancellations, job(headers={REPLAY: before}))


def test_a_submitter_cancels_no_job_of_others() -> None:
    cancellations = Cancellations()
    cancellations.add("a", 1000, THEN)
    assert refused(cancellations, job(headers={SUBMITTER: 1000}))
    assert not refused(cancellations, job(headers={SUBMITTER: 1001}))
    assert not refused(cancellations, job(headers={SUBMITTER: "1000"}))
    assert not refused(cancellations, job())


def test_the_newest_are_remembered(cancellations: Cancellations) -> None:
    for number in range(MOST):
        cancellations.add(str(number), None, THEN + 1)
    assert len(cancellations) == MOST
    assert not refused(cancellations, job())
    assert refused(cancellations, job(message_id="0"), 1)


def test_one_user_forgets_no_cancellation_of_an_operators_or_of_another_users(
    cancellations: Cancellations,
) -> None:
    """10,001 cancellations of one user evicted the operator's."""
    cancellations.add("b", 1001, THEN)
    for number in range(MOST + 1):
        cancellations.add(str(number), 1000, THEN + 1)
    assert refused(cancellations, job(), 1)
    assert refused(cancellations, job(message_id="b", headers={SUBMITTER: 1001}), 1)
    assert len(cancellations) == MOST_OF_ONE + 2
    newest, oldest = (
        job(message_id=str(number), headers={SUBMITTER: 1000}) for number in (MOST, 0)
    )
    assert refused(cancellations, newest, 1)
    assert not refused(cancellations, oldest, 1)


def test_many_users_forget_no_cancellation_of_an_operators(cancellations: Cancellations) -> None:
    for uid in range(1, 2 * MOST // MOST_OF_ONE):
        for number in range(MOST_OF_ONE):
            cancellations.add(str(number), uid, THEN + uid)
    assert len(cancellations) == MOST + 1
    assert refused(cancellations, job(), 1)
