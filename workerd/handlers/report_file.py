"""What a program says of its job, in the file that the variable WORKERD_REPORT names.

Each line is NAME=VALUE:

    retry-after=5m      if it fails: the delay before the next attempt, a duration or seconds
    note=TEXT           for the log and for the dead letter; several are joined
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass

from workerd import log, log_formats
from workerd.core.topology import MAX_DELAY
from workerd.units import parse_duration

#: The descriptor of that file in the program.
DESCRIPTOR = 3
#: Its name there.
PATH = f"/proc/self/fd/{DESCRIPTOR}"
#: How much of it is read, in bytes.
LIMIT = 16 * 1024


@dataclass(frozen=True, slots=True)
class ReportFile:
    """``retry_after`` is in seconds."""

    retry_after: float | None = None
    note: str = ""


def create() -> int:
    """An empty file without a name, to be closed by the caller. Raises OSError."""
    file = os.memfd_create("workerd-report", os.MFD_CLOEXEC)
    # So that what is written to the descriptor does not overwrite what was written by name.
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
    return file


def read(file: int) -> ReportFile:
    """What was written; a line that says nothing is logged and left out."""
    if not os.fstat(file).st_size:
        return _NONE
    retry_after: float | None = None
    notes = []
    for line in log_formats.text_lines(os.pread(file, LIMIT, 0)).splitlines():
        name, _, value = line.partition("=")
        if name == "note":
            notes.append(value.strip())
        elif name == "retry-after" and (seconds := _seconds(value.strip())) is not None:
            retry_after = seconds
        elif line.strip():
            log.warning("report ignored", text=line[:200])
    return ReportFile(retry_after, "; ".join(notes))


_NONE = ReportFile()


def _seconds(text: str) -> float | None:
    try:
        seconds = parse_duration(text if text[-1:].isalpha() else f"{text}s")
    except ValueError:
        return None
    return seconds if seconds <= MAX_DELAY else None
