"""What becomes of a job after a run: a pure judgement over outcome and attempts."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator

from workerd.job import Outcome


class Verdict(enum.Enum):
    """What happens to the delivery of a job. Mapped to AMQP in one place, Worker.settle."""

    #: Acknowledge: the work is done.
    DONE = "done"
    #: Acknowledge: the copy in the dead-letter queue was confirmed by the broker.
    DEAD = "dead"
    #: Reject: the broker moves the message, untouched, to the dead letters.
    REJECT = "rejected"
    #: Give it back to its queue: the attempt does not count.
    RETURN = "returned"

    @property
    def remembered(self) -> bool:
        """Whether a redelivery is acknowledged without another run.

        A rejected one is not: its reject may have been lost, and only another one brings it
        to the dead letters.
        """
        return self in (Verdict.DONE, Verdict.DEAD)


def judge(outcome: Outcome) -> Verdict:
    """The verdict over a run that ended with ``outcome``.

    UNAVAILABLE has none: such a run is tried again by whoever started it.
    """
    if outcome is Outcome.DONE:
        return Verdict.DONE
    if outcome is Outcome.INTERRUPTED:
        return Verdict.RETURN
    assert outcome is not Outcome.UNAVAILABLE
    return Verdict.DEAD


def backoff(first: float, maximum: float) -> Iterator[float]:
    """Endless delays in seconds: growing from ``first`` to ``maximum``, each jittered.

    A delay is about a fifth of the time that has passed since the first, so that what is
    over soon is noticed soon. It is drawn from the upper half of its step, so that hundreds
    of daemons do not come back to a restarted broker in one instant.
    """
    step = first
    while True:
        yield random.uniform(step / 2, step)  # noqa: S311 - jitter, not a secret
        step = min(step * 1.25, maximum)
