"""The local socket: who may ask a running instance, and how much (docs/control.md).

Everything is bounded (`limits`), and a client can hold up nobody but itself: a session has one
request at a time, is not read while that is worked on, and is dropped when its answers are not
read. All sessions together get a part of the loop's time, whatever they send. What the answers are
is in `requests`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from pathlib import Path

from workerd import log
from workerd.config.permissions import group_id
from workerd.control.client import address
from workerd.control.limits import Limits
from workerd.control.protocol import GROUP, SOCKET
from workerd.control.session import RequestHandler, Session

#: The part of the loop's time that answers may take.
SHARE = 0.2


class Control:
    """The socket of an instance, from `open` to `close`."""

    def __init__(self, folder: Path, handler: RequestHandler) -> None:
        self._folder = folder
        self._handler = handler
        self._limits = Limits()
        self._server: asyncio.Server | None = None
        #: The sessions whose next request is complete.
        self._ready: deque[Session] = deque()
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
        self._server = await loop.create_unix_server(
            lambda: Session(self._limits, self._handler, self._queue), sock=sock, backlog=256
        )

    def close(self) -> None:
        """Listen no more; answers that are under way are not waited for."""
        if self._server is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self._folder / SOCKET)
        self._server.close()
        for session in [*self._limits.sessions]:
            session.drop()

    def _queue(self, session: Session) -> None:
        """A session has a complete request: the answer is made in its turn."""
        self._ready.append(session)
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
