"""What an instance counts for its metrics: plain numbers, and histograms of fixed buckets. Pure.

Their labels come from the configuration alone, whatever stands in the messages: the types that
no handler has had are counted as one. So the memory they take is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable

from workerd.core.job import REPLAY, Job, Run
from workerd.core.retry import Verdict

#: In place of a handler, for jobs of a type that no handler has. It has a space, as no name has.
UNKNOWN = "no handler"

#: What has become of a job at the end of an attempt, by verdict.
OUTCOMES = {
    Verdict.DONE: "done",
    Verdict.RETRY: "retried",
    Verdict.POSTPONE: "postponed",
    Verdict.DEAD: "dead",
    Verdict.REJECT: "dead",
    Verdict.RETURN: "returned",
    Verdict.SPEND: "returned",
}

#: The upper bounds of the buckets, in seconds; there is one more bucket for what is longer.
RUN_BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
#: The timestamps of messages have whole seconds.
WAIT_BOUNDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21_600.0, 86_400.0)

#: A wait outside of this is a clock that is wrong, or a timestamp in another unit; in seconds.
_EARLIEST, _LONGEST = -3600.0, 366 * 86_400.0


class Histogram:
    """How many values were at most each bound, and greater than the one before; and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Counters:
    """Everything that is counted of jobs, from the start of the process on."""

    def __init__(self, handlers: Iterable[str]) -> None:
        #: Attempts, by queue, handler and outcome.
        self.jobs: Counter[tuple[str, str, str]] = Counter()
        #: How long they ran, by queue and handler.
        self.runs = defaultdict[tuple[str, str], Histogram](lambda: Histogram(RUN_BOUNDS))
        #: How long they had waited before the first attempt, by queue.
        self.waits = defaultdict[str, Histogram](lambda: Histogram(WAIT_BOUNDS))
        #: Jobs that came over the local socket and were confirmed, by queue.
        self.submitted: Counter[str] = Counter()
        #: Those that the broker has not confirmed yet.
        self.submitting = 0
        self._handlers: set[str] = set()
        self.know(handlers)

    def know(self, handlers: Iterable[str]) -> None:
        """These are configured now; those of before keep their figures."""
        self._handlers.update(handlers)

    def began(self, run: Run, now: float) -> None:
        """A handler has begun with a job; ``now`` is in seconds since 1970."""
        waited = _waited(run, now)
        if waited is not None:
            self.waits[run.job.queue].add(waited)

    def ended(self, job: Job, began: float | None, now: float) -> None:
        """A handler has ended that had begun then, if it ever had; on one clock."""
        if began is not None:
            self.runs[job.queue, self._handler(job)].add(now - began)

    def settled(self, job: Job, verdict: Verdict) -> None:
        """An attempt has its verdict."""
        self.jobs[job.queue, self._handler(job), OUTCOMES[verdict]] += 1

    def total(self, outcome: str) -> int:
        """Of all queues and handlers."""
        return sum(number for key, number in self.jobs.items() if key[2] == outcome)

    def _handler(self, job: Job) -> str:
        return job.type if job.type in self._handlers else UNKNOWN


def _waited(run: Run, now: float) -> float | None:
    """For how many seconds a job waited since it was submitted; None when that says nothing.

    Nobody can tell when a delayed job, a further attempt or a dead letter that was sent back
    could have begun at the earliest.
    """
    job = run.job
    delayed = run.delivery is None or run.delivery.delayed
    sent = job.message.timestamp
    if sent is None or delayed or job.attempt > 1 or REPLAY in job.message.headers:
        return None
    waited = now - sent
    return max(0.0, waited) if _EARLIEST <= waited <= _LONGEST else None
