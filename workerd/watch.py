"""`workerd status --watch`: asks the instances every second, and shows what they say.

What is drawn is in `screen`; here is who is asked when, and the terminal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workerd import ask, instances
from workerd.errors import Refused
from workerd.exits import EX_OK, EX_UNAVAILABLE, EX_USAGE

#: Seconds between two looks.
INTERVAL = 1.0
#: Seconds that a look waits for answers; whoever needs longer is shown as it was.
PATIENCE = 0.25
#: Seconds after which it shows that somebody does not answer.
SILENT = 1.0

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


class Asker:
    """Asks each instance in a thread of its own, so that none waits for another.

    ``name`` is that of the only one, None for all of the host. Raises NoAnswer for one that
    nobody knows.
    """

    def __init__(self, name: str | None) -> None:
        self._only = None if name is None else {name: ask.folder_of(name)}
        self._folders: dict[str, Path] = {}
        #: The last answer of each, and when those were asked that have not answered yet.
        self._answers: dict[str, ask.Answer] = {}
        self._asked: dict[str, float] = {}

    def look(self) -> set[str]:
        """Ask all of them; returns who has answered within the time."""
        self._folders = self._only or ask.folders()
        threads = {
            name: threading.Thread(target=self._ask, args=(name, folder), daemon=True)
            for name, folder in self._folders.items()
            if name not in self._asked
        }
        for name, thread in threads.items():
            self._asked[name] = time.monotonic()
            thread.start()
        deadline = time.monotonic() + PATIENCE
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        return {name for name, thread in threads.items() if not thread.is_alive()}

    def _ask(self, name: str, folder: Path) -> None:
        try:
            self._answers[name] = instances.state(name, folder, depths=True)
        finally:
            del self._asked[name]

    def states(self) -> list[ask.Answer]:
        """What is known of each, by name."""
        return [self._state(name) for name in sorted(self._folders)]

    def _state(self, name: str) -> ask.Answer:
        nothing = {"instance": name, "state": "silent", "healthy": False, "why": None}
        known = self._answers.get(name, nothing)
        seconds = time.monotonic() - self._asked.get(name, float("inf"))
        if seconds < SILENT:
            return known
        return {**known, "state": "stuck", "healthy": False, "why": f"no answer for {seconds:.0f}s"}


def watch(name: str | None) -> int:
    """Show the instances until somebody types q; returns the exit status.

    Raises Refused where that cannot be shown, NoAnswer for an instance that nobody knows.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        raise Refused(EX_USAGE, "--watch needs a terminal; for a program: --watch --json")
    try:
        from workerd.screen import Paint, screen
    except ImportError as error:
        if not str(error.name).startswith("rich"):
            raise
        raise Refused(
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
        self._told, told = os.pipe()
        for end in (self._told, told):
            os.set_blocking(end, False)
        # The handlers do nothing: which signals came is read from there.
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
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
        files = [self._told] if self._keys is None else [self._told, self._keys]
        ready, _, _ = select.select(files, (), (), timeout)
        found: list[str | signal.Signals] = []
        if self._told in ready:
            found += map(signal.Signals, os.read(self._told, 64))
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
