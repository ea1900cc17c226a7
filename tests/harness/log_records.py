"""Records of the log, and the journal that takes them."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from tests.harness.waiting import TIMEOUT
from workerd.log_formats import LogRecord, Write

WHEN = 1767323045.678
EVIL = 'a\nb\r\x1b[31m\0"=\x85\u2028\u202e\udc80 c\\ \t'


def record(name: str = "done", level: str = "info", **fields: object) -> LogRecord:
    return (WHEN, level, name, fields)


def kept_in(kept: list[LogRecord]) -> Write:
    def write(*records: LogRecord) -> Sequence[LogRecord]:
        kept.extend(records)
        return ()

    return write


class Journal:
    """A datagram socket that understands the journal's native protocol."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(TIMEOUT)

    def receive(self) -> dict[str, str]:
        """The fields of the next entry."""
        data = self.socket.recv(1 << 20)
        fields: dict[str, str] = {}
        while data:
            line, data = data.split(b"\n", 1)
            name, equals, value = line.partition(b"=")
            if not equals:
                (size,) = struct.unpack_from("<Q", data)
                value, data = data[8 : 8 + size], data[8 + size :]
                assert data.startswith(b"\n")
                data = data[1:]
            assert re.fullmatch(b"[A-Z][A-Z0-9_]{0,63}", name), name
            assert name.decode() not in fields
            fields[name.decode()] = value.decode()
        return fields


def socket_of(write: Write) -> socket.socket:
    cells = getattr(write, "__closure__", ())
    (found,) = (cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "sendto"))
    assert isinstance(found, socket.socket)
    return found
