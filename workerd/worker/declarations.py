"""Declaring queues, and using what cannot be declared as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from workerd import log
from workerd.broker.connection import Connection
from workerd.config.model import Queue
from workerd.core import topology
from workerd.errors import BrokerError


class Declarations:
    """What a daemon declares at its start, on each connection anew."""

    def __init__(self) -> None:
        #: Quorum queues that are just as they are declared here: the broker moves a rejected
        #: message to the dead letters, and keeps a message however often it returns.
        self.intact: set[str] = set()
        #: Whether the delay levels have been declared, or are hoped to be there.
        self.levels = asyncio.Event()
        self._warned: set[str] = set()

    async def queue(self, connection: Connection, queue: Queue) -> BrokerError | None:
        """Declare a work queue and its dead letters; returns the broker's objection to the former.

        Done until the queue has been there on this connection. One that is deleted while it
        is consumed is not made again behind the back of the administrator who deleted it.
        """
        objections: list[BrokerError] = []
        if queue.declare != "wait":
            objections = await self._take(
                connection, f"queue {queue.name}", [topology.work_queue(queue)]
            )
        # A classic queue loses a message whose dead letters are full or missing.
        if queue.declare == "create" and queue.type == "quorum" and not objections:
            self.intact.add(queue.name)
        else:
            self.intact.discard(queue.name)
        await self._take(connection, f"dead letters of {queue.name}", topology.dead_letters(queue))
        return objections[0] if objections else None

    async def delays(self, connection: Connection) -> None:
        """Declare the delay levels."""
        await self._take(connection, "delays", topology.delay_levels())
        if not connection.ended.done():
            self.levels.set()
            log.debug("declared", what="delays")

    async def due(self, connection: Connection, queue: Queue) -> BrokerError | None:
        """Declare where the delayed jobs of a queue come due; the levels must be there.

        Returns the broker's objection.
        """
        objections = await self._take(
            connection, f"due jobs of {queue.name}", topology.due_jobs(queue)
        )
        return objections[0] if objections else None

    async def _take(
        self, connection: Connection, what: str, steps: Iterable[topology.Step]
    ) -> list[BrokerError]:
        """Take these steps; returns what the broker objected to.

        What exists with other arguments is used as it is, and what may not be declared is
        hoped to exist: one warning says so, with the broker's words.
        """
        try:
            objections = await connection.declare(steps)
        except BrokerError as trouble:
            return [trouble]  # the connection is gone; on the next one all is declared again
        for objection in map(str, objections):
            if objection not in self._warned:
                self._warned.add(objection)
                log.warning("declare failed", what=what, text=objection)
        return objections
