"""How jobs have ended of late: how many in each few seconds, and the last that failed. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from workerd.core.job import Job, Report
from workerd.core.republish import tail
from workerd.core.retry import Verdict

#: Seconds that are counted together, and how many of these are kept: ten minutes.
STEP = 5.0
KEPT = 120
#: The last failed attempts that are kept.
FAILURES = 20
#: The longest text of an error that is kept with one, in bytes.
_MAX_ERROR = 200
_MAX_TEXT = 255

#: The verdicts on attempts that have come to their end.
_ENDED = (Verdict.DONE, Verdict.RETRY, Verdict.DEAD, Verdict.REJECT)


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that failed at ``when``, in seconds since 1970.

    ``error`` is the last line of what it said. ``last``: it is a dead letter now.
    """

    id: str
    type: str | None
    queue: str
    attempt: int
    reason: str
    error: str
    last: bool
    when: float


class RecentOutcomes:
    """Counts ends of attempts; ``now`` is always an instant of the monotonic clock."""

    def __init__(self, now: float) -> None:
        self.failures: deque[Failure] = deque(maxlen=FAILURES)
        #: Of each step until the one that goes on: those that were done, those that failed.
        self._steps: deque[list[int]] = deque([[0, 0]], maxlen=KEPT + 1)
        self._step = int(now // STEP)

    def count(self, verdict: Verdict, job: Job, report: Report, now: float, clock: float) -> None:
        """A job has its verdict; ``clock`` is the same instant in seconds since 1970."""
        if verdict not in _ENDED:
            return
        self._advance(now)
        self._steps[-1][verdict is not Verdict.DONE] += 1
        if verdict is not Verdict.DONE:
            self.failures.append(
                Failure(
                    id=job.id[:_MAX_TEXT],
                    type=job.type,
                    queue=job.queue,
                    attempt=job.attempt,
                    reason=report.reason,
                    error=_last_line(report.error),
                    last=verdict is not Verdict.RETRY,
                    when=clock,
                )
            )

    def pace(self, now: float) -> Mapping[str, object]:
        """How many attempts ended in each step that is over, the oldest first.

        ``until`` is the instant at which the last of them was over.
        """
        self._advance(now)
        over = [*self._steps][:-1]
        return {
            "seconds": STEP,
            "until": self._step * STEP,
            "done": [done for done, _ in over],
            "failed": [failed for _, failed in over],
        }

    def _advance(self, now: float) -> None:
        step = int(now // STEP)
        if step > self._step:
            missing = min(step - self._step, KEPT + 1)
            self._steps.extend([0, 0] for _ in range(missing))
            self._step = step


def _last_line(text: str) -> str:
    lines = text[-4 * _MAX_ERROR :].strip().splitlines()
    return tail(lines[-1].strip(), _MAX_ERROR) if lines else ""
