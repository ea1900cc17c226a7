"""Whether a job may start, or is a dead letter at once. Pure."""

from __future__ import annotations

from workerd.config.model import Handler, Settings
from workerd.core.job import BadJob, Job
from workerd.core.retry import limit


def admit(job: Job, settings: Settings, now: float) -> Handler:
    """The handler that may have this job; ``now`` is in seconds since 1970. Raises BadJob."""
    if job.fault:
        raise job.fault
    if job.has_expired(now):
        raise BadJob("expired", "it was not to be started after x-workerd-expires")
    if job.type is None:
        raise BadJob("unknown-type", f"no type, and queue {job.queue} has no default_handler")
    handler = settings.handlers.get(job.type)
    if handler is None:
        raise BadJob("unknown-type", f"no handler is named {job.type!r}")
    if len(job.body) > handler.max_body:
        text = f"the body has {len(job.body)} bytes; max_body is {handler.max_body}"
        raise BadJob("too-large", text)
    _check_attempts(job, limit(job, handler.retry))
    queue = settings.queues.get(job.queue)
    if queue and job.redelivered and job.returns >= queue.max_deliveries:
        raise BadJob(
            "max-deliveries",
            f"it has come back to its queue {job.returns} times; max_deliveries is "
            f"{queue.max_deliveries}",
        )
    return handler


def _check_attempts(job: Job, most: int) -> None:
    spent = job.attempt - 1
    if spent < most:
        return
    if job.lost_starts:
        raise BadJob(
            "worker-lost",
            f"the daemon ended before it could settle {job.lost_starts} of its {spent} attempts; "
            f"it may have {most}",
        )
    raise BadJob("attempts-spent", f"{spent} attempts are spent; it may have {most}")
