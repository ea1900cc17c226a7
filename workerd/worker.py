"""The worker: the shell around the ledger. Start reading at `Worker.perform`, the life of a job."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

from workerd import job as jobs
from workerd import log, topology
from workerd.broker import Channel, Incoming, Link
from workerd.consumer import Consumer
from workerd.errors import Trouble
from workerd.job import BadJob, Delivery, Job, Outcome, Place, Report
from workerd.ledger import Ledger, Rejoined, Run, Settle
from workerd.publisher import Publisher
from workerd.retry import Verdict, backoff, judge
from workerd.settings import Settings

#: Seconds for the broker to prove, at the end of a drain, that it has read our acks.
CLOSE_TIMEOUT = 15.0
#: Seconds for one last attempt to settle what ended while the broker was away.
RECLAIM_TIMEOUT = 5.0
#: Seconds between two renewals of the status line.
STATUS_INTERVAL = 1.0
#: Of sysexits.h: "temporary failure"; a job that ends with it fails without a warning.
EX_TEMPFAIL = 75


class Handler(Protocol):
    """What runs jobs of one type."""

    async def run(self, job: Job, stop: asyncio.Future[None]) -> Report:
        """Run the job; when ``stop`` is done, interrupt it. Raises nothing on the job's account."""


class Notifier(Protocol):
    """Who is told how the daemon is doing: systemd."""

    def ready(self) -> None: ...
    def status(self, text: str) -> None: ...
    def stopping(self) -> None: ...
    def extend(self, seconds: float) -> None: ...
    async def beat(self) -> None:
        """Feed the watchdog, for as long as the loop that runs this makes progress."""


#: Called with broker, trouble and the seconds until the next attempt.
OnOutage = Callable[[str, Trouble, float], None]


class Connect(Protocol):
    """Makes an endless supply of connections; setting ``wake`` cuts a pause short."""

    def __call__(
        self, purpose: str, on_outage: OnOutage, wake: asyncio.Event
    ) -> AsyncIterator[Link]: ...


