"""The daemon as a subprocess: its log as a list of events, its notify socket, its processes.

Every wait is woken by what the daemon says; none of them polls. What it said stays, so a test may
ask for an event that came before it asked; and when it has ended, all that it said is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import processes
from .trixie import CHECKOUT
from .waiting import TIMEOUT

Event = dict[str, Any]
T = TypeVar("T")

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_SIZE = resource.getpagesize()


class Daemon:
    """One instance of the daemon, running from the moment it is made.

    `command` may name another program, `netns` the network namespace it runs in, and `env` further
    environment variables; a value of None removes one.
    """

    def __init__(
        self,
        config: Path,
        instance: str = "1",
        *,
        command: Sequence[str | Path] | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        netns: str | None = None,
    ) -> None:
        self.instance = instance
        self._home = config.parent
        self.started_at = time.monotonic()
        # What it said so far. The lists only grow; `_said` guards them and is notified.
        self.log: list[Event] = []
        self.output: list[str] = []
        self.notifications: list[tuple[float, str]] = []
        self._said = threading.Condition()
        # A socket's path has at most 107 bytes, so a test's own folder may be too long a name.
        self._folder = Path(tempfile.mkdtemp(prefix="workerd-"))
        # Common to the daemons of a test, and to nobody else on this machine.
        self.runtime = Path((env or {}).get("RUNTIME_DIRECTORY") or config.parent / "run")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._folder / "notify"))
        self._notify.setblocking(False)
        if command is None:
            command = [sys.executable, "-m", "workerd"]
            command += ["run", "--config", config, "--instance", instance]
        namespace = ["ip", "netns", "exec", netns] if netns else []
        self.process = processes.spawn(
            [*namespace, *command],
            env=self._environment(env or {}),
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.pid = self.process.pid
        self._exited = False
        self._half_line = b""
        self._closing = os.eventfd(0)
        self._listener = threading.Thread(target=self._listen, name=f"hears {instance}")
        self._listener.daemon = True
        self._listener.start()

    @property
    def running(self) -> bool:
        return not self._exited

    # What it said

    def events(self, event: str | None = None, *, since: int = 0, **fields: Any) -> list[Event]:
        """The log's entries so far with this name and these fields.

        A field's value is compared, or called if it can be: `age=lambda age: age > 2`. `since` is
        an index into `log`, as `mark` gives it.
        """
        with self._said:
            return [entry for entry in self.log[since:] if _matches(entry, event, fields)]

    def mark(self) -> int:
        """The end of the log now, for a `since` that leaves out what was said before."""
        return len(self.log)

    def wait_event(
        self, event: str, *, timeout: float = TIMEOUT, since: int = 0, count: int = 1, **fields: Any
    ) -> Event:
        """Wait for the log's `count`-th entry with this name and these fields, and return it.

        Raises `AssertionError` at once if the daemon ends without it.
        """
        name = f"event {event!r} {fields or ''}"

        def found() -> Event | None:
            entries = self.events(event, since=since, **fields)
            return entries[count - 1] if len(entries) >= count else None

        return self._wait(found, name, timeout)

    def wait_notify(
        self, wanted: Callable[[str], bool] | str, timeout: float = TIMEOUT, *, since: int = 0
    ) -> str:
        """Wait for a notify datagram that has the line `wanted`, or of which `wanted` is true.

        `since` is an index into `notifications`: what came before it does not count.
        """
        matches = wanted if callable(wanted) else (lambda text: wanted in text.splitlines())

        def found() -> str | None:
            return next((text for _, text in self.notifications[since:] if matches(text)), None)

        return self._wait(found, f"notification {wanted!r}", timeout)

    def wait_ready(self, timeout: float = TIMEOUT) -> None:
        """Wait until it told systemd that it is ready."""
        self.wait_notify("READY=1", timeout)

    def transcript(self) -> str:
        """Everything it wrote and every notification, for a test that fails."""
        with self._said:
            notified = [f"{at - self.started_at:7.3f} {text!r}" for at, text in self.notifications]
            state = self.process.returncode if self._exited else "running"
            return "\n".join([*self.output, "--- notify socket", *notified, f"--- status {state}"])

    # What is done to it

    def signal(self, number: int) -> None:
        """Send a signal to the main process alone, as systemd does."""
        self.process.send_signal(number)

    def stop(self, timeout: float = TIMEOUT) -> int:
        """SIGTERM, and wait: the exit status, negative for a signal."""
        self.signal(signal.SIGTERM)
        return self.wait_exit(timeout)

    def kill(self) -> None:
        """SIGKILL the main process alone, and wait for its end."""
        self.signal(signal.SIGKILL)
        self.wait_exit()

    def wait_exit(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end: the exit status, negative for a signal."""
        with self._said:
            if not self._said.wait_for(lambda: self._exited, timeout):
                raise AssertionError(f"workerd {self.instance} has not ended in {timeout:g} s")
        assert self.process.returncode is not None
        return self.process.returncode

    def close(self) -> None:
        """End it, however it is, and forget it; its log stays."""
        processes.kill_trees([self.pid] if not self._exited else [])
        self.wait_exit()
        os.eventfd_write(self._closing, 1)
        self._listener.join()
        os.close(self._closing)
        self._notify.close()
        shutil.rmtree(self._folder)

    # What it uses

    def rss(self) -> int:
        """Resident memory of the main process in bytes."""
        return int(self._proc("statm").split()[1]) * PAGE_SIZE

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def cpu_seconds(self) -> float:
        """Processor time of the main process alone."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS

    def children(self) -> list[int]:
        """Every process below it."""
        return processes.descendants(self.pid)

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()

    def _environment(self, changes: Mapping[str, str | None]) -> dict[str, str]:
        pika = os.environ.get("WORKERD_TEST_PIKA")
        environment: dict[str, str | None] = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [pika, str(CHECKOUT)])),
            "NOTIFY_SOCKET": str(self._folder / "notify"),
            # Instances of the same test are on one host; those of others are not.
            "RUNTIME_DIRECTORY": str(self.runtime),
            "STATE_DIRECTORY": str(self._home / "state"),
            **changes,
        }
        return {name: value for name, value in environment.items() if value is not None}

    def _wait(self, found: Callable[[], T | None], what: str, timeout: float) -> T:
        deadline = time.monotonic() + timeout
        with self._said:
            while (value := found()) is None:
                if self._exited:
                    raise AssertionError(f"ended with {self.process.returncode} before {what}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"no {what} in {timeout:g} s")
                self._said.wait(left)
            return value

    # The thread that listens

    def _listen(self) -> None:
        """Take in what it says, until `close`: strays may hold the pipe open for longer."""
        assert self.process.stderr is not None
        log = self.process.stderr.fileno()
        ended = os.pidfd_open(self.pid)
        poll = select.poll()
        for source in (log, self._notify.fileno(), ended, self._closing):
            poll.register(source, select.POLLIN)
        os.set_blocking(log, False)
        more = True
        while self._closing not in (ready := dict(poll.poll())):
            # What it said has been said by the time it has ended: nothing is left to come.
            if ended in ready:
                self.process.wait()
            self._read_notifications()
            if more and (log in ready or ended in ready):
                more = self._read_log(to_the_end=ended in ready)
                if not more:
                    poll.unregister(log)
            if ended in ready:
                poll.unregister(ended)
                with self._said:
                    self._exited = True
                    self._said.notify_all()
        os.close(ended)
        self.process.stderr.close()

    def _read_log(self, to_the_end: bool) -> bool:
        """Read what is in the pipe, or some of it; returns False if no more can come."""
        assert self.process.stderr is not None
        while True:
            try:
                data = os.read(self.process.stderr.fileno(), 65536)
            except BlockingIOError:
                return True
            *lines, rest = (self._half_line + data).split(b"\n")
            if not data and rest:
                lines, rest = [rest], b""
            self._half_line = rest
            with self._said:
                for line in lines:
                    self._hear(line.decode(errors="backslashreplace"))
                self._said.notify_all()
            if not data or not to_the_end:
                return bool(data)

    def _read_notifications(self) -> None:
        with self._said, contextlib.suppress(BlockingIOError):
            while True:
                text = self._notify.recv(65536).decode(errors="replace")
                self.notifications.append((time.monotonic(), text))
                self._said.notify_all()

    def _hear(self, line: str) -> None:
        self.output.append(line)
        if (entry := _parse(line)) is not None:
            self.log.append(entry)


def _parse(line: str) -> Event | None:
    """An entry of the log; None for anything else, such as a traceback."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None


def _matches(entry: Event, event: str | None, fields: Mapping[str, Any]) -> bool:
    if event is not None and entry["event"] != event:
        return False
    return all(
        name in entry and (value(entry[name]) if callable(value) else entry[name] == value)
        for name, value in fields.items()
    )
