"""What an operator is told: the status line, and warnings before the broker loses patience."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

from workerd import log
from workerd.core.job import Job, Report, Run
from workerd.core.ledger import Ledger
from workerd.core.recent import RecentOutcomes
from workerd.core.retry import Verdict
from workerd.worker.consumer import Consumer

if TYPE_CHECKING:
    from workerd.worker.worker import Worker

#: Seconds between two renewals of the status line, at the least.
INTERVAL = 1.0
#: What an orderly end may take after the drain's deadline: the last jobs' grace, the closing.
REST_OF_DRAIN = 60.0


class Notifier(Protocol):
    """Who is told how the daemon is doing: systemd."""

    def ready(self) -> None: ...
    def status(self, text: str) -> None: ...
    def stopping(self) -> None: ...
    def extend(self, seconds: float) -> None: ...
    async def beat(self) -> None:
        """Feed the watchdog, for as long as the loop that runs this makes progress."""


class Status:
    """The status line: renewed when something has changed, at most once a second."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.recent = RecentOutcomes(time.monotonic())
        #: How many problems the configuration had at the last reload; the old one is in force.
        self.refused = 0
        self._timer: asyncio.TimerHandle | None = None

    def count(self, verdict: Verdict, job: Job, report: Report) -> None:
        """A job has its verdict."""
        self.recent.count(verdict, job, report, time.monotonic(), time.time())

    def touch(self) -> None:
        """Something changed."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self.show)

    def show(self) -> None:
        """Renew the line now; in a drain, ask for more time as well."""
        if self._timer:
            self._timer.cancel()
        self._timer = None
        worker = self._worker
        worker.notifier.status(self.line())
        if worker.ledger.draining:
            worker.notifier.extend(worker.drain.seconds_left + REST_OF_DRAIN)
            self.touch()

    def line(self) -> str:
        """What systemd shows: what the instance does, and its `notes`."""
        worker = self._worker
        consumer, slots = worker.consumer, worker.ledger.slots
        consuming = [queue for queue in slots.concurrency if queue in consumer.channels]
        troubles = self._troubles()
        if consuming and not worker.ledger.draining and not consumer.outage:
            most = sum(slots.concurrency[queue] for queue in consuming)
            total = worker.counters.total
            retried = f"{total('retried')} retried, " if total("retried") else ""
            does = (
                f"consuming {', '.join(sorted(consuming))}: {slots.in_use}/{most} "
                f"running, {total('done')} done, {retried}{total('dead')} failed; {consumer.broker}"
            )
            troubles.insert(0, does)
        return "; ".join([*self._reload(), *(troubles or [f"declaring queues; {consumer.broker}"])])

    def notes(self) -> list[str]:
        """What an operator should know besides: what keeps it from work, what is wrong."""
        return [*self._reload(), *self._troubles()]

    def degraded(self) -> list[str]:
        """Of each handler that runs no jobs, or fewer than it should: which, and why."""
        return [f"handler {name} {why}" for name, why in self._worker.attempts.degraded.items()]

    def _reload(self) -> list[str]:
        refused = self.refused
        return [f"reload refused: {refused} problems, see the log"] if refused else []

    def _troubles(self) -> list[str]:
        worker = self._worker
        consumer, slots = worker.consumer, worker.ledger.slots
        running = slots.in_use
        if worker.ledger.draining:
            return [f"draining {running} jobs, {worker.drain.seconds_left:.0f}s left"]
        if consumer.outage:
            return [consumer.outage, *([f"{running} running"] if running else [])]
        parts = []
        operator_paused = sorted(consumer.operator_paused.intersection(slots.concurrency))
        parts += [f"{queue} paused by an operator" for queue in operator_paused]
        parts += [f"{queue} paused: {text}" for queue, text in sorted(consumer.paused.items())]
        refused = {run.job.queue: text for run, text in worker.outbox.refused.items()}
        parts += [f"{queue} paused: {text}" for queue, text in sorted(refused.items())]
        parts += self.degraded()
        if slots.isolated:
            parts.append(f"{slots.isolated} jobs to run alone first")
        if worker.pressure.short:
            parts.append("short of memory: one job at a time")
        if worker.outbox.publisher.blocked:
            parts.append(f"publishing blocked: {worker.outbox.publisher.blocked}")
        return parts

    def log_state(self) -> None:
        """Everything that is in hand, into the log."""
        worker = self._worker
        ledger = worker.ledger
        now = asyncio.get_running_loop().time()
        log.event("state", status=self.line(), remembered=len(ledger.dedup))
        for queue in worker.settings.worker.queues:
            log.event(
                "state queue",
                queue=queue,
                running=ledger.slots.busy(queue),
                waiting=ledger.slots.waiting(queue),
                held=sum(delivery.job.queue == queue for delivery in ledger.held),
                paused=worker.consumer.paused.get(queue),
            )
        for run in ledger.running:
            log.event(
                "state job",
                job_id=run.job.id,
                job_type=run.job.type,
                queue=run.job.queue,
                attempt=run.job.attempt,
                seconds=round(now - run.delivery.received, 1) if run.delivery else None,
                orphan=run.delivery is None,
            )


async def watch_ages(ledger: Ledger, consumer: Consumer) -> None:
    """Warn before the broker takes a job back, at half and at 4/5 of its patience."""
    warned: dict[Run, float] = {}
    while True:
        # Often enough for a shorter limit, which the broker may tell any moment.
        await asyncio.sleep(min(INTERVAL, consumer.ack_timeout / 20))
        limit = consumer.ack_timeout
        now = asyncio.get_running_loop().time()
        warned = {run: part for run, part in warned.items() if run in ledger.running}
        for run in ledger.running:
            age = now - run.delivery.received if run.delivery else 0.0
            part = 0.8 if age > 0.8 * limit else 0.5 if age > 0.5 * limit else 0.0
            if part > warned.get(run, 0.0):
                warned[run] = part
                log.warning(
                    "ack timeout near",
                    job_id=run.job.id,
                    queue=run.job.queue,
                    seconds=round(age),
                    ack_timeout=round(limit),
                    remedy="raise RabbitMQ's consumer_timeout above the longest job",
                )
