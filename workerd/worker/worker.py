"""The worker: the shell around the ledger. Start reading at `Worker.perform`, the life of a job."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from workerd import log
from workerd.aio import first
from workerd.broker.channel import Channel
from workerd.broker.codec import Incoming
from workerd.config.model import Retry, Settings
from workerd.core.counters import Counters
from workerd.core.decode import decode
from workerd.core.dedup import Dedup
from workerd.core.handler import Registry
from workerd.core.job import Delivery, Job, Report, Run
from workerd.core.ledger import Ledger, Rejoined, Settle
from workerd.core.republish import Origin
from workerd.core.retry import Verdict, delay, judge, limit
from workerd.errors import BrokerError
from workerd.worker.consumer import Connect, Consumer, Subscription
from workerd.worker.drain import Drain
from workerd.worker.executor import Executor
from workerd.worker.memory_pressure import INTERVAL, MemoryPressure, own_file
from workerd.worker.outbox import Outbox
from workerd.worker.status import Notifier, Status, watch_ages

#: Seconds between two looks at what other instances make of a job that is held here.
LOOK_INTERVAL = 0.1
#: A message that has come back so often is published anew where the broker might drop it at
#: its 21st return.
NEAR_DELIVERY_LIMIT = 10


class Worker:
    """Consumes, runs and settles jobs until `stop` is called; see `run`."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        origin: Origin,
        connect: Connect,
        notifier: Notifier,
        dedup: Dedup | None = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.notifier = notifier
        self.attempts = Executor(self)
        self.ledger = Ledger(
            _slots(settings), dedup, self.attempts.begins_at_once, self.attempts.capacity
        )
        self.consumer = Consumer(settings, f"workerd@{origin.instance}.{origin.host}", self)
        self.drain = Drain(self)
        self.outbox = Outbox(self, origin)
        self.pressure = MemoryPressure(own_file())
        self.status = Status(self)
        self.counters = Counters(settings.handlers)
        #: Jobs that came over the local socket and that the broker has not confirmed yet.
        self.submissions = 0
        #: Every open channel on which a delivery may still have to be settled, by serial.
        self.channels: dict[int, Channel] = {}
        self._connect = connect
        #: The channels among them that consume no more.
        self._retiring: set[Channel] = set()
        #: Set whenever something happened that somebody may be waiting for.
        self._happened = asyncio.Event()
        #: Asking for it takes a system call (Python up to 3.11), at several steps of each job.
        self.loop = asyncio.get_running_loop()
        self._performing: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Handle | None = None

    async def run(self) -> None:
        """Startup, work, shutdown."""
        async with asyncio.TaskGroup() as self._tasks:
            background = [
                self._tasks.create_task(self.consumer.run(self._connect), name="consumer"),
                self._tasks.create_task(self.outbox.publisher.run(self._connect), name="publisher"),
                self._tasks.create_task(self._grow_older(), name="memory"),
                self._tasks.create_task(self._look_again(), name="held"),
                self._tasks.create_task(watch_ages(self.ledger, self.consumer), name="ages"),
                self._tasks.create_task(self._watch_memory(), name="memory pressure"),
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
            await self.registry.close()
            for task in (*background, *self._performing):
                task.cancel()
            await asyncio.gather(*self._performing, return_exceptions=True)

    def stop(self) -> None:
        """Drain and return from `run`. Called again, it cuts the drain short."""
        self.registry.hold()
        self.drain.request()
        self.changed()

    def reload(self, settings: Settings) -> None:
        """From now on work with these; jobs that run keep the old."""
        self.settings = settings
        self.attempts.configure()
        self.ledger.slots.configure(_slots(settings))
        self.consumer.reload(settings)
        self.counters.know(settings.handlers)
        self._start_more()

    async def perform(self, run: Run) -> None:
        """The life of a job, from its start to the order that settles its delivery."""
        job = run.job
        with log.job_fields(job_id=job.id, job_type=job.type, queue=job.queue, attempt=job.attempt):
            report = await self.attempts.make(run)
            self.ledger.ended(run)
            verdict = await self._carry_out(self._judge(job, report), run, report)
            self.counters.settled(job, verdict)
            self.status.count(verdict, job, report)
            order = self.ledger.finished(run, verdict)
            if order:
                self._settle(order)
            else:
                # For the redelivery; there is none to tell of where nothing happened.
                log.event("verdict kept", "info" if report.ran else "debug", verdict=verdict.value)
        self._start_more()

    def _retry_policy(self, job: Job) -> Retry:
        handler = self.settings.handlers.get(str(job.type))
        return handler.retry if handler else Retry()

    def _judge(self, job: Job, report: Report) -> Verdict:
        verdict = judge(report.outcome, job.attempt, limit(job, self._retry_policy(job)))
        intact = job.queue in self.consumer.declarations.intact
        if verdict is Verdict.DEAD and job.fault and intact:
            return Verdict.REJECT  # the broker moves the untouched original
        return verdict

    async def _carry_out(self, verdict: Verdict, run: Run, report: Report) -> Verdict:
        """Publish the copy that a verdict needs; returns the verdict that it has come to."""
        job = run.job
        match verdict:
            case Verdict.RETRY:
                asked = report.retry_after
                seconds = delay(job.attempt, self._retry_policy(job)) if asked is None else asked
                confirmed = await self.outbox.retry(run, seconds, report)
            case Verdict.POSTPONE:
                seconds = self.attempts.seconds_put_off(job)
                confirmed = await self.outbox.postpone(run, max(1.0, seconds))
            case Verdict.DEAD:
                confirmed = await self.outbox.bury(run, report)
            case Verdict.RETURN if self._near_delivery_limit(job) and await self.outbox.renew(job):
                return Verdict.POSTPONE
            case _:
                return verdict
        if confirmed:
            return verdict
        return Verdict.SPEND if report.ran and verdict is not Verdict.POSTPONE else Verdict.RETURN

    def _near_delivery_limit(self, job: Job) -> bool:
        """Whether the broker might drop the job because it returns too often.

        RabbitMQ 4.0 to 4.2 drop a message of a quorum queue that was declared without a limit
        at its 21st return, of whatever kind; later ones do not count returns like ours.
        """
        return (
            job.returns >= NEAR_DELIVERY_LIMIT
            and job.queue not in self.consumer.declarations.intact
            and (4,) <= self.consumer.version < (4, 3)
        )

    def _settle(self, order: Settle) -> None:
        """The one place where a verdict becomes AMQP."""
        channel = self.channels[order.delivery.channel]
        tag = order.delivery.tag
        match order.verdict:
            case Verdict.DONE | Verdict.RETRY | Verdict.POSTPONE | Verdict.DEAD:
                channel.ack(tag)
            case Verdict.RETURN | Verdict.SPEND:
                channel.requeue(tag)
            case Verdict.REJECT:
                channel.reject(tag)
        self._close_retired()

    async def requeue(self, deliveries: Iterable[Delivery]) -> None:
        """Return deliveries that have not started, in this order."""
        for delivery in deliveries:
            renewed = self._near_delivery_limit(delivery.job) and await self.outbox.renew(
                delivery.job
            )
            channel = self.channels.get(delivery.channel)
            if channel:
                (channel.ack if renewed else channel.requeue)(delivery.tag)

    def pause_by_operator(self, queues: Iterable[str]) -> None:
        """Consume nothing for these queues, as an operator wishes, and for all others."""
        self.consumer.pause_by_operator(queues)
        self.pause_queues()

    def pause_queues(self) -> None:
        """Start nothing of the queues whose copies the broker refuses, or that are held back.

        Of the latter, some may still come until the broker knows.
        """
        refused = {run.job.queue for run in self.outbox.refused}
        self.ledger.slots.paused = refused | self.consumer.operator_paused
        self.registry.recall()
        self._start_more()

    # What the consumer tells: called synchronously from the broker's callbacks.

    @property
    def wanted(self) -> bool:
        """In a drain, a connection is of use only for what is still owed to the broker."""
        return not self.ledger.draining or self.ledger.owes()

    def opened(self, channel: Channel) -> None:
        self.channels[channel.serial] = channel
        # Once the broker has forgotten a job, nobody but the run log knows that it is finished.
        channel.before_acks = self.ledger.dedup.flush
        self.ledger.opened(channel.serial)

    def delivered(self, subscription: Subscription, channel: Channel, incoming: Incoming) -> None:
        queue = subscription.queue.name
        # None after a reload without this queue: what still comes from it goes back soon.
        configured = self.settings.queues.get(queue)
        default = configured.default_handler if configured else None
        job = decode(incoming.message, queue, incoming.redelivered, default, time.time())
        now = self.loop.time()
        delivery = Delivery(channel.serial, incoming.tag, now, job, delayed=subscription.due)
        self._act(self.ledger.delivered(delivery))
        self.changed()

    def _act(self, decision: Run | Settle | Rejoined | None) -> None:
        """Do what the ledger has decided over a delivery."""
        match decision:
            case Run():
                self._begin(decision)
            case Settle(delivery):
                job = delivery.job
                log.event("settled again", job_id=job.id, queue=job.queue)
                self._settle(decision)
            case Rejoined(run):
                log.event("rejoined", job_id=run.job.id, queue=run.job.queue)
                self._close_retired()

    def lost(self, channel: Channel) -> None:
        self.attempts.withdraw(channel.serial)
        in_order = channel.ended_in_order and not self.ledger.holds(channel.serial)
        (self.ledger.closed if in_order else self.ledger.lost)(channel.serial)
        self.channels.pop(channel.serial, None)
        self._retiring.discard(channel)
        self._start_more()  # one that had to run alone first may be gone

    def retired(self, channel: Channel) -> None:
        self.attempts.withdraw(channel.serial)
        # A delivery so old was taken back by the broker: never settle it here again.
        stale_before = self.loop.time() - 0.95 * self.consumer.ack_timeout
        self._leave(channel, self.ledger.retired(channel.serial, stale_before))

    def detached(self, channel: Channel) -> None:
        self.attempts.withdraw(channel.serial)
        self._leave(channel, self.ledger.detached(channel.serial))

    def _leave(self, channel: Channel, unstarted: Iterable[Delivery]) -> None:
        """A channel consumes no more: close it when nothing is left to be settled on it."""

        async def leave() -> None:
            await self.requeue(unstarted)
            self._retiring.add(channel)
            self._close_retired()

        self._tasks.create_task(leave(), name=f"leave {channel.serial}")
        self._start_more()  # one that had to run alone first may be gone

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
        async def guarded() -> None:
            try:
                await self.perform(run)
            except Exception as bug:  # noqa: BLE001 - of workerd: it is to end the daemon
                self._tasks.create_task(_raise(bug), name="bug")
            finally:
                self._performing.discard(task)

        # Not in the group, which takes as long to keep a task as the loop to run it.
        task = self.loop.create_task(guarded())
        self._performing.add(task)

    def _start_more(self) -> None:
        """Start what may start now: once for all that ends in this turn of the loop."""
        if self._starting is None:
            self._starting = self.loop.call_soon(self._start_all)

    def _start_all(self) -> None:
        self._starting = None
        if self.ledger.slots.has_free_slot:
            self.registry.hand_out()
        while run := self.ledger.next():
            self._begin(run)
        self.changed()

    def _close_retired(self) -> None:
        for channel in [c for c in self._retiring if not self.ledger.holds(c.serial)]:
            self._retiring.discard(channel)
            self._tasks.create_task(self._close_channel(channel), name=f"close {channel.serial}")

    @staticmethod
    async def _close_channel(channel: Channel) -> None:
        with contextlib.suppress(BrokerError):
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
            for decision in self.ledger.look_again(self.loop.time()):
                self._act(decision)

    async def _watch_memory(self) -> None:
        """Start one job at a time while the kernel stalls those that run for want of memory."""
        while True:
            await self.until(lambda: bool(self.ledger.running))
            await asyncio.sleep(INTERVAL)
            if self.pressure.look():
                if self.pressure.short:
                    log.warning("memory short")
                else:
                    log.event("memory enough")
                self.ledger.slots.one_at_a_time = self.pressure.short
                self.registry.recall()
                self._start_more()


async def _raise(error: BaseException) -> None:
    raise error


def _slots(settings: Settings) -> dict[str, int]:
    """How many jobs of each consumed queue may run at once."""
    return {name: settings.queues[name].concurrency for name in settings.worker.queues}
