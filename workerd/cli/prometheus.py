"""The metrics of every instance, as Prometheus reads them; docs/metrics.md has their meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

Reply = dict[str, Any]
#: Asks for the present state of every instance.
Look = Callable[[], Iterable[Reply]]

#: States of an instance that does not answer, and should.
DOWN = frozenset({"failed", "died", "stuck", "silent"})

# Not "instance", which Prometheus itself gives to what it scrapes, and would rename ours.
_WORKER = ("worker",)
_QUEUE = ("worker", "queue")
_HANDLER = ("worker", "queue", "handler")

_COUNTERS = (
    (
        "jobs",
        "Attempts at jobs that have ended, by what became of the job.",
        (*_HANDLER, "outcome"),
    ),
    ("submissions", "Jobs that came over the local socket and were confirmed.", _QUEUE),
    (
        "lost_connections",
        "Connections to the broker that were lost.",
        (*_WORKER, "connection"),
    ),
    ("log_records_dropped", "Records of the log that were never written.", _WORKER),
    ("process_cpu_seconds", "Processor time of the daemon, without its jobs.", _WORKER),
)
_GAUGES = (
    ("up", "Whether the instance answers; one that was stopped has no series.", _WORKER),
    ("start_time_seconds", "When the instance has started, in seconds since 1970.", _WORKER),
    ("healthy", "Whether it really consumes: what workerd health says.", _WORKER),
    ("connected", "Whether it has a connection to the broker.", _WORKER),
    ("draining", "Whether it lets its jobs end, and starts none.", _WORKER),
    ("publishing_blocked", "Whether an alarm of the broker holds up publishing.", _WORKER),
    ("pending_submissions", "Jobs from the local socket that are not confirmed yet.", _WORKER),
    ("queue_consuming", "Whether the queue is consumed.", _QUEUE),
    ("queue_paused", "Whether the broker, trouble or an operator keeps it paused.", _QUEUE),
    ("queue_concurrency", "How many jobs of the queue may run at once.", _QUEUE),
    ("running_jobs", "Jobs of the queue that run.", _QUEUE),
    ("waiting_jobs", "Jobs that were prefetched and wait for a slot.", _QUEUE),
    ("held_jobs", "Jobs that came back and that another instance may be running.", _QUEUE),
    ("queue_ready_messages", "Messages in the queue that no worker holds.", _QUEUE),
    ("queue_due_messages", "Delayed messages that have come due and wait.", _QUEUE),
    ("queue_dead_messages", "Dead letters of the queue.", _QUEUE),
    (
        "handler_paused",
        "Whether the handler is paused because it cannot run here.",
        (*_WORKER, "handler"),
    ),
    (
        "handler_degraded",
        "Whether the handler is paused, or has fewer processes than it should.",
        (*_WORKER, "handler"),
    ),
    ("process_resident_memory_bytes", "Memory of the daemon, without its jobs.", _WORKER),
    ("process_open_fds", "Open file descriptors of the daemon.", _WORKER),
    ("child_processes", "Processes that the daemon has started and that live.", _WORKER),
)
_HISTOGRAMS = (
    ("job_run_seconds", "How long handlers ran, in seconds.", _HANDLER),
    (
        "job_wait_seconds",
        "From a message's timestamp to its first start, in seconds; not for delayed jobs.",
        _QUEUE,
    ),
)


def text(look: Look) -> bytes:
    """The text that Prometheus reads."""
    return generate_latest(_registry(look))


def application(look: Look) -> Callable[..., Iterable[bytes]]:
    """A WSGI application that answers with it, in the format that is asked for."""
    app: Callable[..., Iterable[bytes]] = make_wsgi_app(_registry(look))
    return app


def _registry(look: Look) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Instances(look))
    return registry


class _Instances(Collector):
    """Asks the instances anew each time."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def describe(self) -> Iterable[Metric]:
        return _families().values()

    def collect(self) -> Iterable[Metric]:
        families = _families()
        for state in self._look():
            _fill(families, state)
        return [family for family in families.values() if family.samples]


def _families() -> dict[str, Any]:
    found: dict[str, Any] = {
        "build": InfoMetricFamily(
            "workerd_build", "Versions of workerd and Python.", labels=_WORKER
        )
    }
    for kind, table in (
        (CounterMetricFamily, _COUNTERS),
        (GaugeMetricFamily, _GAUGES),
        (HistogramMetricFamily, _HISTOGRAMS),
    ):
        for name, about, labels in table:
            found[name] = kind(f"workerd_{name}", about, labels=labels)
    return found


def _fill(families: dict[str, Any], state: Reply) -> None:
    """Add the samples of one instance, as its answer to `metrics` has them."""
    worker = state["instance"]

    def add(name: str, value: float | None, *labels: str) -> None:
        if value is not None:
            families[name].add_metric((worker, *labels), value)

    def histogram(name: str, entry: Reply, *labels: str) -> None:
        bounds = [*map(str, entry["bounds"]), "+Inf"]
        buckets = list(zip(bounds, accumulate(entry["counts"]), strict=True))
        families[name].add_metric((worker, *labels), buckets, entry["sum"])

    if state["state"] in DOWN:
        add("up", 0)
    if "jobs" not in state:
        return
    add("up", 1)
    versions = {"version": state["release"], "python": state["python"]}
    families["build"].add_metric((worker,), versions)
    add("start_time_seconds", state["started"])
    add("draining", state["state"] == "draining")
    for name in ("healthy", "connected", "publishing_blocked", "log_records_dropped"):
        add(name, state[name])
    add("pending_submissions", state["submissions"])
    for connection, number in state["lost_connections"].items():
        add("lost_connections", number, connection)
    for queue, number in state["submitted"].items():
        add("submissions", number, queue)
    for entry in state["queues"]:
        queue = entry["queue"]
        for name in ("consuming", "paused"):
            add(f"queue_{name}", entry[name], queue)
        add("queue_concurrency", entry["slots"], queue)
        for name in ("running", "waiting", "held"):
            add(f"{name}_jobs", entry[name], queue)
        for name in ("ready", "due", "dead"):
            add(f"queue_{name}_messages", entry[name], queue)
    for entry in state["handlers"]:
        for name in ("paused", "degraded"):
            add(f"handler_{name}", entry[name], entry["handler"])
    for entry in state["jobs"]:
        add("jobs", entry["count"], entry["queue"], entry["handler"], entry["outcome"])
    for entry in state["run_seconds"]:
        histogram("job_run_seconds", entry, entry["queue"], entry["handler"])
    for entry in state["wait_seconds"]:
        histogram("job_wait_seconds", entry, entry["queue"])
    process = state["process"]
    add("process_cpu_seconds", process.get("cpu_seconds"))
    add("process_resident_memory_bytes", process.get("resident_bytes"))
    add("process_open_fds", process.get("descriptors"))
    add("child_processes", process.get("children"))
