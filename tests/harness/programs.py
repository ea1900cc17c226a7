"""A program beside the test or run to its end, as a shell script would; above all `submit`."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import processes
from .trixie import CHECKOUT
from .waiting import TIMEOUT

# What the installed script of that name does.
SUBMIT = [sys.executable, "-c", "from workerd.cli.main import submit_main; submit_main()"]
WORKERD = [sys.executable, "-m", "workerd"]


@dataclass(frozen=True)
class Result:
    """How a program ended; `status` is negative for a signal, `seconds` what it took."""

    status: int
    stdout: str
    stderr: str
    seconds: float


class Program:
    """A program, running from the moment it is made; nothing but `close_input` ends its input.

    `stdin` may be a file to read instead; `env` changes the environment, None removes a variable.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        stdin: int | IO[bytes] = subprocess.PIPE,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        netns: str | None = None,
    ) -> None:
        self._began = time.monotonic()
        namespace = ["ip", "netns", "exec", netns] if netns else []
        self.process = processes.spawn(
            [*namespace, *command],
            env=environment(env or {}),
            cwd=cwd,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._said = threading.Condition()
        self._output = {"stdout": b"", "stderr": b""}
        self._readers = [
            threading.Thread(target=self._read, args=(name,), name=name, daemon=True)
            for name in self._output
        ]
        for reader in self._readers:
            reader.start()

    def write(self, data: bytes) -> None:
        """More of its standard input, at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def unread(self) -> int:
        """How many bytes of its standard input it has not read yet."""
        assert self.process.stdin is not None
        return unread(self.process.stdin)

    def wait_lines(self, count: int, timeout: float = TIMEOUT) -> list[str]:
        """Wait until it has printed so many lines, and return all that it has printed."""
        with self._said:
            enough = lambda: self._output["stdout"].count(b"\n") >= count  # noqa: E731
            printed = self._said.wait_for(enough, timeout)
            text = self._output["stdout"].decode()
            assert printed, f"not {count} lines within {timeout:g} s: {text!r}"
            return text.splitlines()

    def wait(self, timeout: float = TIMEOUT) -> Result:
        """Wait for its end."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended in {timeout:g} s: {self._output}") from None
        seconds = time.monotonic() - self._began
        for reader in self._readers:
            reader.join(timeout)
            assert not reader.is_alive(), f"its {reader.name} is still open, {timeout:g} s later"
        stdout, stderr = (text.decode(errors="replace") for text in self._output.values())
        return Result(status, stdout, stderr, seconds)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """End it, however it is."""
        processes.end(self.process)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def _read(self, name: str) -> None:
        stream: IO[bytes] = getattr(self.process, name)
        with stream:
            while data := os.read(stream.fileno(), 65536):
                with self._said:
                    self._output[name] += data
                    self._said.notify_all()


def run(
    command: Sequence[str | Path],
    stdin: bytes = b"",
    *,
    env: Mapping[str, str | None] | None = None,
    netns: str | None = None,
    timeout: float = TIMEOUT,
) -> Result:
    """Run a program to its end, with this standard input."""
    program = Program(command, env=env, netns=netns)
    try:
        # More than a pipe holds must not wait for a program that does not read it.
        feeder = threading.Thread(target=_feed, args=(program, stdin), daemon=True)
        feeder.start()
        return program.wait(timeout)
    finally:
        program.close()
        feeder.join()


def _feed(program: Program, data: bytes) -> None:
    try:
        program.write(data)
        program.close_input()
    except BrokenPipeError:
        pass


def unread(pipe: IO[bytes]) -> int:
    """How many bytes in a pipe nobody has read yet."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment of a program: this checkout, the pika that was asked for, `changes`."""
    pika = os.environ.get("WORKERD_TEST_PIKA")
    merged: dict[str, str | None] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [pika, str(CHECKOUT)])),
        # It would hide what is not flushed.
        "PYTHONUNBUFFERED": None,
        "WORKERD_BROKER_URL": None,
        **changes,
    }
    return {name: value for name, value in merged.items() if value is not None}
