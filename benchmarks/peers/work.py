"""The jobs themselves, the same for every worker. Each notes in one file that it ran."""

from __future__ import annotations

import os
import time

#: How long the job `slow` takes, in seconds.
SLOW = 0.05

_notes = os.open(os.environ["BENCHMARK_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def noop() -> None:
    """Nothing, but one byte that proves that it ran: about 2 µs."""
    os.write(_notes, b".")


def stamp(sent: str | bytes) -> None:
    """Note how many nanoseconds ago the moment `sent` was."""
    os.write(_notes, b"%d\n" % (time.time_ns() - int(sent)))


def slow() -> None:
    """Note the moment in nanoseconds, then take some time."""
    os.write(_notes, b"%d\n" % time.time_ns())
    time.sleep(SLOW)
