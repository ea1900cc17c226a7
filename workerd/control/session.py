"""A session on the local socket: requests, one after the other, and their answers."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, cast

from workerd import log
from workerd.control.limits import Limits
from workerd.control.peer import Peer
from workerd.control.protocol import MAX_BODY, MAX_LINE, VERSION, Busy, NotServedHere
from workerd.errors import (
    EX_DATAERR,
    EX_PROTOCOL,
    EX_SOFTWARE,
    EX_TEMPFAIL,
    WorkerdError,
    exit_status,
)

#: Seconds for a client to send its next request, all of it, and to read the answer.
IDLE = 30.0

Request = Mapping[str, Any]
Reply = Mapping[str, object]


class RequestHandler(Protocol):
    """Who answers; called in the loop, one request at a time."""

    def answer(
        self, request: Request, body: bytes, peer: Peer
    ) -> Reply | Coroutine[Any, Any, Reply]:
        """The answer, or what will bring it. Raises WorkerdError."""


class Session(asyncio.Protocol):
    """A connection of a client; see docs/control.md for what is said on it.

    ``ready`` is called when a request is complete, and calls `serve` in its turn.
    """

    def __init__(
        self, limits: Limits, handler: RequestHandler, ready: Callable[[Session], None]
    ) -> None:
        self._limits = limits
        self._handler = handler
        self._ready = ready
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
        """Since when the client owes us a request, or the reading of an answer."""
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
        if not self._limits.enter(self):
            self._refuse(EX_TEMPFAIL, "too many clients", "busy")

    def connection_lost(self, _error: Exception | None) -> None:
        self._gone = True
        self._limits.leave(self)
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
        """End the session now: the client learns no more."""
        self._forget_body()
        self._transport.abort()

    def _expect(self) -> None:
        """The client has IDLE seconds from now on for its next request."""
        self._quiet_since = time.monotonic()
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(IDLE, self.drop)

    def _advance(self) -> None:
        """Take the next request out of what has come, if all of it is there."""
        if self._request is None and not self._read_line():
            return
        if not self._writable or len(self._buffer) < self._length:
            # While an answer is not read, nothing more is read either.
            (self._transport.resume_reading if self._writable else self._transport.pause_reading)()
            return
        self._serving = True
        self._transport.pause_reading()
        if self._timer:
            self._timer.cancel()
        self._ready(self)

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
        if not self._limits.reserve(self.peer.uid, length):
            self._refuse(EX_TEMPFAIL, "too many bytes are in memory", "busy")
            return False
        self._request, self._length = request, length
        return True

    def serve(self) -> None:
        """Answer the request that is complete."""
        if self._gone:
            return
        request, self._request = self._request, None
        assert request is not None
        with memoryview(self._buffer) as view:
            body = bytes(view[: self._length])
        del self._buffer[: self._length]
        try:
            answer = self._handler.answer(request, body, self.peer)
            if isinstance(answer, Mapping):
                self._tell(answer)
                return
            if not self._limits.begin_waiting(self.peer.uid):
                answer.close()
                raise Busy(EX_TEMPFAIL, "too many others wait for the broker")
        except Exception as error:  # noqa: BLE001 - see `_tell_error`
            self._tell_error(error)
            return
        self._task = asyncio.get_running_loop().create_task(self._later(answer), name="answer")

    async def _later(self, answer: Coroutine[Any, Any, Reply]) -> None:
        try:
            self._tell(await answer)
        except Exception as error:  # noqa: BLE001 - see `_tell_error`
            self._tell_error(error)
        finally:
            self._limits.end_waiting(self.peer.uid)
            self._task = None

    def _tell_error(self, error: Exception) -> None:
        """Whatever a client may ask, and however wrong we are about it: no job suffers from it."""
        if not isinstance(error, WorkerdError):
            text = "".join(traceback.format_exception(error))
            log.error("control bug", uid=self.peer.uid, pid=self.peer.pid, traceback=text)
            self._tell(_refusal(EX_SOFTWARE, "a bug of the daemon's; its log says more", None))
            return
        code = "elsewhere" if isinstance(error, NotServedHere) else None
        if isinstance(error, Busy):
            code = "busy"
        self._tell(_refusal(exit_status(error), str(error), code))

    def _tell(self, answer: Reply) -> None:
        """Send the answer; then the client may send its next request."""
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

    def _write(self, answer: Reply) -> None:
        self._transport.write(json.dumps({"version": VERSION, **answer}).encode() + b"\n")

    def _forget_body(self) -> None:
        if self._length:
            self._limits.release(self.peer.uid, self._length)
        self._length = 0


def _refusal(status: int, text: str, code: str | None) -> Reply:
    answer = {"ok": False, "status": status, "error": text}
    return answer if code is None else {**answer, "code": code}
