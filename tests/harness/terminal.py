"""A terminal with a program in it that draws whole screens, each from the upper left corner on."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import itertools
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import processes
from .programs import environment
from .waiting import TIMEOUT

T = TypeVar("T")

#: What opens a terminal gets it as its own, so that its keys become signals.
_ADOPT = ["sh", "-c", 'exec <"$0" >"$0" 2>&1 && exec "$@"']
_HOME = "\x1b[H"

_numbers = itertools.count(1)


class Terminal:
    """Runs from the moment it is made; `env` changes the environment, None removes a variable."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str | None] | None = None,
        columns: int = 80,
        lines: int = 24,
    ) -> None:
        self._master, self._slave = pty.openpty()
        self.columns, self.lines = columns, lines
        self._set_size()
        self.before = self.attributes()
        self.output = ""
        self._said = threading.Condition()
        variables = {"TERM": "xterm-256color", "NO_COLOR": None, **(env or {})}
        self.process = processes.spawn(
            [*_ADOPT, os.ttyname(self._slave), *command], env=environment(variables)
        )
        self._reader = threading.Thread(target=self._read, name="terminal", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                with self._said:
                    self.output += decoder.decode(data)
                    self._said.notify_all()

    def catch_up(self) -> None:
        """Wait until all that was written to the terminal so far is in `output`."""
        # Terminals show nothing of it (ECMA-48, application program command).
        mark = f"\x1b_{next(_numbers)}\x1b\\"
        os.write(self._slave, mark.encode())
        self.wait_output(mark)
        with self._said:
            self.output = self.output.replace(mark, "")

    def _set_size(self) -> None:
        size = struct.pack("4H", self.lines, self.columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def attributes(self) -> list[Any]:
        """How the terminal is set: echo, lines and all that."""
        return termios.tcgetattr(self._slave)

    def resize(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self._set_size()

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def screen(self) -> list[str]:
        """The lines of the last screen of the terminal's present size; none before the first."""
        for frame in reversed(self.output.split(_HOME)[1:]):
            lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).split("\r\n")
            if len(lines) == self.lines:
                return [line.rstrip() for line in lines]
        return []

    def wait(self, found: Callable[[str], T], what: str, timeout: float = TIMEOUT) -> T:
        """Wait for a screen of which this is true, whose lines it gets as one text."""
        with self._said:
            value = self._said.wait_for(lambda: found("\n".join(self.screen())), timeout)
            assert value, f"{what}: not within {timeout:g} s\n" + "\n".join(self.screen())
            return value

    def wait_output(self, text: str, timeout: float = TIMEOUT) -> None:
        """Wait until it has written this."""
        with self._said:
            written = self._said.wait_for(lambda: text in self.output, timeout)
            assert written, f"no {text!r} within {timeout:g} s: {self.output[-2000:]!r}"

    def wait_exit(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end: the exit status, negative for a signal. `output` is complete then."""
        status = self.process.wait(timeout)
        self.catch_up()
        return status

    def close(self) -> None:
        """End it, however it is."""
        processes.end(self.process)
        os.close(self._slave)
        self._reader.join(TIMEOUT)
        os.close(self._master)
