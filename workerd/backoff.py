"""Endless, growing, jittered delays between attempts to do something again."""

from __future__ import annotations

import random
from collections.abc import Iterator


def backoff(first: float, maximum: float) -> Iterator[float]:
    """Endless delays in seconds: growing from ``first`` to ``maximum``, each jittered.

    A delay is about a fifth of the time that has passed since the first, so that what is
    over soon is noticed soon. It is drawn from the upper half of its step, so that hundreds
    of daemons do not come back to a restarted broker in one instant.
    """
    step = first
    while True:
        yield random.uniform(step / 2, step)  # noqa: S311 - jitter, not a secret
        step = min(step * 1.25, maximum)
