"""`workerd status --watch`: asks the instances every second, and shows what they say.

What is drawn is in `sections`; here is who is asked when, and the terminal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections.abc import Iterator
from typing import Any

from workerd.cli.watch.asker import Asker
from workerd.errors import EX_OK, EX_UNAVAILABLE, EX_USAGE, CommandError

#: Seconds between two looks.
INTERVAL = 1.0

#: The alternate screen, without a cursor; and back again.
_ENTER = b"\x1b[?1049h\x1b[?25l\x1b[2J"
_LEAVE = b"\x1b[?25h\x1b[?1049l"
_CLEAR = b"\x1b[2J"

_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGCONT,
)


def watch(name: str | None) -> int:
    """Show the instances until somebody types q; returns the exit status.

    Raises CommandError where that cannot be shown, NoAnswer for an instance that nobody knows.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        raise CommandError(EX_USAGE, "--watch needs a terminal; for a program: --watch --json")
    try:
        from workerd.cli.watch.layout import Paint
        from workerd.cli.watch.sections import screen
    except ImportError as error:
        if not str(error.name).startswith("rich"):
            raise
        raise CommandError(
            EX_UNAVAILABLE,
            "--watch needs the Python package rich: apt install python3-rich (or pip install rich)",
        ) from None
    paint = Paint(sys.stdout.encoding)
    asker = Asker(name)
    host = socket.gethostname()

    def draw(width: int, height: int) -> bytes:
        return paint(screen(asker.states(), host, time.time(), width, height), width)

    with Terminal() as terminal:
        while True:
            asker.look()
            terminal.write(draw(*terminal.size()))
            due = time.monotonic() + INTERVAL
            while (left := due - time.monotonic()) > 0:
                for event in terminal.events(left):
                    if event in ("q", "Q", "", signal.SIGINT):
                        return EX_OK
                    if event in (signal.SIGTERM, signal.SIGHUP):
                        return 128 + int(event)
                    terminal.handle(event)
                    terminal.write(draw(*terminal.size()))


def stream(name: str | None) -> Iterator[dict[str, Any]]:
    """What each instance says, every second, with the ``time`` in seconds since 1970."""
    asker = Asker(name)
    while True:
        answered = asker.look()
        for state in asker.states():
            if state["instance"] in answered:
                yield {"time": round(time.time(), 3), **state}
        time.sleep(INTERVAL)


class Terminal:
    """Our terminal, which is given back as it was whatever happens: a context manager."""

    def __init__(self) -> None:
        self._out = sys.stdout.fileno()
        self._keys = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None
        self._before = None if self._keys is None else termios.tcgetattr(self._keys)
        self._signals, wakeup = os.pipe()
        for end in (self._signals, wakeup):
            os.set_blocking(end, False)
        # The handlers do nothing: which signals came is read from there.
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda _number, _frame: None)

    def __enter__(self) -> Terminal:
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        # It may be gone.
        with contextlib.suppress(OSError, termios.error):
            self._leave()

    def _enter(self) -> None:
        if self._keys is not None:
            tty.setcbreak(self._keys)
        self.write(_ENTER)

    def _leave(self) -> None:
        self.write(_LEAVE)
        if self._keys is not None and self._before is not None:
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._before)

    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        # Not those of COLUMNS and LINES, which do not change.
        columns, lines = os.get_terminal_size(self._out)
        return columns or 80, lines or 24

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._out, data) :]

    def events(self, timeout: float) -> list[str | signal.Signals]:
        """The keys that are typed, and the signals that come; "" when nobody can type any more."""
        files = [self._signals] if self._keys is None else [self._signals, self._keys]
        ready, _, _ = select.select(files, (), (), timeout)
        found: list[str | signal.Signals] = []
        if self._signals in ready:
            found += map(signal.Signals, os.read(self._signals, 64))
        if self._keys in ready and self._keys is not None:
            try:
                typed = os.read(self._keys, 64).decode("ascii", "replace")
            except OSError:
                typed = ""
            found += typed or [""]
        return found

    def handle(self, event: str | signal.Signals) -> None:
        """What is not for the program itself: another size, being put aside and taken up."""
        if event is signal.SIGTSTP:
            self._leave()
            os.kill(os.getpid(), signal.SIGSTOP)
        elif event is signal.SIGCONT:
            self._enter()
        elif event is signal.SIGWINCH:
            self.write(_CLEAR)
