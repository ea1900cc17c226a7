"""Handlers that cannot run here and now, for no fault of their jobs'. Pure.

A paused handler is tried again by a job that comes after its pause; until then its jobs are put
off, so that the other handlers of the queue go on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from workerd.backoff import backoff

#: Seconds from one try to the next, growing.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
#: The longest time for which one job is put off, in seconds. A hundred thousand of them make
#: some hundred copies a second then.
LONGEST_DELAY = 300.0


@dataclass(slots=True)
class Pause:
    """Why a handler is paused, and since when; instants are monotonic."""

    error: str
    since: float
    until: float
    delays: Iterator[float]


class Breaker:
    """The handlers that are paused, by name."""

    def __init__(self) -> None:
        self.paused: dict[str, Pause] = {}

    def holds(self, handler: str, now: float) -> bool:
        """Whether it is not worth a try yet."""
        return handler in self.paused and now < self.paused[handler].until

    def unavailable(self, handler: str, error: str, now: float) -> bool:
        """It could not run; whether there is something new in that."""
        pause = self.paused.get(handler)
        if pause is None:
            pause = Pause("", now, now, backoff(FIRST_PAUSE, LONGEST_PAUSE))
            self.paused[handler] = pause
        is_new = error != pause.error
        pause.error = error
        if now >= pause.until:  # not for each of several that were tried at once
            pause.until = now + next(pause.delays)
        return is_new

    def available(self, handler: str) -> bool:
        """It runs; whether that is new."""
        return self.paused.pop(handler, None) is not None

    def delay(self, handler: str, now: float) -> float:
        """For how many seconds a job is put off: longer, the longer its handler is paused.

        So the last one comes back within half the time that all of it has taken.
        """
        pause = self.paused.get(handler)
        half = (now - pause.since) / 2 if pause else 0.0
        longest = min(max(half, 1.0), LONGEST_DELAY)
        # Those that were put off together do not come back together.
        return random.uniform(longest / 2, longest)  # noqa: S311 - jitter, not a secret
