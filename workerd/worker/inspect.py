"""A look at a worker as a whole: what the status line, the local socket and the metrics say of it.

Nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Any

from workerd.core import topology
from workerd.core.counters import Counters
from workerd.core.job import Run, submitter
from workerd.core.ledger import Ledger
from workerd.core.recent import RecentOutcomes
from workerd.worker.broker_ping import BrokerPing
from workerd.worker.consumer import Consumer
from workerd.worker.executor import Executor
from workerd.worker.memory_pressure import MemoryPressure
from workerd.worker.outbox import Outbox
from workerd.worker.publisher import Publisher
from workerd.worker.stop import Stop


class Inspector:
    """Answers questions about the parts of a worker."""

    def __init__(
        self,
        ledger: Ledger,
        executor: Executor,
        consumer: Consumer,
        outbox: Outbox,
        publisher: Publisher,
        counters: Counters,
        recent: RecentOutcomes,
        pressure: MemoryPressure,
        ping: BrokerPing,
        stop: Stop,
    ) -> None:
        self._ledger = ledger
        self._executor = executor
        self._consumer = consumer
        self._outbox = outbox
        self._publisher = publisher
        self._pressure = pressure
        self._ping = ping
        self._stop = stop
        self.counters = counters
        self.recent = recent
        #: How many problems the configuration had at the last reload; the old one is in force.
        self.reload_problems = 0

    # The whole.

    @property
    def state(self) -> str:
        return "draining" if self._stop.wanted.is_set() else "running"

    @property
    def drain_left(self) -> float | None:
        """Seconds that running jobs have in a drain; None while there is none."""
        return self._stop.seconds_left if self._ledger.draining else None

    @property
    def broker(self) -> str:
        """The host to which the worker is connected, "" when there is none."""
        return self._consumer.broker

    @property
    def rabbitmq(self) -> str:
        """RabbitMQ's version, "" when there is no connection."""
        return ".".join(map(str, self._consumer.version)) if self._consumer.broker else ""

    @property
    def outage(self) -> str:
        """What keeps the worker from being connected, "" while it is."""
        return self._consumer.outage

    @property
    def losses(self) -> dict[str, int]:
        """How many connections were lost, by purpose."""
        return {"consume": self._consumer.losses, "publish": self._publisher.losses}

    @property
    def publishing_blocked(self) -> str:
        """The alarm that holds up publishing, "" when there is none."""
        return self._publisher.blocked

    @property
    def broker_is_silent(self) -> bool:
        """Whether the broker owes an answer."""
        return bool(self._ping.silent_for)

    @property
    def remembered(self) -> int:
        """How many finished jobs a redelivery would find."""
        return len(self._ledger.dedup)

    def line(self) -> str:
        """What systemd shows: what the instance does, and its `notes`."""
        consumer, slots = self._consumer, self._ledger.slots
        consuming = [queue for queue in slots.concurrency if queue in consumer.channels]
        troubles = self._troubles()
        if consuming and not self._ledger.draining and not consumer.outage:
            most = sum(slots.concurrency[queue] for queue in consuming)
            total = self.counters.total
            retried = f"{total('retried')} retried, " if total("retried") else ""
            does = (
                f"consuming {', '.join(sorted(consuming))}: {slots.in_use}/{most} "
                f"running, {total('done')} done, {retried}{total('dead')} failed; {consumer.broker}"
            )
            troubles.insert(0, does)
        return "; ".join([*self._reload(), *(troubles or [f"declaring queues; {consumer.broker}"])])

    def notes(self) -> list[str]:
        """What keeps the instance from work, and what else is wrong."""
        return [*self._reload(), *self._troubles()]

    def degraded(self) -> list[str]:
        """Which handlers run no jobs, or fewer than they should, and what else is not whole."""
        failure = self._ledger.dedup.failure
        return [
            *(f"handler {name} {why}" for name, why in self._executor.degraded.items()),
            *filter(None, [self._executor.trouble]),
            *([f"run log not kept: {failure}"] if failure else []),
        ]

    def why_not_consuming(self) -> str:
        """What keeps this instance from taking work, "" when nothing does."""
        consumer, queues = self._consumer, self._ledger.slots.concurrency
        if self._stop.wanted.is_set():
            return self.line() if self._ledger.draining else "draining"
        if consumer.outage:
            return consumer.outage
        for queue in sorted(queues):
            for name in (queue, topology.due(queue)):
                if name in consumer.paused:
                    return f"{name} paused: {consumer.paused[name]}"
        if self._publisher.outage:
            return f"cannot publish: {self._publisher.outage}"
        if not any(name in consumer.channels for name in queues):
            return self.line()
        silent = self._ping.silent_for
        if silent > BrokerPing.PATIENCE:
            return f"{consumer.broker} has not answered for {silent:.0f} s"
        return ""

    def _reload(self) -> list[str]:
        problems = self.reload_problems
        return [f"reload refused: {problems} problems, see the log"] if problems else []

    def _troubles(self) -> list[str]:
        consumer, slots = self._consumer, self._ledger.slots
        running = slots.in_use
        if self._ledger.draining:
            return [f"draining {running} jobs, {self._stop.seconds_left:.0f}s left"]
        if consumer.outage:
            return [consumer.outage, *([f"{running} running"] if running else [])]
        parts = []
        by_operator = sorted(consumer.operator_paused.intersection(slots.concurrency))
        parts += [f"{queue} paused by an operator" for queue in by_operator]
        parts += [f"{queue} paused: {text}" for queue, text in sorted(consumer.paused.items())]
        parts += [f"{queue} paused: {text}" for queue, text in sorted(self._refused().items())]
        parts += self.degraded()
        if slots.isolated:
            parts.append(f"{slots.isolated} jobs to run alone first")
        if self._pressure.short:
            parts.append("short of memory: one job at a time")
        if self._publisher.outage:
            parts.append(f"cannot publish: {self._publisher.outage}")
        if self.publishing_blocked:
            parts.append(f"publishing blocked: {self.publishing_blocked}")
        return parts

    def _refused(self) -> dict[str, str]:
        """Why the broker refuses the copies of jobs, by their queue."""
        return {run.job.queue: text for run, text in self._outbox.refused.items()}

    # Queues.

    @property
    def consumed(self) -> list[str]:
        """The work queues that this instance consumes, by name."""
        return sorted(self._ledger.slots.concurrency)

    def paused(self, queue: str) -> str | None:
        """Why nothing of a queue is started at present."""
        if queue in self._consumer.operator_paused:
            return "by an operator"
        return self._consumer.paused.get(queue) or self._refused().get(queue)

    def in_hand(self, queue: str) -> dict[str, Any]:
        """What the instance has of a queue."""
        ledger, slots = self._ledger, self._ledger.slots
        return {
            "queue": queue,
            "slots": slots.concurrency[queue],
            "running": slots.busy(queue),
            "waiting": slots.waiting(queue),
            "held": sum(delivery.job.queue == queue for delivery in ledger.held),
            "consuming": queue in self._consumer.channels,
        }

    # Handlers and jobs.

    @property
    def paused_handlers(self) -> Mapping[str, bool]:
        """The degraded handlers by name, and whether each runs nothing at all."""
        return {name: why.paused for name, why in self._executor.degraded.items()}

    @property
    def running(self) -> int:
        """How many jobs have a slot."""
        return self._ledger.slots.in_use

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that have begun, the oldest first."""
        begun = [run for run in self._ledger.running if not run.dispatched]
        begun.sort(key=lambda run: self._age(run) or 0.0, reverse=True)
        return [self.job(run) for run in begun]

    def job(self, run: Run) -> dict[str, Any]:
        """A job that runs."""
        job = run.job
        progress = self._executor.progress.get(run)
        age = self._age(run)
        return {
            "id": job.id,
            "type": job.type,
            "handler": job.type if job.type in self._executor.handlers else None,
            "queue": job.queue,
            "attempt": job.attempt,
            "age": None if age is None else round(age, 1),
            "pid": progress.details.get("pid") if progress else None,
            "ending": progress is None or progress.stop.done(),
            "submitter": submitter(job.message),
        }

    def _age(self, run: Run) -> float | None:
        """For how many seconds its handler has been at it."""
        progress = self._executor.progress.get(run)
        began = progress.began if progress else None
        return None if began is None else time.monotonic() - began

    def unsettled(self) -> Iterator[tuple[Run, float]]:
        """Each run that has a delivery to settle, and for how many seconds it has had that."""
        now = asyncio.get_running_loop().time()
        for run in self._ledger.running:
            if run.delivery:
                yield run, now - run.delivery.received

    def state_of_runs(self) -> Iterator[dict[str, Any]]:
        """Every run, as the log shows it."""
        ages = dict(self.unsettled())
        for run in self._ledger.running:
            age = ages.get(run)
            yield {
                "job_id": run.job.id,
                "job_type": run.job.type,
                "queue": run.job.queue,
                "attempt": run.job.attempt,
                "seconds": None if age is None else round(age, 1),
                "orphan": age is None,
            }


def at_broker(queue: str, depths: Mapping[str, int]) -> dict[str, int | None]:
    """What waits at the broker for a queue, None for what is not known."""
    return {
        "ready": depths.get(queue),
        "due": depths.get(topology.due(queue)),
        "dead": depths.get(topology.dead(queue)),
    }
