"""Waiting for a condition of the worker as a whole: looked at again whenever something happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Changes:
    """What happens in a worker; ``noticed`` is called each time."""

    def __init__(self, noticed: Callable[[], object]) -> None:
        self._noticed = noticed
        self._happened = asyncio.Event()

    def happen(self) -> None:
        """Something happened that somebody may be waiting for, or that the status line shows."""
        self._happened.set()
        self._noticed()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until this is true."""
        while not condition():
            self._happened.clear()
            await self._happened.wait()
