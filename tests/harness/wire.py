"""A wire between the daemon and the broker that can be slow, held and cut: a TCP relay.

It needs neither root nor kernel modules. Unlike the kernel's own buffers it forgets: what is under
way when its sender hangs up is lost, as it is when a host goes down.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from typing import Literal
from urllib.parse import urlsplit

from tests.harness.ports import Port
from tests.harness.waiting import until

Direction = Literal["to_broker", "to_daemon"]


class Wire:
    """A relay to the broker of `target`, to be used as `url`.

    `delay` is how many seconds it takes to the broker.
    """

    def __init__(self, target: str) -> None:
        self._parts = urlsplit(target)
        self.delay = 0.0
        self._flowing = {"to_broker": threading.Event(), "to_daemon": threading.Event()}
        self._watched: dict[Direction, bytes] = {}
        self._ends: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_cut = False
        self._port = Port()
        self._listener = _listen(self._port.number)
        self.release()
        self._accept_in_background()

    @property
    def url(self) -> str:
        user = self._parts.netloc.rpartition("@")[0]
        return self._parts._replace(netloc=f"{user}@127.0.0.1:{self._port.number}").geturl()

    def connections(self) -> int:
        """How many connections go through it."""
        return len(self._ends) // 2

    def hold(self, direction: Direction, *, at: bytes = b"") -> None:
        """Let nothing through in this direction; what comes in is kept.

        `at` makes it happen only when these bytes come.
        """
        self._watched[direction] = at
        if not at:
            self._flowing[direction].clear()

    def holds(self) -> bool:
        return not all(flowing.is_set() for flowing in self._flowing.values())

    def release(self) -> None:
        """Let everything through again, what was kept first."""
        self._watched.clear()
        for flowing in self._flowing.values():
            flowing.set()

    def cut(self) -> None:
        """End every connection, and refuse new ones; returns when that is so."""
        self._is_cut = True
        # A listener that is closed in the middle of accept() would go on listening.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.break_connections()

    def mend(self) -> None:
        """Take connections again after a `cut`."""
        self._is_cut = False
        self._listener = _listen(self._port.number)
        self._accept_in_background()

    def break_connections(self) -> None:
        """End every connection; new ones are welcome."""
        with self._lock:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self.release()
        until(lambda: not self._ends, "the wire is empty")

    def close(self) -> None:
        if self._is_cut:
            self.break_connections()
        else:
            self.cut()
        self._port.close()

    def _accept_in_background(self) -> None:
        thread = threading.Thread(target=self._accept, args=[self._listener], daemon=True)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                assert self._parts.hostname
                far = socket.create_connection((self._parts.hostname, self._parts.port or 5672))
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._ends |= {near, far}
            threads = [
                threading.Thread(target=self._carry, args=arguments, daemon=True)
                for arguments in ((near, far, "to_broker"), (far, near, "to_daemon"))
            ]
            for thread in threads:
                thread.start()
            threading.Thread(target=self._drop, args=[threads, near, far], daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                delay = self.delay if direction == "to_broker" else 0.0
                late = delay > 0 or not self._flowing[direction].is_set()
                if self._watched.get(direction) and self._watched[direction] in data:
                    self._flowing[direction].clear()
                time.sleep(delay)
                self._flowing[direction].wait()
                if late and _hung_up(source):
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _drop(
        self, threads: list[threading.Thread], near: socket.socket, far: socket.socket
    ) -> None:
        for thread in threads:
            thread.join()
        with self._lock:
            self._ends -= {near, far}
        near.close()
        far.close()


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return listener


def _hung_up(end: socket.socket) -> bool:
    poll = select.poll()
    poll.register(end, select.POLLRDHUP)
    return bool(poll.poll(0))
