"""Run logs in a test: two keys of jobs, and what happens to an instance."""

from __future__ import annotations

import os

from workerd.runlog.writer import RunLog

HOUR = 3600.0
SLEEP = bytes(range(16))
RESIZE = bytes(range(16, 32))


def dies(run_log: RunLog) -> None:
    """What the kernel does when the process ends."""
    run_log.close()
    os.close(run_log._lock)


def looking(run_log: RunLog) -> RunLog:
    """The run log, after a look at the others."""
    run_log.look()
    return run_log


def knows(run_log: RunLog, key: bytes) -> bool:
    return run_log.take(key, lambda _channel: True)
