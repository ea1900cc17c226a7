"""What becomes of a job after a run, and the pauses between attempts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerd.backoff import backoff
from workerd.config.model import Retry
from workerd.core.decode import decode
from workerd.core.job import MAX_ATTEMPTS, Message, Outcome
from workerd.core.retry import Verdict, delay, judge, limit


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome.DONE, Verdict.DONE),
        (Outcome.FAILED, Verdict.RETRY),
        (Outcome.REJECTED, Verdict.DEAD),
        (Outcome.INTERRUPTED, Verdict.RETURN),
        (Outcome.UNAVAILABLE, Verdict.POSTPONE),
    ],
)
def test_every_outcome_has_its_verdict(outcome: Outcome, verdict: Verdict) -> None:
    assert judge(outcome, attempt=1, limit=3) is verdict


@pytest.mark.parametrize("outcome", [each for each in Outcome if each is not Outcome.FAILED])
def test_only_a_failure_depends_on_the_attempts(outcome: Outcome) -> None:
    verdicts = {judge(outcome, attempt, 3) for attempt in (1, 2, 3, 4, 1_000_001)}
    assert len(verdicts) == 1


@pytest.mark.parametrize("attempt", [3, 4, 1_000_001])
def test_the_last_attempt_is_followed_by_none(attempt: int) -> None:
    assert judge(Outcome.FAILED, 2, 3) is Verdict.RETRY
    assert judge(Outcome.FAILED, attempt, 3) is Verdict.DEAD


def test_only_what_was_acknowledged_is_remembered() -> None:
    assert {verdict for verdict in Verdict if not verdict.remembered} == {
        Verdict.REJECT,
        Verdict.RETURN,
        Verdict.SPEND,
    }


# How many attempts.


@pytest.mark.parametrize(
    ("wish", "attempts"),
    [(None, 5), (1, 1), (9, 9), (25, 25), (26, 25), (1_000_000, 25), (0, 5), (-3, 5), ("9", 5)],
)
def test_a_sender_may_ask_for_attempts_up_to_the_handlers_limit(
    wish: object, attempts: int
) -> None:
    job = decode(Message(headers={} if wish is None else {MAX_ATTEMPTS: wish}), "q")
    assert limit(job, Retry()) == attempts


def test_no_job_has_more_attempts_than_the_handler_allows() -> None:
    assert limit(decode(Message(), "q"), Retry(attempts=30, max_attempts=10)) == 10


# How long until the next one.

STEADY = Retry(delay=5.0, multiplier=2.0, max_delay=3600.0, jitter=False)


def test_delays_double_up_to_the_longest() -> None:
    delays = [delay(attempt, STEADY) for attempt in (1, 2, 3, 4, 10, 11, 1000, 1_000_000)]
    assert delays == [5.0, 10.0, 20.0, 40.0, 2560.0, 3600.0, 3600.0, 3600.0]


def test_delays_stay_as_they_are_with_a_multiplier_of_1() -> None:
    assert {delay(n, Retry(delay=7.0, multiplier=1.0, jitter=False)) for n in range(1, 50)} == {7.0}


@given(st.integers(1, 1000), st.floats(0, 1e7), st.floats(1, 1000))
def test_jitter_moves_a_delay_by_a_fifth_and_never_beyond_the_longest(
    attempt: int, first: float, multiplier: float
) -> None:
    longest = 86_400.0
    policy = Retry(delay=first, multiplier=multiplier, max_delay=longest)
    plain = min(first * multiplier ** min(attempt - 1, 100), longest)
    least, most = 0.8 * plain, min(1.2 * plain, longest)
    assert least - 1e-6 <= delay(attempt, policy) <= most + 1e-6


def test_jobs_that_failed_together_do_not_come_back_together() -> None:
    assert len({delay(1, Retry(delay=60.0)) for _ in range(100)}) > 90


# Reconnecting.


def test_the_first_pause_is_short_and_none_is_shorter_than_half_of_it() -> None:
    for _ in range(100):
        pauses = list(itertools.islice(backoff(1.0, 10.0), 100))
        assert pauses[0] <= 1.0
        assert min(pauses) >= 0.5


def test_pauses_never_end_and_grow_to_the_maximum() -> None:
    pauses = list(itertools.islice(backoff(0.2, 30.0), 5000))
    assert max(pauses) <= 30.0
    assert min(pauses[100:]) >= 15.0


def test_two_daemons_do_not_come_back_in_one_instant() -> None:
    assert len({next(backoff(1.0, 30.0)) for _ in range(100)}) > 90
