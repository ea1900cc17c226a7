"""The worker: the shell around the ledger. Start reading at `Worker.perform`, the life of a job."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Protocol

from workerd import job as jobs
from workerd import log, topology
from workerd.broker import Channel, Incoming
from workerd.consumer import Connect, Consumer
from workerd.drain import Drain
from workerd.errors import Trouble, Unencodable
from workerd.job import BadJob, Delivery, Job, Outcome, Place, Report
from workerd.ledger import Ledger, Rejoined, Run, Settle
from workerd.memory import Memory
from workerd.options import Settings
from workerd.publisher import Publisher
from workerd.retry import Verdict, backoff, judge
from workerd.status import Notifier, Status, watch_ages
from workerd.waiting import first

#: Of sysexits.h: "temporary failure"; a job that ends with it fails without a warning.
EX_TEMPFAIL = 75


#: Seconds between two looks at what other instances make of a job that is held here.
LOOK_INTERVAL = 0.1


class Handler(Protocol):
    """What runs jobs of one type."""

    async def run(
        self, job: Job, stop: asyncio.Future[None], started: Callable[[], None]
    ) -> Report:
        """Run the job; when ``stop`` is done, interrupt it. Raises nothing on the job's account.

        ``started`` is called once, when it has really begun.
        """


class Worker:
    """Consumes, runs and settles jobs until `stop` is called; see `run`."""

    def __init__(
        self,
        settings: Settings,
        handlers: Mapping[str, Handler],
        place: Place,
        connect: Connect,
        notifier: Notifier,
        memory: Memory | None = None,
    ) -> None:
        self.settings = settings
        self.handlers = handlers
        self.place = place
        self.notifier = notifier
        self.ledger = Ledger(_slots(settings), memory)
        self.publisher = Publisher()
        self.consumer = Consumer(settings, f"workerd@{place.instance}.{place.host}", self)
        self.drain = Drain(self)
        self.status = Status(self)
        #: Every open channel on which a delivery may still have to be settled, by serial.
        self.channels: dict[int, Channel] = {}
        self._connect = connect
        #: The channels among them that consume no more.
        self._retiring: set[Channel] = set()
        #: Set whenever something happened that somebody may be waiting for.
        self._happened = asyncio.Event()
        self._performing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Startup, work, shutdown."""
        async with asyncio.TaskGroup() as self._tasks:
            background = [
                self._tasks.create_task(self.consumer.run(self._connect), name="consumer"),
                self._tasks.create_task(self.publisher.run(self._connect), name="publisher"),
                self._tasks.create_task(self._grow_older(), name="memory"),
                self._tasks.create_task(self._look_again(), name="held"),
                self._tasks.create_task(watch_ages(self.ledger, self.consumer), name="ages"),
                self._tasks.create_task(self.notifier.beat(), name="watchdog"),
            ]
            await first(
                self.consumer.consuming.wait(),
                self.drain.wanted.wait(),
                timeout=self.settings.worker.ready_wait,
            )
            if not self.drain.wanted.is_set():
                self.status.show()
                self.notifier.ready()
                log.event("ready")
            await self.drain.wanted.wait()
            await self.drain.run()
            for task in (*background, *self._performing):
                task.cancel()

    def stop(self) -> None:
        """Drain and return from `run`. Called again, it cuts the drain short."""
        self.drain.request()
        self.changed()

    def reload(self, settings: Settings, handlers: Mapping[str, Handler]) -> None:
        """From now on work with these; jobs that run keep the old."""
        self.settings = settings
        self.handlers = handlers
        self.ledger.configure(_slots(settings))
        self.consumer.reload(settings)
        for queue in settings.worker.queues:
            while run := self.ledger.next(queue):
                self._begin(run)
        self.changed()

    async def perform(self, run: Run) -> None:
        """The life of a job, from its start to the order that settles its delivery."""
        job = run.job
        with log.job_fields(job_id=job.id, job_type=job.type, queue=job.queue, attempt=job.attempt):
            log.event("start", self._routine, redelivered=job.redelivered)
            began = time.monotonic()
            report = await self._execute(job)
            verdict = judge(report.outcome)
            self._log_outcome(report, time.monotonic() - began)
            if verdict is Verdict.DEAD:
                verdict = await self._bury(job, report)
            self.status.count(verdict)
            order = self.ledger.finished(run, verdict)
            if order:
                self._settle(order)
            else:
                log.event("verdict kept", verdict=verdict.value)  # for the redelivery
        self._start_next(job.queue)

    async def _execute(self, job: Job) -> Report:
        """Give the job to its handler; wait here for as long as the handler cannot run at all."""
        known = ""
        for delay in backoff(1.0, 60.0):
            try:
                report = await self._handler_for(job).run(job, self.drain.interrupt, _begun)
            except BadJob as bad:
                return Report(Outcome.REJECTED, bad.reason, error=str(bad))
            except Exception:  # noqa: BLE001 - whatever a handler does, the job is not lost
                report = Report(Outcome.UNAVAILABLE, "bug", error=traceback.format_exc())
            if report.outcome is not Outcome.UNAVAILABLE:
                return report
            if report.error != known:
                log.error("handler unavailable", reason=report.reason, error=report.error)
            known = report.error
            if await self.drain.wanted_within(delay):
                break
        return Report(Outcome.INTERRUPTED, "drain")

    def _handler_for(self, job: Job) -> Handler:
        """Raises BadJob where there is none for this job, or none that may have it."""
        if job.fault:
            raise job.fault
        if jobs.has_expired(job.message, time.time()):
            raise BadJob("expired", "it was not to be started after x-workerd-expires")
        if job.type is None:
            raise BadJob("unknown-type", f"no type, and queue {job.queue} has no default_handler")
        handler = self.handlers.get(job.type)
        if handler is None:
            raise BadJob("unknown-type", f"no handler is named {job.type!r}")
        limit = self.settings.handlers[job.type].max_body
        if len(job.body) > limit:
            raise BadJob("too-large", f"the body has {len(job.body)} bytes; max_body is {limit}")
        return handler

    async def _bury(self, job: Job, report: Report) -> Verdict:
        """Bring a copy to the dead letters; returns when the broker has confirmed it.

        Until then the job stays unacknowledged, and a drain gives it back.
        """
        if job.fault and job.queue in self.consumer.declarations.dead_letters:
            return Verdict.REJECT  # the broker moves the untouched original
        letter, dropped = jobs.dead_letter(job, report, self.place, time.time())
        if dropped:
            log.warning("headers dropped", names=", ".join(dropped))
        known = ""
        for delay in backoff(0.5, self.settings.broker.reconnect_max):
            publishing = asyncio.ensure_future(
                self.publisher.publish("", topology.dead(job.queue), letter)
            )
            await first(asyncio.wait({publishing}), self.drain.interrupted())
            if not publishing.done():
                publishing.cancel()
                break
            try:
                publishing.result()
            except (Trouble, Unencodable) as trouble:
                if str(trouble) != known:
                    log.warning("dead letter refused", text=str(trouble))
                known = str(trouble)
            else:
                log.warning("dead letter", reason=report.reason, to=topology.dead(job.queue))
                return Verdict.DEAD
            if await self.drain.interrupts_within(delay):
                break
        return Verdict.RETURN

    def _settle(self, order: Settle) -> None:
        """The one place where a verdict becomes AMQP."""
        channel = self.channels[order.delivery.channel]
        tag = order.delivery.tag
        match order.verdict:
            case Verdict.DONE | Verdict.DEAD:
                channel.ack(tag)
            case Verdict.RETURN:
                channel.give_back(tag)
            case Verdict.REJECT:
                channel.reject(tag)
        self._close_retired()

    def give_back_unstarted(self) -> None:
        """Return every delivery that waits for a slot, in the order in which they came."""
        for delivery in self.ledger.unstarted():
            self.channels[delivery.channel].give_back(delivery.tag)

    # What the consumer tells: called synchronously from the broker's callbacks.

    @property
    def wanted(self) -> bool:
        """In a drain, a connection is of use only for what is still owed to the broker."""
        return not self.ledger.draining or self.ledger.owes()

    def opened(self, channel: Channel) -> None:
        self.channels[channel.serial] = channel
        self.ledger.opened(channel.serial)

    def delivered(self, queue: str, channel: Channel, incoming: Incoming) -> None:
        # None after a reload without this queue: what still comes from it goes back soon.
        configured = self.settings.queues.get(queue)
        default = configured.default_handler if configured else None
        job = jobs.decode(incoming.message, queue, incoming.redelivered, default)
        now = asyncio.get_running_loop().time()
        self._act(self.ledger.delivered(Delivery(channel.serial, incoming.tag, now, job)))
        self.changed()

    def _act(self, decision: Run | Settle | Rejoined | None) -> None:
        """Do what the ledger has decided over a delivery."""
        match decision:
            case Run():
                self._begin(decision)
            case Settle(delivery):
                job = delivery.job
                log.event("settled from memory", job_id=job.id, queue=job.queue)
                self._settle(decision)
            case Rejoined(run):
                log.event("rejoined", job_id=run.job.id, queue=run.job.queue)
                self._close_retired()

    def lost(self, channel: Channel) -> None:
        in_order = channel.ended_in_order and not self.ledger.holds(channel.serial)
        (self.ledger.closed if in_order else self.ledger.lost)(channel.serial)
        self.channels.pop(channel.serial, None)
        self._retiring.discard(channel)
        self.changed()

    def retired(self, channel: Channel) -> None:
        # A delivery so old was taken back by the broker: never settle it here again.
        stale_before = asyncio.get_running_loop().time() - 0.95 * self.consumer.ack_timeout
        for delivery in self.ledger.retired(channel.serial, stale_before):
            channel.give_back(delivery.tag)
        self._retiring.add(channel)
        self._close_retired()

    def detached(self, channel: Channel) -> None:
        for delivery in self.ledger.detached(channel.serial):
            channel.give_back(delivery.tag)
        self._retiring.add(channel)
        self._close_retired()

    def idle(self, channel: Channel) -> bool:
        return self.ledger.idle(channel.serial)

    def changed(self) -> None:
        self._happened.set()
        self.status.touch()

    # Small verbs.

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until this is true; asked again whenever something has happened."""
        while not condition():
            self._happened.clear()
            await self._happened.wait()

    def _begin(self, run: Run) -> None:
        task = self._tasks.create_task(self.perform(run), name=f"job {run.job.id}")
        self._performing.add(task)
        task.add_done_callback(self._performing.discard)

    def _start_next(self, queue: str) -> None:
        run = self.ledger.next(queue)
        if run:
            self._begin(run)
        self.changed()

    def _close_retired(self) -> None:
        for channel in [c for c in self._retiring if not self.ledger.holds(c.serial)]:
            self._retiring.discard(channel)
            self._tasks.create_task(self._close_channel(channel), name=f"close {channel.serial}")

    @staticmethod
    async def _close_channel(channel: Channel) -> None:
        with contextlib.suppress(Trouble):
            await channel.close()

    async def _grow_older(self) -> None:
        """Forget finished jobs once they have been remembered for ``remember``."""
        while True:
            await asyncio.sleep(max(1.0, self.settings.worker.remember / 3))
            self.ledger.age()

    async def _look_again(self) -> None:
        """See what other instances have made of the jobs that came to us as redeliveries."""
        while True:
            await self.until(lambda: bool(self.ledger.held))
            await asyncio.sleep(LOOK_INTERVAL)
            for decision in self.ledger.look_again(asyncio.get_running_loop().time()):
                self._act(decision)

    @property
    def _routine(self) -> log.Level:
        return "info" if self.settings.log.jobs == "all" else "debug"

    def _log_outcome(self, report: Report, seconds: float) -> None:
        facts = {
            "outcome": report.outcome.value,
            "duration_ms": round(seconds * 1000),
            "reason": report.reason or None,
            "exit_status": report.exit_status,
            "signal": report.signal,
        }
        if report.outcome is Outcome.DONE:
            log.event("done", self._routine, **facts)
        elif report.outcome is Outcome.INTERRUPTED or report.exit_status == EX_TEMPFAIL:
            log.event(report.outcome.value, "info", **facts)
        else:
            log.warning(report.outcome.value, **facts, error=report.error[-500:] or None)


def _begun() -> None:
    """A job has begun."""


def _slots(settings: Settings) -> dict[str, int]:
    """How many jobs of each consumed queue may run at once."""
    return {name: settings.queues[name].concurrency for name in settings.worker.queues}
