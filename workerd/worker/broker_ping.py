"""Whether the broker still answers."""

from __future__ import annotations

import asyncio
import contextlib
import time

from workerd.errors import BrokerError
from workerd.worker.consumer import Consumer


class BrokerPing:
    """Whether the broker still answers: asked every few seconds, on a channel that consumes.

    A heartbeat would tell only after a minute. Nothing follows from it but an answer.
    """

    #: Seconds between two questions, and for an answer.
    INTERVAL = 2.0
    PATIENCE = 3.0

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._asked_at: float | None = None

    @property
    def silent_for(self) -> float:
        """For how many seconds a question has been waiting for its answer."""
        return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.INTERVAL)
            channel = next(iter(self._consumer.channels.values()), None)
            if channel is None:
                continue
            self._asked_at = time.monotonic()
            with contextlib.suppress(BrokerError):  # the connection is gone, which says more
                await channel.probe()
            self._asked_at = None
