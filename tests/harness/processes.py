"""Starting processes that cannot outlive the test run, and looking at those that run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PR_SET_CHILD_SUBREAPER = 36

_started: dict[int, subprocess.Popen[bytes]] = {}


class MissingTool(Exception):
    """This machine cannot run a test: skipped on a laptop, a failure in CI."""


def need(tool: str) -> None:
    """Raises MissingTool if there is no such command."""
    if shutil.which(tool) is None:
        raise MissingTool(f"{tool} is not installed")


def spawn(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start `command` in its own session; the kernel kills it when the test run dies.

    Call it from the main thread: the kernel's promise is tied to the thread that starts a process.
    """
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        env=env,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    _started[process.pid] = process
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of `spawn` and what is left of its process group; reap it."""
    # Once it is reaped, its number may name somebody else's group: kill the group first.
    if process.returncode is None:
        kill_group(process.pid)
        process.wait()


def kill_group(pid: int) -> None:
    """SIGKILL the process group `pid`, if there is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of every orphan below it, so that `strays` can see them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def strays() -> list[int]:
    """Living children of this process that it did not start: somebody's orphans.

    Needs `adopt_orphans`; reaps the dead ones. An orphan is found whatever it did to its session,
    process group or environment.
    """
    found = []
    for pid in _direct_children(os.getpid()):
        if pid in _started:
            continue
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                found.append(pid)
        except ChildProcessError:
            continue
    return found


def kill_trees(roots: Sequence[int]) -> None:
    """SIGKILL these processes and all their descendants."""
    for pid in [below for root in roots for below in descendants(root)] + list(roots):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents before children."""
    found = []
    pending = _direct_children(pid)
    while pending:
        child = pending.pop(0)
        found.append(child)
        pending += _direct_children(child)
    return found


def command_line(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return "(gone)"


def has_ended(pid: int, within: float) -> bool:
    """Whether a process that is not ours to reap is gone, or dead, after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        if state in "ZX":
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)


def _direct_children(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += map(int, task.read_text().split())
        except OSError:
            continue
    return children
