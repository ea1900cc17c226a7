"""Which jobs a warm process may begin, on their way to it: whoever reads a permit has the job."""

from __future__ import annotations

import contextlib
import socket
import struct

#: The number of a frame, see `child`.
_PERMIT = struct.Struct("=Q")
_CHUNK = 1 << 16


class Permits:
    """The permits of one process; both ends of its socket stay open here, to take them back."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._theirs, self._ours = socket.socketpair()
        #: What is yet to be sent.
        self._unsent = b""

    def fileno(self) -> int:
        """The descriptor for the process to read from."""
        return self._theirs.fileno()

    def add(self, number: int) -> None:
        """It may begin this one, once `send` is called."""
        self._unsent += _PERMIT.pack(number)

    def send(self) -> None:
        """Send as many as there is room for. With each answer of the process there may be more."""
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                sent = self._ours.send(self._unsent, socket.MSG_DONTWAIT)
                self._unsent = self._unsent[sent:]

    def take_back(self) -> set[int]:
        """Those that it has not read, and never will."""
        taken, self._unsent = self._unsent, b""
        with contextlib.suppress(BlockingIOError):
            while data := self._theirs.recv(_CHUNK, socket.MSG_DONTWAIT):
                taken += data
        return {number for (number,) in _PERMIT.iter_unpack(taken)}

    def close(self) -> None:
        """Both ends: the process reads the end of the file."""
        self._ours.close()
        self._theirs.close()
