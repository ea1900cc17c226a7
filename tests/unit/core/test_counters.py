"""What an instance counts, and how its answer becomes what Prometheus reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness.samples import MESSAGE, NOW
from workerd.cli import prometheus
from workerd.core.counters import RUN_BOUNDS, UNKNOWN, WAIT_BOUNDS, Counters, Histogram
from workerd.core.decode import decode
from workerd.core.job import ATTEMPT, REPLAY, Delivery, Job, Message, Run
from workerd.core.retry import Verdict


def job(message: Message = MESSAGE, queue: str = "photos") -> Job:
    return decode(message, queue)


def run(delayed: bool = False, **changes: Any) -> Run:
    """A run of a message that was submitted ten seconds ago."""
    sent = replace(MESSAGE, timestamp=int(NOW) - 10, **changes)
    delivery = Delivery(1, 1, 0.0, job(sent), delayed)
    return Run(delivery.job, delivery)


def test_each_verdict_counts_as_what_has_become_of_the_job() -> None:
    counters = Counters(["resize"])
    for verdict in Verdict:
        counters.settled(job(), verdict)
    assert {outcome: count for (_, _, outcome), count in counters.jobs.items()} == {
        "done": 1,
        "retried": 1,
        "postponed": 1,
        "dead": 2,
        "returned": 2,
    }
    assert counters.total("dead") == 2


def test_types_that_no_handler_has_are_counted_as_one() -> None:
    counters = Counters(["resize"])
    for number in range(1000):
        stranger = job(replace(MESSAGE, type=f"type-{number}"))
        counters.settled(stranger, Verdict.DEAD)
        counters.ended(stranger, 0.0, 1.0)
    counters.settled(job(replace(MESSAGE, type=None)), Verdict.DEAD)
    assert counters.jobs == {("photos", UNKNOWN, "dead"): 1001}
    assert counters.runs.keys() == {("photos", UNKNOWN)}


def test_a_handler_that_was_removed_keeps_its_figures() -> None:
    counters = Counters(["resize"])
    counters.know(["other"])
    counters.settled(job(), Verdict.DONE)
    assert counters.jobs == {("photos", "resize", "done"): 1}


def test_a_value_at_a_bound_is_in_the_bucket_of_that_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.sum == pytest.approx(6.6)


def test_a_job_that_never_began_has_no_run_time() -> None:
    counters = Counters(["resize"])
    counters.ended(job(), None, 5.0)
    assert counters.runs == {}
    counters.ended(job(), 3.0, 5.0)
    assert counters.runs["photos", "resize"].sum == 2.0


def test_the_wait_is_from_the_timestamp_to_the_first_start() -> None:
    counters = Counters(["resize"])
    counters.began(run(), int(NOW) + 0.5)
    assert counters.waits["photos"].sum == 10.5


@pytest.mark.parametrize(
    "other",
    [
        run(delayed=True),
        run(headers={ATTEMPT: 1}),
        run(headers={REPLAY: "again"}),
        Run(job(), None),
        Run(job(), Delivery(1, 1, 0.0, job(replace(MESSAGE, timestamp=None)))),
        # In milliseconds, as some senders have it; and as 0.
        Run(job(), Delivery(1, 1, 0.0, job(replace(MESSAGE, timestamp=int(NOW) * 1000)))),
        Run(job(), Delivery(1, 1, 0.0, job(replace(MESSAGE, timestamp=0)))),
    ],
    ids=["delayed", "retry", "replay", "orphan", "no timestamp", "milliseconds", "zero"],
)
def test_where_nobody_can_tell_how_long_a_job_waited_nothing_is_counted(other: Run) -> None:
    if other.delivery:
        other.job = other.delivery.job
    counters = Counters(["resize"])
    counters.began(other, NOW)
    assert counters.waits == {}


def test_a_clock_that_is_a_little_ahead_makes_no_negative_wait() -> None:
    counters = Counters(["resize"])
    counters.began(run(), NOW - 60)
    assert counters.waits["photos"].sum == 0.0


# The text


def state(instance: str = "1", **changes: Any) -> dict[str, Any]:
    """What an instance answers."""
    queue = {"queue": "photos", "slots": 4, "running": 1, "waiting": 2, "held": 0}
    whose = {"queue": "photos", "handler": "resize"}
    return {
        "instance": instance,
        "state": "running",
        "started": 1_700_000_000.25,
        "healthy": True,
        "release": "0.1.0",
        "python": "3.11.2",
        "connected": True,
        "publishing_blocked": False,
        "lost_connections": {"consume": 2, "publish": 1},
        "log_records_dropped": 0,
        "submissions": 0,
        "submitted": {"photos": 3},
        "queues": [
            {**queue, "consuming": True, "paused": False, "ready": 7, "due": 0, "dead": None}
        ],
        "handlers": [{"handler": "resize", "paused": False, "degraded": True}],
        "jobs": [{**whose, "outcome": "done", "count": 5}],
        "run_seconds": [{**whose, "bounds": [0.5, 1.0], "counts": [1, 3, 1], "sum": 4.5}],
        "wait_seconds": [{"queue": "photos", "bounds": [1.0], "counts": [5, 0], "sum": 0.0}],
        "process": {"cpu_seconds": 1.5, "resident_bytes": 1024, "descriptors": 9},
        **changes,
    }


def samples(*states: dict[str, Any]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the text, by name and labels."""
    text = prometheus.text(lambda: states).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def named(name: str, found: dict[Any, float]) -> dict[tuple[str, ...], float]:
    """The samples of one name, by the values of their labels in the order of the labels' names."""
    return {
        tuple(value for _, value in labels): number
        for (each, labels), number in found.items()
        if each == name
    }


