"""The local socket: who may ask a running instance, and how much (docs/control.md).

Everything is bounded, and a client can hold up nobody but itself: it has one request at a time,
is not read while that is worked on, and is dropped when it does not read its answers. All clients
together get a part of the loop's time, whatever they send. What the answers are is in `answers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol

from workerd import log
from workerd.config.permissions import group_id
from workerd.control.client import address
from workerd.control.peer import Peer
from workerd.control.protocol import GROUP, SOCKET
from workerd.control.session import Client, Reply, Request

#: Clients at once.
MOST_CLIENTS = 64
#: The same of one user, unless that is root or our own.
MOST_PER_USER = 32
#: A client that has owed the rest of a request for so many seconds makes room for another.
QUIET = 2.0
#: What all bodies together may take, in bytes.
MOST_BYTES = 64 << 20
#: The part of the loop's time that answers may take.
SHARE = 0.2


class RequestHandler(Protocol):
    """Who answers; called in the loop, one request at a time."""

    def answer(
        self, request: Request, body: bytes, peer: Peer
    ) -> Reply | Coroutine[Any, Any, Reply]:
        """The answer, or what will bring it. Raises WorkerdError."""


class Control:
    """The socket of an instance, from `open` to `close`."""

    def __init__(self, folder: Path, answers: RequestHandler) -> None:
        self.answers = answers
        self.clients: set[Client] = set()
        #: Bytes of bodies that clients have announced and that are still in memory.
        self.bytes = 0
        self.unconfirmed = 0
        self._folder = folder
        self._server: asyncio.Server | None = None
        #: Those whose next request is complete.
        self._ready: deque[Client] = deque()
        self._pump: asyncio.TimerHandle | None = None
        self._free_at = 0.0

    async def open(self) -> None:
        """Listen. What stands in the way is logged, and the daemon does without."""
        try:
            sock = _listen(self._folder)
        except OSError as error:
            log.warning("control unavailable", text=f"{self._folder / SOCKET}: {error.strerror}")
            return
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Client(self), sock=sock, backlog=256)

    def close(self) -> None:
        """Listen no more; answers that are under way are not waited for."""
        if self._server is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self._folder / SOCKET)
        self._server.close()
        for client in [*self.clients]:
            client.drop()

    def enter(self, client: Client) -> bool:
        """Whether there is room for one more client, if need be that of a quiet one."""
        uid = client.peer.uid
        privileged = uid in (0, os.geteuid())
        same = {each for each in self.clients if each.peer.uid == uid}
        if not privileged and len(same) >= MOST_PER_USER and not self._drop_one_of(same):
            return False
        if len(self.clients) >= MOST_CLIENTS and not self._drop_one_of(self.clients):
            return False
        self.clients.add(client)
        return True

    def reserve(self, size: int) -> bool:
        """Whether there is room for a body, if need be that of a quiet client's."""
        while self.bytes + size > MOST_BYTES:
            if not self._drop_one_of({each for each in self.clients if each.owes_body}):
                return False
        self.bytes += size
        return True

    def _drop_one_of(self, clients: set[Client]) -> bool:
        """Drop the client that has been quiet for longest, if it has been for long enough."""
        quiet = min(clients, key=lambda each: each.quiet_since, default=None)
        if quiet is None or time.monotonic() - quiet.quiet_since < QUIET:
            return False
        self.clients.discard(quiet)
        quiet.drop()
        return True

    def leave(self, client: Client) -> None:
        self.clients.discard(client)

    def ready(self, client: Client) -> None:
        """A client has sent a request: it is served in its turn."""
        self._ready.append(client)
        if self._pump is None:
            loop = asyncio.get_running_loop()
            self._pump = loop.call_later(max(0.0, self._free_at - loop.time()), self._serve_one)

    def _serve_one(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            self._ready.popleft().serve()
        finally:
            taken = loop.time() - began
            pause = taken * (1 / SHARE - 1)
            self._free_at = began + taken + pause
            self._pump = loop.call_later(pause, self._serve_one) if self._ready else None


def _listen(folder: Path) -> socket.socket:
    """The socket, in its place, for those who may use it. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fresh = f"{SOCKET}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / fresh)
        with address(folder, fresh) as path:
            # Nobody may come in before it is known who.
            before = os.umask(0o177)
            try:
                sock.bind(path)
            finally:
                os.umask(before)
        gid = group_id(GROUP)
        if gid is not None:
            try:
                os.chown(folder / fresh, -1, gid)
            except PermissionError:
                text = f"the daemon is no member of {GROUP}, so that only its own group may ask it"
                log.warning("control restricted", text=text)
        os.chmod(folder / fresh, 0o660)
        sock.listen(256)
        sock.setblocking(False)
        # In one step, whatever an earlier daemon has left there.
        os.rename(folder / fresh, folder / SOCKET)
    except OSError:
        sock.close()
        raise
    return sock
