"""The wish to stop: not yet wanted, wanted, or in a hurry; one deadline, computed once."""

from __future__ import annotations

import asyncio


class Stop:
    """What was asked of the worker, and when running jobs must end."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        #: A second signal has come: running jobs get no more time.
        self.hurry = asyncio.Event()
        #: Done when running jobs must end; they are interrupted one by one.
        self.interrupt: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deadline = 0.0

    def request(self) -> None:
        """Stop; asked again, hurry."""
        if self.wanted.is_set():
            self.hurry.set()
        self.wanted.set()

    def begin(self, timeout: float) -> None:
        """From now on running jobs have so many seconds."""
        self._deadline = asyncio.get_running_loop().time() + timeout

    @property
    def seconds_left(self) -> float:
        """Until the deadline; 0 when it is over."""
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    async def interrupted(self) -> None:
        """Wait until running jobs must end."""
        await asyncio.shield(self.interrupt)

    async def interrupts_within(self, seconds: float) -> bool:
        """Wait so long, but not beyond the moment when running jobs must end: has it come?"""
        await asyncio.wait({self.interrupt}, timeout=seconds)
        return self.interrupt.done()
