"""What becomes of a job after a run: `decide`. Pure."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from dataclasses import replace

from workerd.config.model import Retry
from workerd.core import topology
from workerd.core.job import MAX_ATTEMPTS, Job, Message, Outcome, Report, count, value
from workerd.core.republish import Origin, Publish, dead_letter, next_attempt

#: How far a jittered delay may be from what the policy says, as a part of it.
JITTER = 0.2
#: Seconds that the broker has to confirm a copy that replaces a return.
REPUBLISH_TIMEOUT = 5.0


class Verdict(enum.Enum):
    """What happens to the delivery of a job. Mapped to AMQP in one place, `Channels.settle`."""

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


@value
class Facts:
    """What the worker knows when a run ends, besides the job and its report.

    ``now`` is in seconds since 1970, ``copy_id`` a text never used before. The broker itself
    ``dead_letters`` what is rejected in the job's queue, and ``may_drop`` what returns once more.
    A job whose handler is paused is postponed for ``pause`` seconds.
    """

    now: float
    copy_id: str
    origin: Origin
    dead_letters: bool = False
    may_drop: bool = False
    pause: float = 1.0


@value
class Decision:
    """What becomes of a job: a verdict, and what has to be published and confirmed before it.

    ``delay`` is in seconds, from the publishing until the job comes due. ``dropped`` names headers
    that cannot be published. Where the broker does not confirm in time (within ``patience``
    seconds; None: until running jobs must end), the verdict is ``unconfirmed`` instead. Where it
    will never take what is published, because of what that is, the verdict is ``refused``; None:
    there is no other way, and it is tried again and again.
    """

    verdict: Verdict
    publishes: tuple[Publish, ...] = ()
    delay: int = 0
    dropped: tuple[str, ...] = ()
    unconfirmed: Verdict = Verdict.RETURN
    refused: Verdict | None = None
    patience: float | None = None


_DONE = Decision(Verdict.DONE)
_RETURN = Decision(Verdict.RETURN)
_REJECT = Decision(Verdict.REJECT)


def decide(job: Job, report: Report, policy: Retry, facts: Callable[[], Facts]) -> Decision:
    """What becomes of a job after a run. Pure and total; ``facts`` are asked for where they count.

    That is not the case for most jobs, which are just done.
    """
    match report.outcome:
        case Outcome.DONE:
            return _DONE
        case Outcome.INTERRUPTED:
            return requeue(job, facts())
        case Outcome.UNAVAILABLE:
            return _postpone(job, facts())
        case Outcome.FAILED if job.attempt < limit(job, policy):
            asked = report.retry_after
            seconds = delay(job.attempt, policy) if asked is None else asked
            return _retry(job, report, seconds, facts())
        case Outcome.FAILED | Outcome.REJECTED:
            return _dead(job, report, facts())


def requeue(job: Job, facts: Facts) -> Decision:
    """Give a job back to its queue: as a copy, where the broker might drop it otherwise.

    The copy replaces the message, and is the same attempt.
    """
    if not facts.may_drop:
        return _RETURN
    message, dropped = next_attempt(job, job.attempt - 1, facts.copy_id, None)
    publish = Publish("", job.queue, message)
    return Decision(
        Verdict.POSTPONE, (publish,), dropped=tuple(dropped), patience=REPUBLISH_TIMEOUT
    )


def _postpone(job: Job, facts: Facts) -> Decision:
    """Let the same attempt begin later."""
    copy = next_attempt(job, job.attempt - 1, facts.copy_id, None)
    decision = _delayed(Verdict.POSTPONE, job, copy, max(1.0, facts.pause))
    return replace(decision, refused=_refused(facts))


def _retry(job: Job, report: Report, seconds: float, facts: Facts) -> Decision:
    """Let the next attempt begin, after a delay."""
    copy = next_attempt(job, job.attempt, facts.copy_id, facts.now)
    decision = _delayed(Verdict.RETRY, job, copy, seconds)
    return replace(decision, unconfirmed=_unconfirmed(report), refused=_refused(facts))


def _delayed(
    verdict: Verdict,
    job: Job,
    copy: tuple[Message, list[str]],
    seconds: float,
) -> Decision:
    message, dropped = copy
    whole = min(round(seconds), topology.MAX_DELAY)
    publish = Publish(*topology.delayed(job.queue, whole), message)
    return Decision(verdict, (publish,), whole, tuple(dropped))


def _dead(job: Job, report: Report, facts: Facts) -> Decision:
    """Bring the job to the dead letters; one that no handler could be given goes as it came."""
    if job.fault and facts.dead_letters:
        return _REJECT
    message, dropped = dead_letter(job, report, facts.origin, facts.now)
    publish = Publish("", topology.dead(job.queue), message)
    return Decision(
        Verdict.DEAD,
        (publish,),
        dropped=tuple(dropped),
        unconfirmed=_unconfirmed(report),
        refused=_refused(facts),
    )


def _refused(facts: Facts) -> Verdict | None:
    """What is left for a job whose copy the broker will never take: the message as it is."""
    return Verdict.REJECT if facts.dead_letters else None


def _unconfirmed(report: Report) -> Verdict:
    """The verdict over a run whose copy was not confirmed: what ran is an attempt."""
    return Verdict.SPEND if report.ran else Verdict.RETURN


def delay(attempt: int, policy: Retry) -> float:
    """Seconds from the failure of the ``attempt``-th attempt to the next one."""
    # Beyond any maximum, and a float could not hold it.
    growth = policy.multiplier ** min(attempt - 1, 100)
    seconds = min(policy.delay * growth, policy.max_delay)
    if policy.jitter:
        seconds *= random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - jitter, not a secret
    return min(seconds, policy.max_delay)
