"""The guardian's program: waits for the end of the daemon, and kills the jobs that it left.

    INTERPRETER -I -S guard.py PIPE TABLE DAEMON

The end of the descriptor PIPE is the end of the daemon, whose process is DAEMON. TABLE has numbers
of four bytes each: first that of the process that is just being started, 0 when none is; then the
process groups of the jobs, negative when a job is over, 0 after the last. Whatever is imported here
takes memory beside every daemon, so there is little of it, and nothing of workerd.
"""

from __future__ import annotations

# `signal` and `contextlib` would bring what takes a megabyte.
import _signal  # type: ignore[import-not-found]
import ctypes
import os
import select
import struct
import sys
import time

#: How long a job may take to die of SIGKILL, in milliseconds.
LAST_MILLISECONDS = 1000
#: How long a process may take from its start until its program runs, in seconds.
LAST_SECONDS = 5.0
#: The variable of a job's process that has the number under which it was started.
VARIABLE = "WORKERD_SPAWN"

_ENTRY = struct.Struct("=i")
_CHUNK = _ENTRY.size * 1024
_TICKS = os.sysconf("SC_CLK_TCK")


def watch(pipe: int, table: int, daemon: int) -> None:
    """Returns when the daemon is gone, and the jobs that it had left."""
    end = select.poll()
    image = b""
    try:
        end.register(os.pidfd_open(daemon), select.POLLIN)
        image = _read(daemon, "cmdline")
    except OSError:
        image = b""  # it is gone already
    os.read(pipe, 1)
    dying = select.poll()
    left = sum(_kill(group, dying) for group in running(table))
    number = _entry(table)
    if number:
        # Not before that: until then the unknown process is not a child of whoever adopts ours.
        end.poll(LAST_MILLISECONDS)
        child = unknown_child(token(daemon, number), image)
        if child is not None:
            left += _kill(child, dying)
    # Whoever waits for the run log's lock, which ends with this process, may start them again.
    while left:
        dead = dying.poll(LAST_MILLISECONDS)
        for descriptor, _event in dead:
            dying.unregister(descriptor)
        left = left - len(dead) if dead else 0


def _kill(group: int, dying: select.poll) -> bool:
    """Kill a process group; returns whether it has to be waited for."""
    try:
        leader = os.pidfd_open(group)
        os.killpg(group, _signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False  # it has just ended, or became another user's: the others are to end
    dying.register(leader, select.POLLIN)
    return True


def running(table: int) -> list[int]:
    """The process groups of the jobs that are not over."""
    groups: list[int] = []
    offset = _ENTRY.size
    while data := os.pread(table, _CHUNK, offset):
        offset += len(data)
        for (entry,) in _ENTRY.iter_unpack(data):
            if entry > 0:
                groups.append(entry)
            elif entry == 0:
                return groups
    return groups


def _entry(table: int) -> int:
    """The first number of the table."""
    data = os.pread(table, _ENTRY.size, 0)
    return int(_ENTRY.unpack(data)[0]) if data else 0


def token(daemon: int, number: int) -> bytes:
    """The value of VARIABLE for the process that a daemon starts under this number."""
    return b"%d-%d" % (daemon, number)


def unknown_child(value: bytes, image: bytes) -> int | None:
    """The process with this token, whose parent has ended before it could say which one that is.

    Until its program runs, its arguments and its environment are those of the daemon, ``image``,
    whose memory it shares: so this looks again while there is such a process, but not longer than
    LAST_SECONDS.
    """
    wanted = b"\0%s=%s\0" % (VARIABLE.encode(), value)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    until = time.monotonic() + LAST_SECONDS
    hidden = True
    while hidden and time.monotonic() < until:
        hidden = False
        for name in os.listdir("/proc"):
            try:
                if not name.isdigit() or not _is_candidate(int(name), now - LAST_SECONDS):
                    continue
                if _read(int(name), "cmdline") in (b"", image):
                    hidden = True
                elif wanted in b"\0" + _read(int(name), "environ"):
                    return int(name)
            except OSError:
                continue  # it has just ended, or is none that we may look into
        time.sleep(0.002)
    return None


def _is_candidate(pid: int, since: float) -> bool:
    """Whether a process was adopted as we were, is of our user, and has begun since then."""
    state, parent, *others = _read(pid, "stat").rpartition(b")")[2].split()
    if pid == os.getpid() or int(parent) != os.getppid() or state in b"ZX":
        return False
    if int(others[17]) / _TICKS < since:
        return False
    _, _, users = _read(pid, "status").partition(b"\nUid:")
    return int(users.split()[0]) == os.getuid()


def _read(pid: int, name: str) -> bytes:
    """A file of proc(5). Raises OSError."""
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def forbid_dumps() -> None:
    """Make this process non-dumpable (prctl(2)), for the daemon too, which has the password.

    A job runs as the same user; it is to see nothing of either.
    """
    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)


if __name__ == "__main__":
    forbid_dumps()
    watch(*map(int, sys.argv[1:]))
