"""Delays between attempts to do something again."""

from __future__ import annotations

from itertools import islice

from workerd.backoff import backoff


def test_delays_grow_to_the_maximum_and_stay_there() -> None:
    delays = list(islice(backoff(0.2, 30.0), 60))
    steps = [min(0.2 * 1.25**number, 30.0) for number in range(60)]
    assert all(step / 2 <= delay <= step for delay, step in zip(delays, steps, strict=True))
    assert steps[-1] == 30.0


def test_no_two_clients_come_back_in_one_instant() -> None:
    assert len({next(backoff(1.0, 30.0)) for _ in range(50)}) > 1


def test_a_first_delay_beyond_the_maximum_is_the_first_alone() -> None:
    first, second = islice(backoff(5.0, 1.0), 2)
    assert 2.5 <= first <= 5.0
    assert 0.5 <= second <= 1.0
