"""The journal, as a socket that a test reads."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.log_records import Journal, kept_in, socket_of
from tests.harness.waiting import TIMEOUT
from workerd import log_formats
from workerd.log import Log
from workerd.log_formats import LogRecord, Write

ToJournal = Callable[..., Write]
Written = Callable[..., list[str]]
Begin = Callable[..., Log]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal")
    yield journal
    journal.socket.close()


@pytest.fixture
def to_journal(tmp_path: Path) -> Iterator[ToJournal]:
    """Makes a writer to the socket `journal`; takes the list of what cannot be sent there."""
    sockets: list[socket.socket] = []

    def make(lost: list[LogRecord] | None = None, timeout: float = TIMEOUT) -> Write:
        undelivered: list[LogRecord] = [] if lost is None else lost
        write = log_formats.journal(str(tmp_path / "journal"), kept_in(undelivered))
        sockets.append(socket_of(write))
        sockets[-1].settimeout(timeout)
        return write

    yield make
    for each in sockets:
        each.close()
