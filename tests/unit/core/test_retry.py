"""What becomes of a job after a run, and the pauses between attempts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.samples import MESSAGE
from workerd.backoff import backoff
from workerd.config.model import Retry
from workerd.core import topology
from workerd.core.decode import decode
from workerd.core.job import ATTEMPT, COPY, MAX_ATTEMPTS, BadJob, Job, Message, Outcome, Report
from workerd.core.republish import Origin
from workerd.core.retry import Decision, Facts, Verdict, decide, delay, limit, requeue

FACTS = Facts(now=1_000_000.0, copy_id="copy", origin=Origin("host", "1"), pause=7.0)
STEADY = Retry(delay=5.0, multiplier=2.0, max_delay=3600.0, jitter=False)


def job(attempt: int = 1, message: Message = MESSAGE) -> Job:
    return replace(decode(message, "q"), attempt=attempt)


def decided(outcome: Outcome, attempt: int = 1, facts: Facts = FACTS, **report: Any) -> Decision:
    return decide(job(attempt), Report(outcome, **report), STEADY, lambda: facts)


def nobody_asks() -> Facts:
    raise AssertionError("facts cost time that a job that is just done does not have")


def test_a_job_that_is_done_needs_nothing() -> None:
    done = decide(job(), Report(Outcome.DONE), STEADY, nobody_asks)
    assert done == Decision(Verdict.DONE)


def test_a_failed_job_is_delayed_as_its_next_attempt() -> None:
    decision = decided(Outcome.FAILED, attempt=2)
    assert (decision.verdict, decision.delay) == (Verdict.RETRY, 10)
    [(exchange, key, message)] = decision.publishes
    assert (exchange, key) == topology.delayed("q", 10)
    assert message.headers[ATTEMPT] == 2
    assert message.headers[COPY] == "copy"


@pytest.mark.parametrize("attempt", [5, 6, 1_000_001])
def test_the_last_attempt_is_followed_by_a_dead_letter(attempt: int) -> None:
    decision = decided(Outcome.FAILED, attempt, reason="exit-status")
    assert decision.verdict is Verdict.DEAD
    [(exchange, key, message)] = decision.publishes
    assert (exchange, key) == ("", topology.dead("q"))
    assert message.headers["x-workerd-reason"] == "exit-status"


def test_a_job_may_ask_for_its_own_delay() -> None:
    assert decided(Outcome.FAILED, retry_after=90.0).delay == 90
    assert decided(Outcome.FAILED, retry_after=1e12).delay == topology.MAX_DELAY


def test_a_job_whose_handler_cannot_run_is_the_same_attempt_later() -> None:
    decision = decided(Outcome.UNAVAILABLE, attempt=2)
    assert (decision.verdict, decision.delay) == (Verdict.POSTPONE, 7)
    assert decision.publishes[0].message.headers[ATTEMPT] == 1


def test_what_is_wrong_with_a_job_itself_is_no_matter_of_attempts() -> None:
    assert decided(Outcome.REJECTED).verdict is Verdict.DEAD


def test_what_no_handler_can_be_given_goes_to_the_dead_letters_as_it_came_if_that_can_be() -> None:
    faulty = replace(job(), fault=BadJob("bad-headers", "no table"))
    report = Report(Outcome.REJECTED, "bad-headers", ran=False)
    moved = replace(FACTS, dead_letters=True)
    assert decide(faulty, report, STEADY, lambda: moved) == Decision(Verdict.REJECT)
    assert decide(faulty, report, STEADY, lambda: FACTS).verdict is Verdict.DEAD


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.REJECTED, Outcome.UNAVAILABLE])
def test_a_copy_that_will_never_be_taken_leaves_the_message_to_the_broker_if_that_can_be(
    outcome: Outcome,
) -> None:
    assert decided(outcome).refused is None
    assert decided(outcome, facts=replace(FACTS, dead_letters=True)).refused is Verdict.REJECT


def test_an_interrupted_job_goes_back() -> None:
    assert decided(Outcome.INTERRUPTED) == Decision(Verdict.RETURN)


def test_a_job_that_the_broker_might_drop_is_published_anew_instead_of_returned() -> None:
    decision = decided(Outcome.INTERRUPTED, facts=replace(FACTS, may_drop=True))
    assert (decision.verdict, decision.unconfirmed) == (Verdict.POSTPONE, Verdict.RETURN)
    [(exchange, key, message)] = decision.publishes
    assert (exchange, key) == ("", "q")
    assert ATTEMPT not in message.headers
    assert decision.patience is not None
    assert requeue(job(), replace(FACTS, may_drop=True)) == decision


@pytest.mark.parametrize(
    ("outcome", "ran", "verdict"),
    [
        (Outcome.FAILED, True, Verdict.SPEND),
        (Outcome.FAILED, False, Verdict.RETURN),
        (Outcome.REJECTED, True, Verdict.SPEND),
        (Outcome.REJECTED, False, Verdict.RETURN),
        (Outcome.UNAVAILABLE, True, Verdict.RETURN),
    ],
)
def test_without_a_confirm_a_job_goes_back_and_what_ran_is_an_attempt(
    outcome: Outcome, ran: bool, verdict: Verdict
) -> None:
    assert decided(outcome, ran=ran).unconfirmed is verdict


@given(
    st.sampled_from(Outcome),
    st.integers(1, 30),
    st.booleans(),
    st.booleans(),
    st.none() | st.floats(0, 1e15),
)
def test_whatever_a_run_comes_to_is_decided(
    outcome: Outcome, attempt: int, ran: bool, may_drop: bool, asked: float | None
) -> None:
    report = Report(outcome, ran=ran, retry_after=asked)
    decision = decide(job(attempt), report, STEADY, lambda: replace(FACTS, may_drop=may_drop))
    # What is acknowledged without having been done is published before.
    acknowledged = decision.verdict.remembered and decision.verdict is not Verdict.DONE
    assert acknowledged == bool(decision.publishes)
    assert not decision.unconfirmed.remembered


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
