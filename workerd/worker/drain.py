"""The drain: how a worker comes to rest. `Drain.run` is the whole of it, line by line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from workerd import log
from workerd.aio import first

if TYPE_CHECKING:
    from workerd.worker.worker import Worker

#: Seconds for the broker to prove, at the end, that it has read our acks.
CLOSE_TIMEOUT = 15.0
#: The same after a second signal.
HURRIED_CLOSE_TIMEOUT = 2.0
#: Seconds for a new connection to bring back what was running or ended without it.
RECLAIM_TIMEOUT = 5.0
#: Seconds beyond its grace that a job's process group may take to die of SIGKILL.
KILL_TIMEOUT = 5.0


class Drain:
    """Not yet wanted, wanted, or in a hurry; one deadline, computed once."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.wanted = asyncio.Event()
        #: A second signal has come: running jobs get no more time.
        self._hurry = asyncio.Event()
        #: Done when running jobs must end; they are told one by one.
        self.interrupt: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deadline = 0.0

    def request(self) -> None:
        """Drain; asked again, be quick about it."""
        if self.wanted.is_set():
            self._hurry.set()
        self.wanted.set()

    async def run(self) -> None:
        worker = self._worker
        ledger = worker.ledger
        timeout = worker.settings.worker.drain_timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        log.event("draining", running=ledger.slots.in_use, seconds=timeout)
        worker.notifier.stopping()
        # From here on nothing starts; what still arrives is held.
        ledger.drain()
        worker.status.show()
        # What has not started goes back; each of the running jobs is settled as it ends.
        await self._before_deadline(self._runs_end())
        # The late ones get SIGTERM, their grace, SIGKILL, and go back unharmed.
        self.interrupt.set_result(None)
        for progress in worker.attempts.progress.values():
            progress.end()
        handlers = worker.settings.handlers.values()
        grace = max((handler.kill_grace for handler in handlers), default=0.0)
        await first(self._runs_end(), timeout=grace + KILL_TIMEOUT)
        # What ended while the broker was away can be settled only on a new connection.
        await self._reclaim()
        # A broker that does not answer is not waited for beyond reason.
        await first(self._take_leave(), self._patience())
        log.event("drained", unfinished=len(ledger.running))

    async def _reclaim(self) -> None:
        """Wait for redeliveries of what is still owed: one attempt to connect, a few seconds."""
        worker = self._worker
        consumer = worker.consumer
        if not worker.ledger.owes():
            return
        if not consumer.outage:
            await self._redelivered()
            return
        consumer.attempt_failed.clear()
        consumer.wake.set()
        await first(
            worker.until(lambda: not worker.ledger.owes()),
            consumer.attempt_failed.wait(),
            self._hurry.wait(),
            timeout=RECLAIM_TIMEOUT,
        )

    async def _take_leave(self) -> None:
        worker = self._worker
        # A connection made for `_reclaim` consumes like any other.
        await self._return_unstarted()
        # Without these answers nobody knows whether the last acks were read.
        await worker.consumer.close(list(worker.channels.values()))
        await worker.outbox.publisher.close(timeout=2.0)

    async def _patience(self) -> None:
        """What the broker may take for its last answers."""
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({hurry}, timeout=CLOSE_TIMEOUT - HURRIED_CLOSE_TIMEOUT)
        hurry.cancel()
        await asyncio.sleep(HURRIED_CLOSE_TIMEOUT)
        log.warning("close timed out")

    async def _return_unstarted(self) -> None:
        """Stop consuming, and give back what has not started.

        Messages come until cancel-ok. Given back before it, the broker would hand them
        straight to us again.
        """
        await self._worker.consumer.cancel()
        self._worker.registry.drain()
        # What came before the others goes back before them.
        await self._worker.until(self._all_have_begun)
        await self._worker.requeue(self._worker.ledger.unstarted())

    def _all_have_begun(self) -> bool:
        progresses = self._worker.attempts.progress.values()
        return all(progress.began is not None for progress in progresses)

    async def _runs_end(self) -> None:
        """Wait until no job runs, and give back at once what has not started.

        That is so for a connection made meanwhile as well: it is of use only to settle
        those that run.
        """
        worker = self._worker
        ledger, consumer = worker.ledger, worker.consumer
        if not consumer.channels:
            worker.registry.drain()
        while ledger.running:
            await worker.until(lambda: not ledger.running or bool(consumer.channels))
            if consumer.channels:
                await self._redelivered()
                await self._return_unstarted()

    async def _redelivered(self) -> None:
        """Wait until a connection that is still new has brought back what is owed."""
        worker = self._worker
        ledger, consumer = worker.ledger, worker.consumer
        age = asyncio.get_running_loop().time() - consumer.connected_at
        await first(
            worker.until(lambda: not ledger.owes() or bool(consumer.outage)),
            self._hurry.wait(),
            timeout=max(0.0, RECLAIM_TIMEOUT - age),
        )

    async def _before_deadline(self, work: Awaitable[None]) -> None:
        """Wait for this work, but only until the deadline, or a second signal."""
        await first(work, self._hurry.wait(), timeout=self.seconds_left)

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    async def interrupted(self) -> None:
        """Wait until running jobs must end."""
        await asyncio.shield(self.interrupt)

    async def interrupts_within(self, seconds: float) -> bool:
        """Wait so long, but not beyond the moment when running jobs must end: has it come?"""
        await asyncio.wait({self.interrupt}, timeout=seconds)
        return self.interrupt.done()
