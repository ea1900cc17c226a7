"""The local socket: who may ask a running instance, and how much (docs/control.md).

Everything is bounded, and a client can hold up nobody but itself: it has one request at a time,
is not read while that is worked on, and is dropped when it does not read its answers. All clients
together get a part of the loop's time, whatever they send. What the answers are is in `answers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import socket
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from workerd import log
from workerd.ask import GROUP, MAX_BODY, MAX_LINE, SOCKET, VERSION, Busy, Elsewhere, address
from workerd.errors import WorkerdError
from workerd.exits import (
    EX_DATAERR,
    EX_PROTOCOL,
    EX_SOFTWARE,
    EX_TEMPFAIL,
    exit_status,
)

#: Clients at once.
MOST_CLIENTS = 64
#: The same of one user, unless that is root or our own.
MOST_PER_USER = 32
#: A client that has owed the rest of a request for so many seconds makes room for another.
QUIET = 2.0
#: Seconds for a client to send its next request, all of it, and to read the answer.
IDLE = 30.0
#: What all bodies together may take, in bytes.
MOST_BYTES = 64 << 20
#: Answers that wait for the broker, as for the confirm of a job, of all clients. Fewer than
#: clients, so that there is room for those who ask why.
MOST_UNCONFIRMED = 32
#: The part of the loop's time that answers may take.
SHARE = 0.2

#: SO_PEERGROUPS of <asm-generic/socket.h>, which Python has no name for.
_SO_PEERGROUPS = 59
#: The most that Python asks for, in bytes: 256 groups.
_GROUPS_SIZE = 1024

Request = Mapping[str, Any]
Answer = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks, as the kernel knows it."""

    uid: int
    pid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        pid, uid, gid = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        groups: tuple[int, ...] = ()
        # Whoever is in more of them than this has the first one alone.
        with contextlib.suppress(OSError):
            raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
            groups = struct.unpack(f"{len(raw) // 4}I", raw)
        return cls(uid, pid, frozenset((gid, *groups)))


class Answers(Protocol):
    """Who answers; called in the loop, one request at a time."""

    def answer(
        self, request: Request, body: bytes, peer: Peer
    ) -> Answer | Coroutine[Any, Any, Answer]:
        """The answer, or what will bring it. Raises WorkerdError."""


class Control:
    """The socket of an instance, from `open` to `close`."""

    def __init__(self, folder: Path, answers: Answers) -> None:
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


