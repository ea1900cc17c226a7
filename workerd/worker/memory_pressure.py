"""Memory pressure: while the kernel stalls our jobs for want of memory, one is started at a time.

Under a `MemoryHigh=` of the service, or on a host that is short of memory, more processes would
make all of them slower. What tells is how much time tasks of the control group lose by waiting for
memory (PSI, in the kernel's Documentation/accounting/psi.rst), not how much is in use: most of
that may be page cache.
"""

from __future__ import annotations

import re
from pathlib import Path

#: From so many percent of the last ten seconds on, and until it is less than half of that.
HIGH = 10.0
LOW = HIGH / 2
#: Seconds between two looks, while jobs run.
INTERVAL = 1.0

_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


class MemoryPressure:
    """The memory pressure in our control group; ``short`` is what it was at the last `look`."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.short = False

    def look(self) -> bool:
        """Look again; whether that made a difference."""
        stalled = self._stalled()
        before, self.short = self.short, stalled >= (LOW if self.short else HIGH)
        return self.short != before

    def _stalled(self) -> float:
        """The percentage of time in which at least one task was stalled; 0 where nobody tells."""
        if self._file is None:
            return 0.0
        try:
            found = re.search(r"some avg10=([0-9.]+)", self._file.read_text())
        except OSError:
            return 0.0
        return float(found[1]) if found else 0.0


def own_file() -> Path | None:
    """Where the kernel tells our group's pressure; None on a kernel that does not."""
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    path = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    if path is None:
        return None
    files = (root / path[1] / "memory.pressure" for root in _ROOTS)
    return next((file for file in files if file.exists()), None)
