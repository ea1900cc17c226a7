"""Time limits, the only polling loop of the tests, and how much is left to chance."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

SCALE = float(os.environ.get("WORKERD_TEST_SCALE", "1"))

# Bounds every wait. It is only ever spent by a test that fails, so it is generous.
TIMEOUT = 20.0 * SCALE

# How many random episodes a test of random moments goes through.
SEEDS = int(os.environ.get("WORKERD_TEST_SEEDS", "2"))

# For `make quick`, which shows in seconds what is plainly wrong.
QUICK = "WORKERD_TEST_QUICK" in os.environ


def examples(usual: int, each: int) -> int:
    """How many examples a random test tries: `each` for every seed of a campaign, or `usual`."""
    return usual // 30 if QUICK else max(usual, each * int(os.environ.get("WORKERD_TEST_SEEDS", 0)))


T = TypeVar("T")


def until(predicate: Callable[[], T], what: str, timeout: float = TIMEOUT) -> T:
    """Return the first true value of `predicate`; raise `AssertionError` after `timeout` seconds.

    For what can only be asked (a queue's depth, a process' state). What announces itself (an event
    in the log, a notify datagram) is waited for in `Daemon`, without polling.
    """
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what}: not within {timeout:g} s; last seen: {value!r}")
        time.sleep(0.02)
    return value