class Client(asyncio.Protocol):
    """A connection; see docs/control.md for what is said on it."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._transport: asyncio.Transport
        self.peer: Peer
        self._buffer = bytearray()
        #: How much of the buffer has been searched for the end of the line.
        self._searched = 0
        self._request: Request | None = None
        self._length = 0
        #: Whether a request is complete, and waits for its turn or its answer.
        self._serving = False
        self._writable = True
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._gone = False
        self._quiet_since = time.monotonic()

    @property
    def quiet_since(self) -> float:
        """Since when it owes us a request, or the reading of an answer."""
        return float("inf") if self._serving else self._quiet_since

    @property
    def owes_body(self) -> bool:
        """Whether a part of a body has to come yet."""
        return self._length > len(self._buffer) and not self._serving

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # One answer at most waits for it to be read.
        self._transport.set_write_buffer_limits(high=0)
        self.peer = Peer.of(transport.get_extra_info("socket"))
        self._expect()
        if not self._control.enter(self):
            self._refuse(EX_TEMPFAIL, "too many clients", "busy")

    def connection_lost(self, _error: Exception | None) -> None:
        self._gone = True
        self._control.leave(self)
        self._forget_body()
        self._buffer.clear()
        if self._timer:
            self._timer.cancel()
        if self._task:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        if not self._serving:
            self._advance()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._buffer += data
        if not self._serving:
            self._advance()

    def drop(self) -> None:
        self._forget_body()
        self._transport.abort()

    def _expect(self) -> None:
        """It has IDLE seconds from now on for its next request."""
        self._quiet_since = time.monotonic()
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(IDLE, self.drop)

    def _advance(self) -> None:
        """Take the next request out of what has come, if all of it is there."""
        if self._request is None and not self._read_line():
            return
        if not self._writable or len(self._buffer) < self._length:
            # An answer that is not read: nothing more is read either, nor is its sender waited for.
            (self._transport.resume_reading if self._writable else self._transport.pause_reading)()
            return
        self._serving = True
        self._transport.pause_reading()
        if self._timer:
            self._timer.cancel()
        self._control.ready(self)

    def _read_line(self) -> bool:
        end = self._buffer.find(b"\n", self._searched)
        self._searched = len(self._buffer)
        if end > MAX_LINE or (end < 0 and self._searched > MAX_LINE):
            self._refuse(EX_DATAERR, f"a request is a line of at most {MAX_LINE} bytes")
            return False
        if end < 0:
            return False
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            self._refuse(EX_DATAERR, "a request is a JSON object on one line")
            return False
        if request.get("version") != VERSION:
            self._refuse(EX_PROTOCOL, f"this daemon speaks version {VERSION}", "elsewhere")
            return False
        length = request.get("length", 0)
        if type(length) is not int or not 0 <= length <= MAX_BODY:
            self._refuse(EX_DATAERR, f"length: a number from 0 to {MAX_BODY}")
            return False
        if not self._control.reserve(length):
            self._refuse(EX_TEMPFAIL, "too many bytes are in memory", "busy")
            return False
        self._request, self._length = request, length
        return True

    def serve(self) -> None:
        """It is its turn."""
        if self._gone:
            return
        request, self._request = self._request, None
        assert request is not None
        with memoryview(self._buffer) as view:
            body = bytes(view[: self._length])
        del self._buffer[: self._length]
        try:
            answer = self._control.answers.answer(request, body, self.peer)
            if isinstance(answer, Mapping):
                self._tell(answer)
                return
            if self._control.unconfirmed >= MOST_UNCONFIRMED:
                answer.close()
                raise Busy(EX_TEMPFAIL, "too many others wait for the broker")
        except Exception as error:  # noqa: BLE001 - see `_tell_error`
            self._tell_error(error)
            return
        self._control.unconfirmed += 1
        self._task = asyncio.get_running_loop().create_task(self._later(answer), name="answer")

    async def _later(self, answer: Coroutine[Any, Any, Answer]) -> None:
        try:
            self._tell(await answer)
        except Exception as error:  # noqa: BLE001 - see `_tell_error`
            self._tell_error(error)
        finally:
            self._control.unconfirmed -= 1
            self._task = None

    def _tell_error(self, error: Exception) -> None:
        """Whatever a client may ask, and however wrong we are about it: no job suffers from it."""
        if not isinstance(error, WorkerdError):
            text = "".join(traceback.format_exception(error))
            log.error("control bug", uid=self.peer.uid, pid=self.peer.pid, traceback=text)
            self._tell(_refusal(EX_SOFTWARE, "a bug of the daemon's; its log says more", None))
            return
        code = "elsewhere" if isinstance(error, Elsewhere) else None
        if isinstance(error, Busy):
            code = "busy"
        self._tell(_refusal(exit_status(error), str(error), code))

    def _tell(self, answer: Answer) -> None:
        """The answer; then it may send its next request."""
        self._forget_body()
        self._serving = False
        if self._gone:
            return
        self._expect()
        self._write(answer if "ok" in answer else {"ok": True, **answer})
        self._transport.resume_reading()
        if self._buffer:
            self._advance()

    def _refuse(self, status: int, text: str, code: str | None = None) -> None:
        """The answer to what is no request: the connection ends."""
        self._write(_refusal(status, text, code))
        self._transport.close()

    def _write(self, answer: Answer) -> None:
        self._transport.write(json.dumps({"version": VERSION, **answer}).encode() + b"\n")

    def _forget_body(self) -> None:
        self._control.bytes -= self._length
        self._length = 0


def _refusal(status: int, text: str, code: str | None) -> Answer:
    answer = {"ok": False, "status": status, "error": text}
    return answer if code is None else {**answer, "code": code}


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
        gid = _group(GROUP)
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


def _group(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def member_of(name: str | None) -> Callable[[Peer], bool]:
    """Whether a peer is in this group, which is looked up now."""
    gid = _group(name) if name else None
    return lambda peer: gid is not None and gid in peer.groups
