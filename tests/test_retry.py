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


def test_a_pause_is_drawn_from_the_upper_half_of_its_step() -> None:
    steps = [min(1.25**number, 10.0) for number in range(15)]
    for _ in range(100):
        for pause, step in zip(backoff(1.0, 10.0), steps, strict=False):
            assert step / 2 <= pause <= step


def test_pauses_never_end_and_never_exceed_the_maximum() -> None:
    assert max(itertools.islice(backoff(0.2, 30.0), 5000)) <= 30.0


def test_two_daemons_do_not_come_back_in_one_instant() -> None:
    assert len({next(backoff(1.0, 30.0)) for _ in range(100)}) > 90