class Worker:
    """Consumes, runs and settles jobs until `stop` is called; see `run`."""

    def __init__(
        self,
        settings: Settings,
        handlers: Mapping[str, Handler],
        place: Place,
        connect: Connect,
        notifier: Notifier,
    ) -> None:
        self.settings = settings
        self.handlers = handlers
        self.place = place
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        #: What the last failed attempt to reach the broker said; "" while connected.
        self.outage = ""
        self._connect = connect
        self._notifier = notifier
        queues = {name: settings.queues[name] for name in settings.worker.queues}
        self.ledger = Ledger({name: queue.concurrency for name, queue in queues.items()})
        self.publisher = Publisher()
        self.consumer = Consumer(
            settings,
            f"workerd@{place.instance}.{place.host}",
            on_open=self._opened,
            on_message=self._delivered,
            on_lost=self._lost,
            on_retired=self._retired,
            wanted=lambda: not self.ledger.draining or self.ledger.owes(),
        )
        #: Every open channel on which a delivery may still have to be settled, by serial.
        self._channels: dict[int, Channel] = {}
        #: Those of them whose consumer the broker has cancelled.
        self._retiring: set[Channel] = set()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        #: Done when running jobs must end: the drain's deadline has come.
        self._interrupt: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Set whenever something happened that a drain may be waiting for.
        self._changed = asyncio.Event()
        self._attempt_failed = asyncio.Event()
        #: Set to make the next attempt to connect come now.
        self._wake = asyncio.Event()
        self._connected_at = 0.0
        self._deadline = 0.0
        self._status_timer: asyncio.TimerHandle | None = None
        self._performing: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Drain and return from `run`. Called again, it cuts the drain short."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()
        self._changed.set()

    async def run(self) -> None:
        """Startup, work, shutdown."""
        ready_wait = self.settings.worker.ready_wait
        consume = self._connect("consume", self._consumer_outage, self._wake)
        publish = self._connect("publish", self._publisher_outage, asyncio.Event())
        async with asyncio.TaskGroup() as self._tasks:
            background = [
                self._tasks.create_task(self.consumer.run(consume), name="consumer"),
                self._tasks.create_task(self.publisher.run(publish), name="publisher"),
                self._tasks.create_task(self._grow_older(), name="memory"),
                self._tasks.create_task(self._watch_ages(), name="ages"),
                self._tasks.create_task(self._notifier.beat(), name="watchdog"),
            ]
            await first(self.consumer.consuming.wait(), self._stop.wait(), timeout=ready_wait)
            self._notifier.status(self.status())
            self._notifier.ready()
            log.event("ready")
            await self._stop.wait()
            await self._drain()
            for task in (*background, *self._performing):
                task.cancel()

    async def _drain(self) -> None:
        """Shutdown, line by line."""
        self._deadline = asyncio.get_running_loop().time() + self.settings.worker.drain_timeout
        log.event("draining", running=len(self.ledger.running), seconds=self._time_left())
        self._notifier.stopping()
        # From here on nothing starts; what still arrives is held.
        self.ledger.drain()
        self._show_status()
        # Messages come until cancel-ok. Given back before it, the broker would hand them
        # straight to us again.
        await self._before_deadline(self.consumer.cancel())
        self._give_back_unstarted()
        # Each of the running jobs is settled as it ends.
        await self._before_deadline(self._runs_end())
        # The late ones get SIGTERM, their grace, SIGKILL, and go back unharmed.
        self._interrupt.set_result(None)
        grace = max((h.kill_grace for h in self.settings.handlers.values()), default=0.0)
        await first(self._runs_end(), timeout=grace + 5.0)
        # What ended while the broker was away can be settled only on a new connection.
        await self._reclaim()
        await first(self.consumer.cancel(), timeout=CLOSE_TIMEOUT)
        self._give_back_unstarted()
        # Without these answers nobody knows whether the last acks were read.
        await self.consumer.close(list(self._channels.values()), CLOSE_TIMEOUT)
        await self.publisher.close(timeout=2.0)
        log.event("drained", unfinished=len(self.ledger.running))

    async def _reclaim(self) -> None:
        """Wait for redeliveries of what is still owed to the broker: one attempt, a few seconds."""
        connected_for = asyncio.get_running_loop().time() - self._connected_at
        if not self.ledger.owes() or (not self.outage and connected_for > RECLAIM_TIMEOUT):
            return
        self._attempt_failed = asyncio.Event()
        self._wake.set()
        await first(
            self._until(lambda: not self.ledger.owes()),
            self._attempt_failed.wait(),
            self._hurry.wait(),
            timeout=RECLAIM_TIMEOUT,
        )

    async def _runs_end(self) -> None:
        await self._until(lambda: not self.ledger.running)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _before_deadline(self, work: Awaitable[None]) -> None:
        """Wait for this work, but only until the drain's deadline, or a second signal."""
        await first(work, self._hurry.wait(), timeout=max(0.0, self._time_left()))

    def _time_left(self) -> float:
        return self._deadline - asyncio.get_running_loop().time()

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
            order = self.ledger.finished(run, verdict)
            self._count(job, verdict)
            if order:
                self._settle(order)
            else:
                log.event("verdict kept", verdict=verdict.value)  # for the redelivery
        self._start_next(job.queue)

    async def _execute(self, job: Job) -> Report:
        """Give the job to its handler; wait here for as long as the handler cannot run at all."""
        try:
            handler = self._handler_for(job)
        except BadJob as bad:
            return Report(Outcome.REJECTED, bad.reason, error=str(bad))
        known = ""
        for delay in backoff(1.0, 60.0):
            try:
                report = await handler.run(job, self._interrupt)
            except Exception:
                report = Report(Outcome.UNAVAILABLE, "bug", error=traceback.format_exc())
            if report.outcome is not Outcome.UNAVAILABLE:
                return report
            if report.error != known:
                log.error("handler unavailable", reason=report.reason, error=report.error)
            known = report.error
            if await self._interrupted_within(delay):
                break
        return Report(Outcome.INTERRUPTED, "drain")

    def _handler_for(self, job: Job) -> Handler:
        if job.fault:
            raise job.fault
        name = job.type or self.settings.queues[job.queue].default_handler
        if name is None:
            raise BadJob("unknown-type", f"no type, and queue {job.queue} has no default_handler")
        handler = self.handlers.get(name)
        if handler is None:
            raise BadJob("unknown-type", f"no handler is named {name!r}")
        limit = self.settings.handlers[name].max_body
        if len(job.body) > limit:
            raise BadJob("too-large", f"the body has {len(job.body)} bytes; max_body is {limit}")
        return handler

    async def _bury(self, job: Job, report: Report) -> Verdict:
        """Bring a copy to the dead letters; returns when the broker has confirmed it.

        Until then the job stays unacknowledged, and a drain gives it back.
        """
        if job.fault and job.queue in self.consumer.dead_letters:
            return Verdict.REJECT
        letter, dropped = jobs.dead_letter(job, report, self.place, time.time())
        if dropped:
            log.warning("headers dropped", names=", ".join(dropped))
        known = ""
        for delay in backoff(0.5, self.settings.broker.reconnect_max):
            publishing = asyncio.ensure_future(
                self.publisher.publish("", topology.dead(job.queue), letter)
            )
            await asyncio.wait({publishing, self._interrupt}, return_when=asyncio.FIRST_COMPLETED)
            if not publishing.done():
                publishing.cancel()
                break
            trouble = publishing.exception()
            if trouble is None:
                log.warning("dead letter", reason=report.reason, to=topology.dead(job.queue))
                return Verdict.DEAD
            if not isinstance(trouble, Trouble):
                raise trouble
            if str(trouble) != known:
                log.warning("dead letter refused", text=str(trouble))
            known = str(trouble)
            if await self._interrupted_within(delay):
                break
        return Verdict.RETURN

    def _settle(self, order: Settle) -> None:
        """The one place where a verdict becomes AMQP."""
        channel = self._channels[order.delivery.channel]
        tag = order.delivery.tag
        match order.verdict:
            case Verdict.DONE | Verdict.DEAD:
                channel.ack(tag)
            case Verdict.RETURN:
                channel.give_back(tag)
            case Verdict.REJECT:
                channel.reject(tag)
        self._close_retired()

    # What the broker tells: called synchronously from its callbacks.

    def _opened(self, channel: Channel) -> None:
        self._channels[channel.serial] = channel
        self.ledger.opened(channel.serial)
        self.outage = ""
        self._connected_at = asyncio.get_running_loop().time()
        self._touch()

    def _delivered(self, queue: str, channel: Channel, incoming: Incoming) -> None:
        job = jobs.decode(incoming.message, queue, incoming.redelivered)
        now = asyncio.get_running_loop().time()
        decision = self.ledger.delivered(Delivery(channel.serial, incoming.tag, now, job))
        match decision:
            case Run():
                self._begin(decision)
            case Settle():
                log.event("settled from memory", job_id=job.id, queue=queue, attempt=job.attempt)
                self._settle(decision)
            case Rejoined(run):
                log.event("rejoined", job_id=run.job.id, queue=queue, attempt=job.attempt)
                self._close_retired()
        self._touch()

    def _lost(self, channel: Channel) -> None:
        self.ledger.lost(channel.serial)
        self._channels.pop(channel.serial, None)
        self._retiring.discard(channel)
        self._touch()

    def _retired(self, channel: Channel) -> None:
        # A delivery so old was taken back by the broker: never settle it here again.
        stale_before = asyncio.get_running_loop().time() - 0.95 * self.consumer.ack_timeout
        for delivery in self.ledger.retired(channel.serial, stale_before):
            channel.give_back(delivery.tag)
        self._retiring.add(channel)
        self._close_retired()

    def _consumer_outage(self, broker: str, trouble: Trouble, delay: float) -> None:
        if not self.outage:
            log.warning("disconnected", broker=broker, text=str(trouble))
        else:
            log.debug("unreachable", broker=broker, text=str(trouble), retry_in=round(delay, 1))
        verb = "reconnecting to" if self._connected_at else "waiting for broker"
        self.outage = f"{verb} {broker} in {delay:.0f}s: {trouble}"
        self._attempt_failed.set()
        self._touch()

    def _publisher_outage(self, broker: str, trouble: Trouble, delay: float) -> None:
        if not self.outage:  # otherwise one warning about this broker is enough
            log.warning("publisher disconnected", broker=broker, text=str(trouble))

    # Small verbs.

    def _begin(self, run: Run) -> None:
        task = self._tasks.create_task(self.perform(run), name=f"job {run.job.id}")
        self._performing.add(task)
        task.add_done_callback(self._performing.discard)
        self._touch()

    def _start_next(self, queue: str) -> None:
        run = self.ledger.next(queue)
        if run:
            self._begin(run)
        self._touch()

    def _close_retired(self) -> None:
        for channel in [c for c in self._retiring if not self.ledger.holds(c.serial)]:
            self._retiring.discard(channel)
            self._tasks.create_task(self._close_channel(channel), name=f"close {channel.serial}")

    @staticmethod
    async def _close_channel(channel: Channel) -> None:
        try:
            await channel.close()
        except TimeoutError:
            channel.link.abort("channel close was not answered")

    def _give_back_unstarted(self) -> None:
        for delivery in self.ledger.unstarted():
            self._channels[delivery.channel].give_back(delivery.tag)

    async def _interrupted_within(self, seconds: float) -> bool:
        """Wait, but no longer than until running jobs must end; True when that has come."""
        await asyncio.wait({self._interrupt}, timeout=seconds)
        return self._interrupt.done()

    async def _grow_older(self) -> None:
        """Forget finished jobs once they have been remembered for ``remember``."""
        while True:
            await asyncio.sleep(self.settings.worker.remember / 3)
            self.ledger.age()

    async def _watch_ages(self) -> None:
        """Warn before the broker loses patience with a job, at half and at 4/5 of its time."""
        warned: dict[Run, float] = {}
        while True:
            limit = self.consumer.ack_timeout
            await asyncio.sleep(limit / 20)
            now = asyncio.get_running_loop().time()
            warned = {run: part for run, part in warned.items() if run in self.ledger.running}
            for run in self.ledger.running:
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

    def _count(self, job: Job, verdict: Verdict) -> None:
        if verdict is Verdict.DONE:
            self.done[job.queue] += 1
        elif verdict.final:
            self.failed[job.queue] += 1

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

    def _touch(self) -> None:
        """Something changed: wake a drain, and renew the status line within a second."""
        self._changed.set()
        if self._status_timer is None:
            loop = asyncio.get_running_loop()
            self._status_timer = loop.call_later(STATUS_INTERVAL, self._show_status)

    def _show_status(self) -> None:
        if self._status_timer:
            self._status_timer.cancel()
        self._status_timer = None
        self._notifier.status(self.status())
        if self.ledger.draining:
            # What is left of the drain, the grace of the last jobs, and the closing.
            self._notifier.extend(max(0.0, self._time_left()) + 60.0)
            self._touch()

    def status(self) -> str:
        """One line for operators."""
        running = len(self.ledger.running)
        if self.ledger.draining:
            return f"draining {running} jobs, {max(0.0, self._time_left()):.0f}s left"
        if self.outage:
            return self.outage + (f"; {running} running" if running else "")
        parts = []
        consuming = sorted(self.consumer.channels)
        if consuming:
            slots = sum(self.settings.queues[queue].concurrency for queue in consuming)
            parts.append(
                f"consuming {', '.join(consuming)}: {running}/{slots} running, "
                f"{self.done.total()} done, {self.failed.total()} failed; {self.consumer.broker}"
            )
        parts += [f"{queue} paused: {text}" for queue, text in sorted(self.consumer.paused.items())]
        if self.publisher.blocked:
            parts.append(f"publishing blocked: {self.publisher.blocked}")
        return "; ".join(parts) or "connecting"


async def first(*work: Awaitable[object], timeout: float | None = None) -> None:
    """Wait until one of these is done, or the time is up; the others are cancelled."""
    tasks = {asyncio.ensure_future(each) for each in work}
    done, pending = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
