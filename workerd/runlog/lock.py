"""The lock on the folder of a run log: its process is alive for as long as somebody holds it."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

#: Seconds that a start waits for the lock of a run log: for an instant a sibling has it that
#: looks whether it is held, and the guardian of a killed process until it has killed the jobs.
PATIENCE = 2.0


def hold(folder: Path, patience: float = PATIENCE) -> int:
    """Take the lock on a run log's folder; it is held until the returned descriptor is closed.

    Whoever inherits the descriptor holds the lock too. Raises OSError when the folder cannot
    be made, and BlockingIOError when the lock is another's for longer than ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(lock)
                raise
            time.sleep(0.01)
        else:
            return lock
