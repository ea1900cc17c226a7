"""What an instance answers to `metrics`: everything that it counts (docs/control.md)."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping

from workerd import __version__, log
from workerd.config.model import Settings
from workerd.control.protocol import Reply
from workerd.core.counters import OUTCOMES, UNKNOWN, Histogram
from workerd.worker.inspect import Inspector, at_broker

_PAGE = os.sysconf("SC_PAGE_SIZE")


def metrics(inspector: Inspector, settings: Settings, depths: Mapping[str, int]) -> Reply:
    """All of it, but for what `Requests` knows; ``depths`` are ready messages by full name."""
    counters = inspector.counters
    return {
        "release": __version__,
        "python": platform.python_version(),
        "connected": bool(inspector.broker),
        "publishing_blocked": bool(inspector.publishing_blocked),
        "lost_connections": inspector.losses,
        "log_records_dropped": log.dropped(),
        "submissions": counters.submitting,
        "submitted": {queue: counters.submitted[queue] for queue in sorted(settings.queues)},
        "queues": [_queue(inspector, name, depths) for name in inspector.consumed],
        "handlers": _handlers(inspector, settings),
        "jobs": _jobs(inspector, settings),
        "run_seconds": [
            {"queue": queue, "handler": handler, **_histogram(histogram)}
            for (queue, handler), histogram in counters.runs.items()
        ],
        "wait_seconds": [
            {"queue": queue, **_histogram(histogram)} for queue, histogram in counters.waits.items()
        ],
        "process": _process(),
    }


def _queue(inspector: Inspector, name: str, depths: Mapping[str, int]) -> Reply:
    return {
        **inspector.in_hand(name),
        "paused": inspector.paused(name) is not None,
        **at_broker(name, depths),
    }


def _handlers(inspector: Inspector, settings: Settings) -> list[Reply]:
    degraded = inspector.paused_handlers
    return [
        {"handler": name, "paused": degraded.get(name, False), "degraded": name in degraded}
        for name in sorted(settings.handlers)
    ]


def _jobs(inspector: Inspector, settings: Settings) -> list[Reply]:
    """Attempts by queue, handler and outcome: also those that can be foreseen, as 0.

    A counter that begins with 1 looks to Prometheus as if nothing had happened.
    """
    consumed = inspector.consumed
    pairs = {(queue, UNKNOWN) for queue in consumed}
    pairs |= {(each.queue, each.name) for each in settings.handlers.values()}
    foreseen = {
        (queue, handler, outcome)
        for queue, handler in pairs
        if queue in consumed
        for outcome in OUTCOMES.values()
    }
    jobs = inspector.counters.jobs
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
