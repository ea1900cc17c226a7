"""What waits for a warm process to read it: its jobs, and the tokens to begin them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import socket
import struct
import termios
from collections.abc import Callable

from workerd.handlers.warm.assignment import Assignment
from workerd.handlers.warm.protocol import frame

_CHUNK = 1 << 16
#: How many frames are written at once.
_MOST_FRAMES = 64
#: The number of a frame, see `child`.
_TOKEN = struct.Struct("=Q")


class Tokens:
    """A socket with the numbers of the jobs that may begin: whoever reads one has the job.

    Both ends stay open here, to take them back.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self._theirs, self._ours = socket.socketpair()
        #: What is yet to be sent.
        self._unsent = b""

    def fileno(self) -> int:
        """The descriptor for the process to read from."""
        return self._theirs.fileno()

    def add(self, number: int) -> None:
        """Let the process begin this job, once `send` is called."""
        self._unsent += _TOKEN.pack(number)

    def send(self) -> None:
        """Send as many tokens as there is room for; each answer of the process may make more."""
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                sent = self._ours.send(self._unsent, socket.MSG_DONTWAIT)
                self._unsent = self._unsent[sent:]

    def take_back(self) -> set[int]:
        """The numbers that the process has not read, and never will."""
        taken, self._unsent = self._unsent, b""
        with contextlib.suppress(BlockingIOError):
            while data := self._theirs.recv(_CHUNK, socket.MSG_DONTWAIT):
                taken += data
        return {number for (number,) in _TOKEN.iter_unpack(taken)}

    def close(self) -> None:
        """Close both ends: the process reads the end of the file."""
        self._ours.close()
        self._theirs.close()


class Inbox:
    """The pipe of one process, with its jobs.

    With ``tokens``, the process begins a job only when it has read the job's token, and those that
    it has not begun can be taken back. ``before_sending`` is called before any is sent.
    """

    def __init__(
        self, pipe: int, tokens: Tokens | None, before_sending: Callable[[], object]
    ) -> None:
        """``pipe`` is the end to write to."""
        os.set_blocking(pipe, False)
        self._loop = asyncio.get_running_loop()
        self._pipe = pipe
        self._tokens = tokens
        self._before_sending = before_sending
        #: Counts the frames.
        self._number = 0
        #: What is yet to be sent of each frame, by number, in order.
        self._unsent: dict[int, bytes | memoryview] = {}
        #: Whether the pipe has no room at present.
        self._is_full = False

    def put(self, assignment: Assignment, max_attempts: int) -> None:
        """Add a job; `send` sends all that were put since the last time."""
        self._number = assignment.number = self._number + 1
        data = self._unsent[assignment.number] = frame(
            assignment.number, assignment.job, max_attempts
        )
        assignment.size = len(data)
        if self._tokens is not None:
            self._tokens.add(assignment.number)

    def send(self) -> None:
        """Write as far as the pipe takes it; a process that does not read holds nobody up."""
        if self._pipe < 0:
            return
        self._before_sending()
        if self._tokens is not None:
            self._tokens.send()
        try:
            while self._unsent:
                pieces = list(itertools.islice(self._unsent.items(), _MOST_FRAMES))
                sent = os.writev(self._pipe, [piece for _, piece in pieces])
                for number, piece in pieces:
                    if sent < len(piece):
                        self._unsent[number] = memoryview(piece)[sent:]
                        break
                    sent -= len(piece)
                    del self._unsent[number]
        except BlockingIOError:
            self._loop.add_writer(self._pipe, self.send)
            self._is_full = True
            return
        except BrokenPipeError:
            pass  # the process has ended, which is reported soon
        if self._is_full:
            self._is_full = False
            self._loop.remove_writer(self._pipe)

    def send_tokens(self) -> None:
        """Send the tokens that there was no room for, once the process has read others."""
        if self._tokens is not None:
            self._tokens.send()

    def take_back(self, assignments: list[Assignment]) -> list[Assignment]:
        """Those of these jobs that have not begun, and never will: always the last."""
        if self._tokens is None:
            return []
        unread = self._tokens.take_back()
        back = [assignment for assignment in assignments if assignment.number in unread]
        for assignment in back:
            unread.remove(assignment.number)
            # Of a frame that is in the pipe in part, the rest has to follow.
            if len(self._unsent.get(assignment.number, b"")) == assignment.size:
                del self._unsent[assignment.number]
        if unread:
            for number in sorted(unread):
                self._tokens.add(number)
            self.send()
        return back

    def unread(self) -> int:
        """How many bytes of what was put the process has not read."""
        return sum(map(len, self._unsent.values())) + bytes_in(self._pipe)

    @property
    def closed(self) -> bool:
        return self._pipe < 0

    def close(self) -> None:
        """Close it: the process reads the end of the file."""
        if not self.closed:
            self._loop.remove_writer(self._pipe)
            os.close(self._pipe)
            self._pipe = -1
            if self._tokens is not None:
                self._tokens.close()


def bytes_in(pipe: int) -> int:
    """How many bytes of a pipe have not been read."""
    count = fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0))
    return int(struct.unpack("i", count)[0])
