"""The drain: how a worker comes to rest. `Drain.run` is the whole of it, line by line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from workerd import log
from workerd.aio import first
from workerd.config.model import Settings
from workerd.core.handler import Registry
from workerd.core.ledger import Ledger
from workerd.worker.changes import Changes
from workerd.worker.channels import Channels
from workerd.worker.consumer import Consumer
from workerd.worker.executor import Executor
from workerd.worker.publisher import Publisher
from workerd.worker.status import Notifier, Status
from workerd.worker.stop import Stop

#: Seconds for the broker to prove, at the end, that it has read our acks.
CLOSE_TIMEOUT = 15.0
#: The same after a second signal.
HURRIED_CLOSE_TIMEOUT = 2.0
#: Seconds for a new connection to bring back what was running or ended without it.
RECLAIM_TIMEOUT = 5.0
#: Seconds beyond its grace that a job's process group may take to die of SIGKILL.
KILL_TIMEOUT = 5.0


class Drain:
    """Brings the parts of a worker to rest once a stop is wanted."""

    def __init__(
        self,
        stop: Stop,
        ledger: Ledger,
        registry: Registry,
        executor: Executor,
        consumer: Consumer,
        channels: Channels,
        publisher: Publisher,
        changes: Changes,
    ) -> None:
        self._stop = stop
        self._ledger = ledger
        self._registry = registry
        self._executor = executor
        self._consumer = consumer
        self._channels = channels
        self._publisher = publisher
        self._changes = changes

    async def run(self, settings: Settings, notifier: Notifier, status: Status) -> None:
        """Drain, with the time limits of these settings."""
        timeout = settings.worker.drain_timeout
        self._stop.begin(timeout)
        log.event("draining", running=self._ledger.slots.in_use, seconds=timeout)
        notifier.stopping()
        # From here on nothing starts; what still arrives is held.
        self._ledger.drain()
        status.show()
        # What has not started goes back; each of the running jobs is settled as it ends.
        await self._before_deadline(self._runs_end())
        # The late ones get SIGTERM, their grace, SIGKILL, and go back unharmed.
        self._stop.interrupt.set_result(None)
        self._executor.interrupt()
        grace = max((each.kill_grace for each in settings.handlers.values()), default=0.0)
        await first(self._runs_end(), timeout=grace + KILL_TIMEOUT)
        # What ended while the broker was away can be settled only on a new connection.
        await self._reclaim()
        # A broker that does not answer is not waited for beyond reason.
        await first(self._take_leave(), self._patience())
        log.event("drained", unfinished=len(self._ledger.running))

    async def _reclaim(self) -> None:
        """Wait for redeliveries of what is still owed: one attempt to connect, a few seconds."""
        if not self._ledger.owes():
            return
        if not self._consumer.outage:
            await self._redelivered()
            return
        self._consumer.attempt_failed.clear()
        self._consumer.wake.set()
        await first(
            self._changes.until(lambda: not self._ledger.owes()),
            self._consumer.attempt_failed.wait(),
            self._stop.hurry.wait(),
            timeout=RECLAIM_TIMEOUT,
        )

    async def _take_leave(self) -> None:
        # A connection made for `_reclaim` consumes like any other.
        await self._return_unstarted()
        # Without these answers nobody knows whether the last acks were read.
        await self._consumer.close(self._channels.open)
        await self._publisher.close(timeout=2.0)

    async def _patience(self) -> None:
        """What the broker may take for its last answers."""
        hurry = asyncio.ensure_future(self._stop.hurry.wait())
        await asyncio.wait({hurry}, timeout=CLOSE_TIMEOUT - HURRIED_CLOSE_TIMEOUT)
        hurry.cancel()
        await asyncio.sleep(HURRIED_CLOSE_TIMEOUT)
        log.warning("close timed out")

    async def _return_unstarted(self) -> None:
        """Stop consuming, and give back what has not started.

        Messages come until cancel-ok. Given back before it, the broker would hand them
        straight to us again.
        """
        await self._consumer.cancel()
        self._registry.drain()
        # What came before the others goes back before them.
        await self._changes.until(lambda: self._executor.all_have_begun)
        await self._channels.requeue(self._ledger.unstarted())

    async def _runs_end(self) -> None:
        """Wait until no job runs, and give back at once what has not started.

        That is so for a connection made meanwhile as well: it is of use only to settle
        those that run.
        """
        ledger, consumer = self._ledger, self._consumer
        if not consumer.channels:
            self._registry.drain()
        while ledger.running:
            await self._changes.until(lambda: not ledger.running or bool(consumer.channels))
            if consumer.channels:
                await self._redelivered()
                await self._return_unstarted()

    async def _redelivered(self) -> None:
        """Wait until a connection that is still new has brought back what is owed."""
        ledger, consumer = self._ledger, self._consumer
        age = asyncio.get_running_loop().time() - consumer.connected_at
        await first(
            self._changes.until(lambda: not ledger.owes() or bool(consumer.outage)),
            self._stop.hurry.wait(),
            timeout=max(0.0, RECLAIM_TIMEOUT - age),
        )

    async def _before_deadline(self, work: Awaitable[None]) -> None:
        """Wait for this work, but only until the deadline, or a second signal."""
        await first(work, self._stop.hurry.wait(), timeout=self._stop.seconds_left)
