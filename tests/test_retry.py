"""What becomes of a job after a run, and the pauses between attempts."""

import itertools

import pytest

from workerd.job import Outcome
from workerd.retry import Verdict, backoff, judge


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome.DONE, Verdict.DONE),
        (Outcome.FAILED, Verdict.DEAD),
        (Outcome.REJECTED, Verdict.DEAD),
        (Outcome.INTERRUPTED, Verdict.RETURN),
    ],
)
def test_every_outcome_has_its_verdict(outcome: Outcome, verdict: Verdict) -> None:
    assert judge(outcome) is verdict


def test_a_handler_that_cannot_run_is_no_verdict_over_the_job() -> None:
    with pytest.raises(AssertionError):
        judge(Outcome.UNAVAILABLE)


def test_only_what_was_acknowledged_is_remembered() -> None:
    assert {verdict for verdict in Verdict if verdict.remembered} == {Verdict.DONE, Verdict.DEAD}


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
