"""The guardian's program: waits for the end of the daemon, and kills the jobs that it left.

    INTERPRETER -I -S guard.py PIPE TABLE

The end of the descriptor PIPE is the daemon's end. TABLE has the numbers of process groups, four
bytes each: negative when a job is over, 0 after the last. Whatever is imported here takes memory
beside every daemon, so there is little of it, and nothing of workerd.
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
_CHUNK = _ENTRY.size * 1024


def watch(pipe: int, table: int) -> None:
    """Returns when the daemon is gone, and the jobs that it had left."""
    os.read(pipe, 1)
    dying = select.poll()
    left = 0
    for group in running(table):
        try:
            dying.register(os.pidfd_open(group), select.POLLIN)
            left += 1
            os.killpg(group, _signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # it has just ended, or became another user's: the others are to end
    # Whoever waits for the memory's lock, which ends with this process, may start them again.
    while left:
        dead = dying.poll(LAST_MILLISECONDS)
        for descriptor, _event in dead:
            dying.unregister(descriptor)
        left = left - len(dead) if dead else 0


def running(table: int) -> list[int]:
    """The process groups of the jobs that are not over."""
    groups: list[int] = []
    offset = 0
    while data := os.pread(table, _CHUNK, offset):
        offset += len(data)
        for (entry,) in _ENTRY.iter_unpack(data):
            if entry > 0:
                groups.append(entry)
            elif entry == 0:
                return groups
    return groups


def forbid_dumps() -> None:
    """Make this process non-dumpable (prctl(2)), for the daemon too, which has the password.

    A job runs as the same user; it is to see nothing of either.
    """
    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)


if __name__ == "__main__":
    forbid_dumps()
    watch(int(sys.argv[1]), int(sys.argv[2]))
