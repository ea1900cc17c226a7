"""The worker: the shell around the ledger. Start reading at `Worker.perform`, the life of a job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable

from workerd import log
from workerd.aio import first
from workerd.broker.channel import Channel
from workerd.broker.codec import Incoming
from workerd.config.model import Retry, Settings
from workerd.core.counters import Counters
from workerd.core.decisions import Rejoined, Settle
from workerd.core.decode import decode
from workerd.core.dedup import Dedup
from workerd.core.handler import Registry
from workerd.core.job import Delivery, Job, Run
from workerd.core.ledger import Ledger
from workerd.core.recent import RecentOutcomes
from workerd.core.republish import Origin
from workerd.core.retry import Decision, Facts, decide, requeue
from workerd.ids import new_id
from workerd.worker.broker_ping import BrokerPing
from workerd.worker.changes import Changes
from workerd.worker.channels import Channels
from workerd.worker.consumer import Connect, Consumer
from workerd.worker.drain import Drain
from workerd.worker.executor import Executor
from workerd.worker.inspect import Inspector
from workerd.worker.memory_pressure import INTERVAL, MemoryPressure, own_file
from workerd.worker.outbox import Outbox
from workerd.worker.publisher import Publisher
from workerd.worker.queue_depths import QueueDepths
from workerd.worker.status import Notifier, Status, watch_ages
from workerd.worker.stop import Stop
from workerd.worker.subscription import Subscription

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
        self._registry = registry
        self._origin = origin
        self._connect = connect
        self._notifier = notifier
        #: Asking for it takes a system call (Python up to 3.11), at several steps of each job.
        self._loop = asyncio.get_running_loop()
        self._stop = Stop()
        self._changes = Changes(lambda: self._status.touch())
        self._ledger = Ledger(
            _slots(settings),
            dedup,
            lambda job: self._executor.begins_at_once(job),
            lambda job: self._executor.capacity(job),
        )
        self.counters = Counters(settings.handlers)
        self._recent = RecentOutcomes(time.monotonic())
        self._executor = Executor(
            settings, registry, self._ledger, self.counters, self._stop, self.changed
        )
        self._consumer = Consumer(settings, f"workerd@{origin.instance}.{origin.host}", self)
        self.publisher = Publisher()
        self._outbox = Outbox(
            settings, self.publisher, self._consumer, self._stop, self._pause_queues
        )
        self._channels = Channels(self._ledger, self._outbox, self._requeue, self._spawn)
        self._pressure = MemoryPressure(own_file())
        self._ping = BrokerPing(self._consumer)
        self.depths = QueueDepths(self._consumer, lambda: self._ledger.slots.concurrency)
        self.inspector = Inspector(
            self._ledger,
            self._executor,
            self._consumer,
            self._outbox,
            self.publisher,
            self.counters,
            self._recent,
            self._pressure,
            self._ping,
            self._stop,
        )
        self._status = Status(self.inspector, notifier)
        self._drain = Drain(
            self._stop,
            self._ledger,
            registry,
            self._executor,
            self._consumer,
            self._channels,
            self.publisher,
            self._changes,
        )
        self._performing: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Handle | None = None

    async def run(self) -> None:
        """Startup, work, shutdown."""
        async with asyncio.TaskGroup() as self._tasks:
            background = [
                self._spawn(self._consumer.run(self._connect), "consumer"),
                self._spawn(self.publisher.run(self._connect), "publisher"),
                self._spawn(self._grow_older(), "dedup"),
                self._spawn(self._look_again(), "held"),
                self._spawn(watch_ages(self.inspector, self._consumer), "ages"),
                self._spawn(self._watch_memory(), "memory pressure"),
                self._spawn(self._ping.run(), "ping"),
                self._spawn(self._notifier.beat(), "watchdog"),
            ]
            await first(
                self._consumer.consuming.wait(),
                self._stop.wanted.wait(),
                timeout=self.settings.worker.ready_wait,
            )
            if not self._stop.wanted.is_set():
                self._status.show()
                self._notifier.ready()
                log.event("ready")
            await self._stop.wanted.wait()
            await self._drain.run(self.settings, self._notifier, self._status)
            await self._registry.close()
            for task in (*background, *self._performing):
                task.cancel()
            await asyncio.gather(*self._performing, return_exceptions=True)

    async def perform(self, run: Run) -> None:
        """The life of a job: execute, decide, publish what the decision needs, finish, settle."""
        job = run.job
        with log.job_fields(job_id=job.id, job_type=job.type, queue=job.queue, attempt=job.attempt):
            report = await self._executor.execute(run)
            self._ledger.ended(run)
            decision = decide(job, report, self._retry_policy(job), lambda: self._facts(job))
            verdict = await self._outbox.publish(run, decision, report)
            self.counters.settled(job, verdict)
            self._recent.count(verdict, job, report, time.monotonic(), time.time())
            order = self._ledger.finished(run, verdict)
            if order:
                self._channels.settle(order)
            else:
                # For the redelivery; of what never ran there is nothing to say.
                log.event("verdict kept", "info" if report.ran else "debug", verdict=verdict.value)
        self._start_more()

    # What an operator, systemd and the local socket ask for.

    def stop(self) -> None:
        """Drain and return from `run`. Called again, it cuts the drain short."""
        self._registry.hold()
        self._stop.request()
        self.changed()

    @property
    def stopping(self) -> bool:
        """Whether a stop is wanted: nothing new is taken on."""
        return self._stop.wanted.is_set()

    def reload(self, settings: Settings) -> None:
        """From now on work with these; jobs that run keep the old."""
        self.settings = settings
        self._executor.configure(settings)
        self._outbox.configure(settings)
        self._ledger.slots.configure(_slots(settings))
        self._consumer.reload(settings)
        self.counters.know(settings.handlers)
        self._start_more()

    def reloaded(self, problems: int) -> None:
        """A reload found so many problems in the configuration: then the old one is in force."""
        self.inspector.reload_problems = problems
        self._status.show()

    def log_state(self) -> None:
        """Everything that is in hand, into the log."""
        self._status.log_state()

    def cancel(self, job_id: str, owner: int | None) -> list[Run]:
        """See `Executor.cancel`."""
        return self._executor.cancel(job_id, owner)

    def runs_of(self, job_id: str) -> list[Run]:
        """The runs of this job that are with their handler."""
        return [run for run in self._executor.progress if run.job.id == job_id]

    @property
    def paused_by_operator(self) -> frozenset[str]:
        return frozenset(self._consumer.operator_paused)

    def pause_by_operator(self, queues: Iterable[str]) -> None:
        """Consume nothing for these queues, as an operator wishes, and for all others."""
        self._consumer.pause_by_operator(queues)
        self._pause_queues()

    def comes_due(self, queue: str) -> bool:
        """Whether delayed jobs of a queue have somewhere to come due, as far as is known here."""
        return self._consumer.comes_due(queue)

    # What the consumer reports: called synchronously from the broker's callbacks.

    @property
    def wanted(self) -> bool:
        """In a drain, a connection is of use only for what is still owed to the broker."""
        return not self._ledger.draining or self._ledger.owes()

    def connected(self) -> None:
        self.publisher.wake.set()

    def opened(self, channel: Channel) -> None:
        self._channels.opened(channel)

    def delivered(self, subscription: Subscription, channel: Channel, incoming: Incoming) -> None:
        queue = subscription.queue.name
        # None after a reload without this queue: what still comes from it goes back soon.
        configured = self.settings.queues.get(queue)
        default = configured.default_handler if configured else None
        job = decode(incoming.message, queue, incoming.redelivered, default, time.time())
        now = self._loop.time()
        delivery = Delivery(channel.serial, incoming.tag, now, job, delayed=subscription.due)
        self._act(self._ledger.delivered(delivery))
        self.changed()

    def _act(self, decision: Run | Settle | Rejoined | None) -> None:
        """Do what the ledger has decided over a delivery."""
        match decision:
            case Run():
                self._begin(decision)
            case Settle(delivery):
                job = delivery.job
                log.event("settled again", job_id=job.id, queue=job.queue)
                self._channels.settle(decision)
            case Rejoined(run):
                log.event("rejoined", job_id=run.job.id, queue=run.job.queue)
                self._channels.close_retired()

    def lost(self, channel: Channel) -> None:
        self._executor.withdraw(channel.serial)
        self._channels.lost(channel)
        self._start_more()  # one that had to run alone first may be gone

    def retired(self, channel: Channel) -> None:
        self._executor.withdraw(channel.serial)
        # A delivery so old was taken back by the broker: never settle it here again.
        stale_before = self._loop.time() - 0.95 * self._consumer.ack_timeout
        self._channels.leave(channel, self._ledger.retired(channel.serial, stale_before))
        self._start_more()  # one that had to run alone first may be gone

    def detached(self, channel: Channel) -> None:
        self._executor.withdraw(channel.serial)
        self._channels.leave(channel, self._ledger.detached(channel.serial))
        self._start_more()

    def idle(self, channel: Channel) -> bool:
        return self._ledger.idle(channel.serial)

    def changed(self) -> None:
        self._changes.happen()

    # What a decision needs to know.

    def _retry_policy(self, job: Job) -> Retry:
        handler = self.settings.handlers.get(str(job.type))
        return handler.retry if handler else Retry()

    def _facts(self, job: Job) -> Facts:
        intact = job.queue in self._consumer.declarations.intact
        # RabbitMQ 4.0 to 4.2 drop a message of a quorum queue that was declared without a limit
        # at its 21st return, of whatever kind; later ones do not count returns like ours.
        counts_returns = not intact and (4,) <= self._consumer.version < (4, 3)
        return Facts(
            now=time.time(),
            copy_id=new_id(),
            origin=self._origin,
            dead_letters=intact,
            may_drop=counts_returns and job.returns >= NEAR_DELIVERY_LIMIT,
            pause=self._executor.pause_of(job),
        )

    def _requeue(self, delivery: Delivery) -> Decision:
        return requeue(delivery.job, self._facts(delivery.job))

    # Starting what may start.

    def _begin(self, run: Run) -> None:
        async def guarded() -> None:
            try:
                await self.perform(run)
            except Exception as bug:  # noqa: BLE001 - of workerd: it is to end the daemon
                self._spawn(_raise(bug), "bug")
            finally:
                self._performing.discard(task)

        # Not in the group, which takes as long to keep a task as the loop to run it.
        task = self._loop.create_task(guarded())
        self._performing.add(task)

    def _start_more(self) -> None:
        """Start what may start now: once for all that ends in this turn of the loop."""
        if self._starting is None:
            self._starting = self._loop.call_soon(self._start_all)

    def _start_all(self) -> None:
        self._starting = None
        if self._ledger.slots.has_free_slot:
            self._registry.hand_out()
        while decision := self._ledger.next():
            self._act(decision)
        self.changed()

    def _pause_queues(self) -> None:
        """Start nothing of the queues whose copies the broker refuses, or that an operator paused.

        Of the latter, some may still come until the broker knows.
        """
        refused = {run.job.queue for run in self._outbox.refused}
        self._ledger.slots.paused = refused | self._consumer.operator_paused
        self._registry.recall()
        self._start_more()

    # In the background.

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """A task with a name; one that fails ends the worker."""
        return self._tasks.create_task(work, name=name)

    async def _grow_older(self) -> None:
        """Forget finished jobs once they have been remembered for ``remember``."""
        while True:
            await asyncio.sleep(max(1.0, self.settings.worker.remember / 3))
            self._ledger.age()

    async def _look_again(self) -> None:
        """See what other instances have made of the jobs that came here as redeliveries."""
        while True:
            await self._changes.until(lambda: bool(self._ledger.held))
            await asyncio.sleep(LOOK_INTERVAL)
            for decision in self._ledger.look_again(self._loop.time()):
                self._act(decision)

    async def _watch_memory(self) -> None:
        """Start one job at a time while the kernel stalls those that run for want of memory."""
        while True:
            await self._changes.until(lambda: bool(self._ledger.running))
            await asyncio.sleep(INTERVAL)
            if self._pressure.look():
                if self._pressure.short:
                    log.warning("memory short")
                else:
                    log.event("memory enough")
                self._ledger.slots.one_at_a_time = self._pressure.short
                self._registry.recall()
                self._start_more()


async def _raise(error: BaseException) -> None:
    raise error


def _slots(settings: Settings) -> dict[str, int]:
    """How many jobs of each consumed queue may run at once."""
    return {name: settings.queues[name].concurrency for name in settings.worker.queues}
