"""What becomes of a job after a run, and when: pure judgements over outcome and attempts."""

from __future__ import annotations

import enum
import random

from workerd.config.model import Retry
from workerd.core.job import MAX_ATTEMPTS, Job, Outcome, count

#: How far a jittered delay may be from what the policy says, as a part of it.
JITTER = 0.2


class Verdict(enum.Enum):
    """What happens to the delivery of a job. Mapped to AMQP in one place, Worker._settle."""

    #: Acknowledge: the work is done.
    DONE = "done"
    #: Acknowledge: the broker has confirmed the copy that is the next attempt.
    RETRY = "retry"
    #: Acknowledge: the broker has confirmed a copy that is the same attempt, for later.
    POSTPONE = "postponed"
    #: Acknowledge: the copy in the dead-letter queue was confirmed by the broker.
    DEAD = "dead"
    #: Reject: the broker moves the message, untouched, to the dead letters.
    REJECT = "rejected"
    #: Give it back to its queue: the attempt does not count.
    RETURN = "returned"
    #: Give it back, since a copy could not be published in time: the attempt counts.
    SPEND = "spent"

    @property
    def remembered(self) -> bool:
        """Whether a redelivery is acknowledged without another run.

        A rejected one is not: its reject may have been lost, and only another one brings it
        to the dead letters.
        """
        return self in (Verdict.DONE, Verdict.RETRY, Verdict.POSTPONE, Verdict.DEAD)


def limit(job: Job, policy: Retry) -> int:
    """How many attempts a job gets: what its sender asked for, or else what the policy says."""
    return min(count(job.message.headers.get(MAX_ATTEMPTS)) or policy.attempts, policy.max_attempts)


def judge(outcome: Outcome, attempt: int, limit: int) -> Verdict:
    """The verdict over a run that was the ``attempt``-th of at most ``limit``."""
    match outcome:
        case Outcome.DONE:
            return Verdict.DONE
        case Outcome.INTERRUPTED:
            return Verdict.RETURN
        case Outcome.UNAVAILABLE:
            return Verdict.POSTPONE
        case Outcome.FAILED if attempt < limit:
            return Verdict.RETRY
        case _:
            return Verdict.DEAD


def delay(attempt: int, policy: Retry) -> float:
    """Seconds from the failure of the ``attempt``-th attempt to the next one."""
    # Beyond any maximum, and a float could not hold it.
    growth = policy.multiplier ** min(attempt - 1, 100)
    seconds = min(policy.delay * growth, policy.max_delay)
    if policy.jitter:
        seconds *= random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - jitter, not a secret
    return min(seconds, policy.max_delay)
