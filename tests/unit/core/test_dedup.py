"""What is remembered of finished jobs."""

from __future__ import annotations

import tracemalloc

from workerd.core.dedup import Dedup

KEY = bytes(range(16))


def anywhere(_channel: int) -> bool:
    return True


def test_the_memory_keeps_the_newest_and_is_bounded() -> None:
    dedup = Dedup(size=100)
    for number in range(1000):
        dedup.settled(number.to_bytes(16, "little"), number % 3)
        assert len(dedup) <= 100
    kept = [number for number in range(1000) if dedup.take(number.to_bytes(16, "little"), anywhere)]
    assert kept == list(range(1000 - len(kept), 1000))
    assert len(kept) >= 75


def test_a_job_is_forgotten_after_four_ages() -> None:
    dedup = Dedup()
    dedup.settled(KEY, 1)
    for _ in range(Dedup.GENERATIONS - 1):
        dedup.age()
        assert len(dedup) == 1
    dedup.age()
    assert not dedup.take(KEY, anywhere)


def test_each_of_equal_jobs_is_remembered_with_its_channel() -> None:
    dedup = Dedup()
    for channel in (1, 1, 2):
        dedup.settled(KEY, channel)
    dedup.age()
    assert dedup.take(KEY, lambda channel: channel == 2)
    assert not dedup.take(KEY, lambda channel: channel == 2)
    assert [dedup.take(KEY, anywhere) for _ in range(3)] == [True, True, False]


def test_an_id_that_never_changes_costs_no_more_than_others() -> None:
    dedup = Dedup()
    tracemalloc.start()
    try:
        for _ in range(10_000):
            dedup.settled(KEY, 1)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 20 * 10_000
