"""What an instance answers to `metrics`: everything that it counts (docs/control.md)."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import TYPE_CHECKING

from workerd import __version__, log
from workerd.control.session import Reply
from workerd.core import topology
from workerd.core.counters import OUTCOMES, UNKNOWN, Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workerd.worker.worker import Worker

_PAGE = os.sysconf("SC_PAGE_SIZE")


def metrics(worker: Worker, depths: Mapping[str, int]) -> Reply:
    """All of it, but for what `Requests` knows; ``depths`` are ready messages by full name."""
    consumer, publisher = worker.consumer, worker.outbox.publisher
    queues = sorted(worker.ledger.slots.concurrency)
    return {
        "release": __version__,
        "python": platform.python_version(),
        "connected": consumer.connection is not None,
        "publishing_blocked": bool(publisher.blocked),
        "lost_connections": {"consume": consumer.losses, "publish": publisher.losses},
        "log_records_dropped": log.dropped(),
        "submissions": worker.submissions,
        "submitted": {
            queue: worker.counters.submitted[queue] for queue in sorted(worker.settings.queues)
        },
        "queues": [_queue(worker, name, depths) for name in queues],
        "handlers": _handlers(worker),
        "jobs": _jobs(worker),
        "run_seconds": [
            {"queue": queue, "handler": handler, **_histogram(histogram)}
            for (queue, handler), histogram in worker.counters.runs.items()
        ],
        "wait_seconds": [
            {"queue": queue, **_histogram(histogram)}
            for queue, histogram in worker.counters.waits.items()
        ],
        "process": _process(),
    }


def _queue(worker: Worker, name: str, depths: Mapping[str, int]) -> Reply:
    consumer = worker.consumer
    refused = any(run.job.queue == name for run in worker.outbox.refused)
    return {
        **in_hand(worker, name),
        "paused": refused or name in consumer.paused or name in consumer.operator_paused,
        **at_broker(name, depths),
    }


def _handlers(worker: Worker) -> list[Reply]:
    degraded = worker.attempts.degraded
    return [
        {
            "handler": name,
            "paused": name in degraded and degraded[name].paused,
            "degraded": name in degraded,
        }
        for name in sorted(worker.settings.handlers)
    ]


def in_hand(worker: Worker, name: str) -> Reply:
    """What an instance has of a queue."""
    ledger, slots = worker.ledger, worker.ledger.slots
    return {
        "queue": name,
        "slots": slots.concurrency[name],
        "running": slots.busy(name),
        "waiting": slots.waiting(name),
        "held": sum(delivery.job.queue == name for delivery in ledger.held),
        "consuming": name in worker.consumer.channels,
    }


def at_broker(name: str, depths: Mapping[str, int]) -> Reply:
    """What waits at the broker for a queue, None for what is not known."""
    return {
        "ready": depths.get(name),
        "due": depths.get(topology.due(name)),
        "dead": depths.get(topology.dead(name)),
    }


def _jobs(worker: Worker) -> list[Reply]:
    """Attempts by queue, handler and outcome: also those that can be foreseen, as 0.

    A counter that begins with 1 looks to Prometheus as if nothing had happened.
    """
    settings = worker.settings
    consumed = worker.ledger.slots.concurrency
    pairs = {(queue, UNKNOWN) for queue in consumed}
    pairs |= {(each.queue, each.name) for each in settings.handlers.values()}
    foreseen = {
        (queue, handler, outcome)
        for queue, handler in pairs
        if queue in consumed
        for outcome in OUTCOMES.values()
    }
    jobs = worker.counters.jobs
    return [
        {"queue": queue, "handler": handler, "outcome": outcome, "count": jobs[key]}
        for key in sorted(foreseen | set(jobs))
        for queue, handler, outcome in [key]
    ]


def _histogram(histogram: Histogram) -> Reply:
    return {
        "bounds": list(histogram.bounds),
        "counts": list(histogram.counts),
        "sum": histogram.sum,
    }


def _process() -> Reply:
    """Of the daemon alone; what this system does not tell is missing."""
    times = os.times()
    facts: dict[str, object] = {"cpu_seconds": times.user + times.system}
    with contextlib.suppress(OSError):
        with open("/proc/self/statm") as statm:
            facts["resident_bytes"] = int(statm.read().split()[1]) * _PAGE
        facts["descriptors"] = len(os.listdir("/proc/self/fd"))
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as children:
        facts["children"] = len(children.read().split())
    return facts
