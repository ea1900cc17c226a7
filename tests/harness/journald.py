"""systemd's journal, as far as a sender can tell: the socket, and what came in by it.

The daemon has it at its usual place, in a mount namespace of its own. Needs root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .processes import MissingTool
from .waiting import TIMEOUT

Entry = dict[str, str]

_numbers = itertools.count(1)

ENTER = """
mount -t tmpfs none /run && mkdir /run/systemd && ln -s "$1" /run/systemd/journal &&
shift && exec "$@"
"""


class Journald:
    """The journal. `start` and `crash` as often as need be; `freeze` makes it read nothing."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise MissingTool("a journal of one's own needs root")
        # What came in, each as its fields. It only grows; `_came` guards it and is notified.
        self.entries: list[Entry] = []
        self._came = threading.Condition()
        self._reads = threading.Event()
        self._reads.set()
        # A socket's path has at most 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="journald-"))
        self._socket: socket.socket | None = None
        self._reader: threading.Thread | None = None

    def around(self, config: Path) -> Sequence[str | Path]:
        """The command of a daemon that finds this journal."""
        enter: list[str | Path] = ["unshare", "--mount", "--propagation", "private"]
        enter += ["sh", "-c", ENTER, "sh", self._folder]
        return [*enter, sys.executable, "-m", "workerd", "run", "--config", config]

    def start(self) -> None:
        path = self._folder / "socket"
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._reader = threading.Thread(target=self._read, args=[self._socket], daemon=True)
        self._reader.start()

    def crash(self) -> None:
        """End it. The socket's name stays, and whoever sends to it is refused."""
        assert self._socket is not None
        assert self._reader is not None
        self.thaw()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", str(self._folder / "socket"))
        self._reader.join(TIMEOUT)
        self._socket.close()
        self._socket = None

    def freeze(self) -> None:
        self._reads.clear()

    def thaw(self) -> None:
        self._reads.set()

    def close(self) -> None:
        if self._socket is not None:
            self.crash()
        shutil.rmtree(self._folder)

    def find(self, event: str, **fields: str) -> list[Entry]:
        """The entries with this event name and these fields (`job_id` for WORKERD_JOB_ID).

        Of all that was sent so far, unless it is frozen or gone.
        """
        if self._socket is not None and self._reads.is_set():
            self._catch_up()
        wanted = _wanted(event, fields)
        with self._came:
            return [entry for entry in self.entries if wanted.items() <= entry.items()]

    def wait(self, event: str, **fields: str) -> Entry:
        """Wait for the first such entry."""
        return self._wait(_wanted(event, fields))

    def _catch_up(self) -> None:
        """Wait until everything that was sent before this has come in."""
        mark = f"mark {next(_numbers)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(f"MESSAGE={mark}\n".encode(), str(self._folder / "socket"))
        self._wait({"MESSAGE": mark})

    def _wait(self, wanted: Entry) -> Entry:
        looked_at = 0
        deadline = time.monotonic() + TIMEOUT
        with self._came:
            while True:
                for entry in itertools.islice(self.entries, looked_at, None):
                    if wanted.items() <= entry.items():
                        return entry
                looked_at = len(self.entries)
                if not self._came.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no {wanted} in the journal in {TIMEOUT:g} s")

    def _read(self, listener: socket.socket) -> None:
        while datagram := listener.recv(1 << 20):
            with self._came:
                self.entries.append(_parse(datagram))
                self._came.notify_all()
            self._reads.wait()


def _wanted(event: str, fields: Mapping[str, str]) -> Entry:
    named = {f"WORKERD_{name.upper()}": value for name, value in fields.items()}
    return {"WORKERD_EVENT": event, **named}


def _parse(datagram: bytes) -> Entry:
    """The native protocol: KEY=value, or KEY and a length for a value of several lines."""
    entry = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        key, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", datagram)
            value, datagram = datagram[8 : 8 + length], datagram[9 + length :]
        entry[key.decode()] = value.decode()
    return entry