def test_the_text_has_what_the_instance_answers() -> None:
    found = samples(state())
    assert named("workerd_up", found) == {("1",): 1}
    assert named("workerd_build_info", found) == {("3.11.2", "0.1.0", "1"): 1}
    assert named("workerd_start_time_seconds", found) == {("1",): 1_700_000_000.25}
    assert named("workerd_jobs_total", found) == {("resize", "done", "photos", "1"): 5}
    assert named("workerd_lost_connections_total", found) == {
        ("consume", "1"): 2,
        ("publish", "1"): 1,
    }
    assert named("workerd_handler_paused", found) == {("resize", "1"): 0}
    assert named("workerd_handler_degraded", found) == {("resize", "1"): 1}
    assert named("workerd_queue_ready_messages", found) == {("photos", "1"): 7}
    # What nobody knows is missing.
    assert named("workerd_queue_dead_messages", found) == {}
    assert named("workerd_child_processes", found) == {}


def test_the_buckets_of_a_histogram_add_up() -> None:
    found = samples(state())
    assert named("workerd_job_run_seconds_bucket", found) == {
        ("resize", "0.5", "photos", "1"): 1,
        ("resize", "1.0", "photos", "1"): 4,
        ("resize", "+Inf", "photos", "1"): 5,
    }
    assert named("workerd_job_run_seconds_count", found) == {("resize", "photos", "1"): 5}
    assert named("workerd_job_run_seconds_sum", found) == {("resize", "photos", "1"): 4.5}


@pytest.mark.parametrize("down", ["failed", "died", "stuck", "silent"])
def test_an_instance_that_should_run_and_does_not_is_not_up(down: str) -> None:
    silent = {"instance": "2", "state": down, "healthy": False, "why": "x"}
    assert named("workerd_up", samples(silent, state())) == {("2",): 0, ("1",): 1}


@pytest.mark.parametrize("quiet", ["stopped", "unknown"])
def test_an_instance_that_was_stopped_has_no_series(quiet: str) -> None:
    assert samples({"instance": "2", "state": quiet, "healthy": False, "why": None}) == {}


def test_what_a_name_may_have_in_it_breaks_no_line() -> None:
    odd = 'a"b\\c'
    found = samples(state(submitted={odd: 1}))
    assert named("workerd_submissions_total", found) == {(odd, "1"): 1}


def test_the_bounds_are_in_order() -> None:
    for bounds in (RUN_BOUNDS, WAIT_BOUNDS):
        assert list(bounds) == sorted(set(bounds))
