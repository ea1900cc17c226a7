"""How jobs have ended of late."""

from __future__ import annotations

import pytest

from workerd.core.decode import decode
from workerd.core.job import Job, Message, Outcome, Report
from workerd.core.recent import FAILURES, KEPT, STEP, RecentOutcomes
from workerd.core.retry import Verdict

JOB: Job = decode(Message(type="t", message_id="a"), "jobs")
FAILED = Report(Outcome.FAILED, "exit-status", error="first\nlast words\n")


def count(recent: RecentOutcomes, verdict: Verdict, now: float) -> None:
    recent.count(verdict, JOB, FAILED, now, 1_000_000 + now)


@pytest.mark.parametrize("verdict", [Verdict.RETURN, Verdict.POSTPONE, Verdict.SPEND])
def test_what_goes_back_has_not_ended(verdict: Verdict) -> None:
    recent = RecentOutcomes(0.0)
    count(recent, verdict, 1.0)
    assert not recent.failures
    assert recent.pace(STEP)["done"] == [0]


def test_the_ends_of_each_step_are_counted_once_it_is_over() -> None:
    recent = RecentOutcomes(100.0)
    count(recent, Verdict.DONE, 101.0)
    count(recent, Verdict.DONE, 104.9)
    count(recent, Verdict.RETRY, 104.9)
    assert recent.pace(104.9) == {"seconds": 5.0, "until": 100.0, "done": [], "failed": []}
    count(recent, Verdict.DEAD, 111.0)
    count(recent, Verdict.REJECT, 111.0)
    assert recent.pace(116.0) == {
        "seconds": 5.0,
        "until": 115.0,
        "done": [2, 0, 0],
        "failed": [1, 0, 2],
    }


def test_it_is_bounded_however_long_nothing_happens_and_however_much_fails() -> None:
    recent = RecentOutcomes(0.0)
    count(recent, Verdict.DONE, 1.0)
    pace = recent.pace(1e9)
    assert pace["done"] == [0] * KEPT
    for number in range(3 * FAILURES):
        count(recent, Verdict.RETRY, 1e9 + number)
    assert len(recent.failures) == FAILURES
    assert recent.failures[-1].when == 1_000_000 + 1e9 + 3 * FAILURES - 1


def test_a_failure_tells_the_last_line_of_what_the_job_said() -> None:
    recent = RecentOutcomes(0.0)
    count(recent, Verdict.RETRY, 1.0)
    report = Report(Outcome.FAILED, "signal", error="x" * 10_000)
    recent.count(Verdict.DEAD, JOB, report, 2.0, 7.0)
    first, second = recent.failures
    assert (first.id, first.type, first.queue, first.attempt) == ("a", "t", "jobs", 1)
    assert (first.reason, first.error, first.last) == ("exit-status", "last words", False)
    assert (second.reason, second.error, second.last, second.when) == ("signal", "x" * 200, True, 7)
