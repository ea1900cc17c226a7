"""Breaker of handlers that cannot run, and for how long their jobs are put off."""

from __future__ import annotations

import pytest

from workerd.core.breaker import FIRST_PAUSE, LONGEST_DELAY, LONGEST_PAUSE, Breaker

NOW = 1000.0


def paused(error: str = "No such file") -> Breaker:
    """Where the handler "broken" could not run, at NOW."""
    pauses = Breaker()
    pauses.unavailable("broken", error, NOW)
    return pauses


def test_a_handler_that_could_not_run_is_tried_again_after_its_pause() -> None:
    pauses = paused()
    assert pauses.holds("broken", NOW)
    assert pauses.holds("broken", NOW + FIRST_PAUSE / 2 - 0.01)
    assert not pauses.holds("broken", NOW + FIRST_PAUSE)


def test_a_pause_is_of_one_handler_alone() -> None:
    assert not paused().holds("other", NOW)


def test_an_error_is_new_once() -> None:
    pauses = Breaker()
    errors = ["No such file", "No such file", "Permission denied", "Permission denied"]
    told = [pauses.unavailable("broken", error, NOW) for error in errors]
    assert told == [True, False, True, False]


def test_a_handler_that_runs_is_paused_no_more_and_that_is_new_once() -> None:
    pauses = paused()
    assert pauses.available("broken")
    assert not pauses.holds("broken", NOW)
    assert not pauses.available("broken")
    assert pauses.unavailable("broken", "No such file", NOW), "the next pause is told as well"


def test_jobs_that_were_tried_at_once_make_one_pause() -> None:
    pauses = paused()
    for _ in range(100):
        pauses.unavailable("broken", "No such file", NOW)
    assert not pauses.holds("broken", NOW + FIRST_PAUSE)


def test_pauses_grow_to_the_longest_and_begin_anew() -> None:
    pauses = paused()
    lengths = []
    for _ in range(100):
        before = pauses.paused["broken"].until
        pauses.unavailable("broken", "No such file", before)
        lengths.append(pauses.paused["broken"].until - before)
    assert max(lengths) <= LONGEST_PAUSE
    assert min(lengths[50:]) >= LONGEST_PAUSE / 2
    pauses.available("broken")
    pauses.unavailable("broken", "No such file", NOW)
    assert not pauses.holds("broken", NOW + FIRST_PAUSE)


@pytest.mark.parametrize(
    ("seconds", "longest"), [(0, 1.0), (2, 1.0), (20, 10.0), (86_400, LONGEST_DELAY)]
)
def test_a_job_is_put_off_for_half_the_time_that_its_handler_is_paused(
    seconds: float, longest: float
) -> None:
    delay = paused().delay("broken", NOW + seconds)
    assert longest / 2 <= delay <= longest


def test_a_job_is_put_off_a_little_when_its_handler_has_just_resumed() -> None:
    assert 0.5 <= Breaker().delay("broken", NOW) <= 1.0


def test_jobs_that_were_put_off_together_do_not_come_back_together() -> None:
    pauses = paused()
    assert len({pauses.delay("broken", NOW + 60) for _ in range(100)}) > 90
