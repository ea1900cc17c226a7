"""The guardian's program: reads which jobs run, and kills them when the daemon is gone.

    INTERPRETER -I -S guard.py PIPE

Through the descriptor PIPE come the numbers of process groups, four bytes each, negative when a
job is over. Its end is the daemon's end. Whatever is imported here takes memory beside every
daemon, so there is little of it, and nothing of workerd.
"""

from __future__ import annotations

# `signal` and `contextlib` would bring what takes a megabyte.
import _signal  # type: ignore[import-not-found]
import ctypes
import os
import select
import struct
import sys

#: How long a job may take to die of SIGKILL, in milliseconds.
LAST_MILLISECONDS = 1000

_ENTRY = struct.Struct("=i")


def watch(pipe: int) -> None:
    """Returns when the daemon is gone, and the jobs that it had left."""
    groups: set[int] = set()
    # Entries are written in one piece, and reads take whole multiples, so none is torn.
    while data := os.read(pipe, _ENTRY.size * 1024):
        for (entry,) in _ENTRY.iter_unpack(data):
            (groups.add if entry > 0 else groups.discard)(abs(entry))
    dying = select.poll()
    for group in groups:
        try:
            dying.register(os.pidfd_open(group), select.POLLIN)
            os.killpg(group, _signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has just ended
    # Whoever waits for the memory's lock, which ends with this process, may start them again.
    for _ in groups:
        for descriptor, _event in dying.poll(LAST_MILLISECONDS):
            dying.unregister(descriptor)


def forbid_dumps() -> None:
    """As in `service`: a job, which runs as the same user, is to see nothing of this process."""
    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)


if __name__ == "__main__":
    forbid_dumps()
    watch(int(sys.argv[1]))
