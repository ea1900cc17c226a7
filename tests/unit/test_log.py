"""The log: what is written, that nothing can forge it, and that nobody ever waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.harness.waiting import TIMEOUT, until
from workerd import log, log_formats
from workerd.log import Log
from workerd.log_formats import LogRecord, Write

ToJournal = Callable[..., Write]
Written = Callable[..., list[str]]
Begin = Callable[..., Log]

WHEN = 1767323045.678
EVIL = 'a\nb\r\x1b[31m\0"=\x85\u2028\u202e\udc80 c\\ \t'


def record(name: str = "done", level: str = "info", **fields: object) -> LogRecord:
    return (WHEN, level, name, fields)


@pytest.fixture
def written() -> Iterator[Written]:
    """What a writer makes of records, line by line."""
    ends: list[int] = []

    def write(writer: Callable[[int], Write], *records: LogRecord) -> list[str]:
        reading, writing = os.pipe()
        ends.append(reading)
        try:
            for each in records:
                writer(writing)(each)
        finally:
            os.close(writing)
        data = b""
        while more := os.read(reading, 65536):
            data += more
        assert data.endswith(b"\n")
        return data.decode().removesuffix("\n").split("\n")

    yield write
    for end in ends:
        os.close(end)


def kept_in(kept: list[LogRecord]) -> Write:
    def write(*records: LogRecord) -> Sequence[LogRecord]:
        kept.extend(records)
        return ()

    return write


@pytest.fixture
def a_log() -> Iterator[Begin]:
    """A log whose thread has ended what it writes at the end of the test."""
    logs: list[Log] = []

    def begin(write: Write, level: log_formats.Level = "info") -> Log:
        new = Log()
        new.begin(write, level, "1")
        logs.append(new)
        return new

    yield begin
    for each in logs:
        each.flush(TIMEOUT)


# Text of unknown origin.


@given(st.text())
@example(EVIL)
def test_safe_text_is_one_line_without_any_control_character(text: str) -> None:
    safe = log_formats.safe(text)
    assert len(safe.splitlines()) <= 1
    assert not re.search("[\0-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", safe)
    safe.encode()


def test_safe_text_shows_what_was_there() -> None:
    assert log_formats.safe("tab\tünïcödé 🎉") == "tab\tünïcödé 🎉"
    assert log_formats.safe("\x1b[0m\n\r\0\x85\u2028\u202e\udc80") == (
        "\\x1b[0m\\n\\r\\x00\\x85\\u2028\\u202e\\udc80"
    )


@given(st.binary())
def test_any_bytes_become_safe_text(data: bytes) -> None:
    assert log_formats.text_of(data) == log_formats.safe(log_formats.text_of(data))
    for line in log_formats.text_lines(data).split("\n"):
        assert line == log_formats.safe(line)


def test_bytes_that_are_not_utf8_are_shown() -> None:
    assert log_formats.text_of(b"a\xff\xc3\xa9\n") == "a\\xff\xe9\\n"
    assert log_formats.text_lines(b"one\n\x1btwo\n\n") == "one\n\\x1btwo"


# The writers.


def test_json_is_one_object_a_line(written: Written) -> None:
    (line,) = written(log_formats.json_lines, record(job_id="a", attempt=2, signal=None))
    assert list(json.loads(line).items()) == [
        ("time", "2026-01-02T03:04:05.678Z"),
        ("level", "info"),
        ("event", "done"),
        ("job_id", "a"),
        ("attempt", 2),
    ]


def test_json_carries_any_text_on_one_line(written: Written) -> None:
    lines = written(log_formats.json_lines, record(job_id=EVIL), record(path=Path("/x")))
    assert len(lines) == 2
    assert json.loads(lines[0])["job_id"] == EVIL
    assert json.loads(lines[1])["path"] == "/x"


def test_the_console_shows_time_event_and_fields(written: Written) -> None:
    clock = time.strftime("%H:%M:%S", time.localtime(WHEN)) + ".678"
    assert written(
        log_formats.console,
        record(job_id="a", attempt=2, reason="", signal=None, instance="1"),
        record(level="warning", text="no such queue"),
    ) == [f"{clock} done job_id=a attempt=2", f'{clock} warning: done text="no such queue"']


def test_a_line_for_stderr_begins_with_its_priority(written: Written) -> None:
    records = [record(level=level) for level in log_formats.LEVELS]
    assert written(log_formats.prefixed, *records) == ["<7>done", "<6>done", "<4>done", "<3>done"]


def test_a_jobs_own_output_is_shown_as_it_was_printed(written: Written) -> None:
    output = record("output", job_id="a", stream="stderr", text='he said "hi" x=1', queue="q")
    assert written(log_formats.prefixed, output) == ['<6>a stderr: he said "hi" x=1']


@pytest.mark.parametrize("writer", [log_formats.console, log_formats.prefixed])
@pytest.mark.parametrize("value", [EVIL, "a b=c", "a\tb=c", "a\u00a0b=c", 'a" b="c', 'a"', "a=b"])
def test_a_value_cannot_forge_a_field_or_a_line(writer: Any, value: str, written: Written) -> None:
    (line,) = written(writer, record(job_id=value, queue="q"))
    # What is left without the quoted values has the two fields and no other.
    assert re.sub(r'"(\\.|[^"\\])*"', "", line).split("done ", 1)[1] == "job_id= queue=q"


def test_an_id_cannot_make_a_line_of_output_look_like_an_event(
    written: Written,
) -> None:
    forged = "done outcome=done job_id=other"
    (line,) = written(
        log_formats.prefixed, record("output", job_id=forged, stream="stdout", text="x")
    )
    assert line == f'<6>"{forged}" stdout: x'


def test_a_writer_survives_a_descriptor_that_somebody_made_non_blocking() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text = "x" * 300_000
    thread = threading.Thread(target=log_formats.json_lines(writing), args=(record(text=text),))
    thread.start()
    with os.fdopen(reading, "rb") as file:
        assert json.loads(file.readline())["text"] == text
    thread.join(TIMEOUT)
    os.close(writing)


# The journal.


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


def socket_of(write: Write) -> socket.socket:
    cells = getattr(write, "__closure__", ())
    (found,) = (cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "sendto"))
    assert isinstance(found, socket.socket)
    return found


def test_a_journal_entry_has_a_field_for_each_fact(journal: Journal, to_journal: ToJournal) -> None:
    to_journal()(record("done", "warning", job_id="a", attempt=2, signal=None, instance="1"))
    assert journal.receive() == {
        "MESSAGE": "done job_id=a attempt=2",
        "MESSAGE_ID": log_formats.message_id("done"),
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "workerd",
        "WORKERD_EVENT": "done",
        "WORKERD_JOB_ID": "a",
        "WORKERD_ATTEMPT": "2",
        "WORKERD_INSTANCE": "1",
    }


@pytest.mark.parametrize(
    "text", ["a\nPRIORITY=0\nMESSAGE=forged", "a\n", "\n", EVIL, "€" * 1000, "a=b", ""]
)
def test_no_value_can_forge_a_field_of_the_journal(
    text: str, journal: Journal, to_journal: ToJournal
) -> None:
    to_journal()(record(job_id=text, text=text, queue="q"))
    entry = journal.receive()
    assert entry.pop("MESSAGE").splitlines() == [
        log_formats._plain(record(job_id=text, text=text, queue="q"))
    ]
    shown = text.encode("utf-8", "backslashreplace").decode()
    assert entry == {
        "MESSAGE_ID": log_formats.message_id("done"),
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "workerd",
        "WORKERD_EVENT": "done",
        "WORKERD_JOB_ID": shown,
        "WORKERD_TEXT": shown,
        "WORKERD_QUEUE": "q",
    }


def test_where_there_is_no_journal_the_fallback_is_used(
    tmp_path: Path, to_journal: ToJournal
) -> None:
    lost: list[LogRecord] = []
    write = to_journal(lost)
    write(record("one"))
    journal = Journal(tmp_path / "journal")
    write(record("two"))
    assert journal.receive()["WORKERD_EVENT"] == "two"
    journal.socket.close()
    write(record("three"))
    assert [name for _, _, name, _ in lost] == ["one", "three"]
    # As when journald is restarted.
    os.unlink(journal.path)
    journal = Journal(tmp_path / "journal")
    write(record("four"))
    assert journal.receive()["WORKERD_EVENT"] == "four"
    journal.socket.close()


# The thread between an event and its writer.


def test_events_are_written_in_order_by_another_thread(a_log: Begin) -> None:
    records: list[LogRecord] = []
    threads: set[int] = set()

    def write(*some: LogRecord) -> Sequence[LogRecord]:
        threads.add(threading.get_ident())
        records.extend(some)
        return ()

    new = a_log(write)
    for number in range(1000):
        new.put("event", "info", {"number": number})
    new.flush(TIMEOUT)
    assert [fields["number"] for *_, fields in records] == list(range(1000))
    assert threads.isdisjoint({threading.get_ident()})


def test_an_event_that_comes_while_a_batch_is_gathered_does_not_end_the_writing(
    a_log: Begin,
) -> None:
    class Busy(deque[LogRecord]):
        """Another thread adds something between the first look at it and the next."""

        def __iter__(self) -> Iterator[LogRecord]:
            each = super().__iter__()
            self.append((time.time(), "info", "meanwhile", {}))
            return each

    records: list[LogRecord] = []
    new = a_log(kept_in(records))
    new._records = Busy()
    new.put("event", "info", {})
    until(lambda: records, "the event")
    assert next(name for _, _, name, _ in records) == "event"


def test_the_level_decides_what_is_written(a_log: Begin) -> None:
    records: list[LogRecord] = []
    new = a_log(kept_in(records), level="warning")
    for level in log_formats.LEVELS:
        new.put(level, level, {})  # type: ignore[arg-type]
    new.flush(TIMEOUT)
    assert [name for _, _, name, _ in records] == ["warning", "error"]


def test_the_fields_of_a_job_are_in_its_events_and_in_no_others(a_log: Begin) -> None:
    records: list[LogRecord] = []
    new = a_log(kept_in(records))
    with log.job_fields(job_id="a", queue="q"):
        new.put("inner", "info", {"queue": "other"})
    new.put("outer", "info", {})
    new.flush(TIMEOUT)
    assert [dict(fields) for *_, fields in records] == [
        {"job_id": "a", "queue": "other", "instance": "1"},
        {"instance": "1"},
    ]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe: the end to read and the end to write."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def test_a_reader_that_is_stuck_holds_up_nobody_and_what_it_misses_is_counted(
    pipe: tuple[int, int], a_log: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "BACKLOG", 100)
    reading, writing = pipe
    new = a_log(log_formats.json_lines(writing))
    new.put("long", "info", {"text": "x" * 1_000_000})
    assert select.select([reading], [], [], TIMEOUT)[0]
    for _ in range(1000):
        new.put("event", "info", {})
    new.flush(0.05)
    assert len(new._records) == 100, "one of them half written"
    with os.fdopen(os.dup(reading), "rb") as file:
        entries = [json.loads(file.readline()) for _ in range(101)]
    names = [entry["event"] for entry in entries]
    assert names == ["long", *["event"] * 99, "log dropped"]
    assert (entries[-1]["level"], entries[-1]["records"]) == ("warning", 1000 - 99)


def test_a_reader_that_went_away_ends_nothing(pipe: tuple[int, int], a_log: Begin) -> None:
    reading, writing = pipe
    os.close(reading)
    new = a_log(log_formats.json_lines(writing))
    for _ in range(3):
        new.put("event", "info", {})
    new.flush(TIMEOUT)
    records: list[LogRecord] = []
    new.begin(kept_in(records), "info", "1")
    new.put("later", "info", {})
    until(lambda: len(records) == 2, "both events")
    assert [name for _, _, name, _ in records] == ["later", "log dropped"]
    assert records[1][3]["records"] == 3


def test_a_journal_that_is_stopped_for_a_while_misses_nothing(
    journal: Journal, to_journal: ToJournal, a_log: Begin
) -> None:
    new = a_log(to_journal())
    for number in range(2000):
        new.put("event", "info", {"number": number, "text": "x" * 1000})
    new.flush(0.05)
    assert new._records, "the socket took everything"
    numbers = [journal.receive()["WORKERD_NUMBER"] for _ in range(2000)]
    assert numbers == [str(number) for number in range(2000)]


def test_what_a_stopped_journal_misses_is_counted(
    journal: Journal, to_journal: ToJournal, a_log: Begin
) -> None:
    new = a_log(to_journal(timeout=0.001))
    for _ in range(100):
        new.put("event", "info", {"text": "x" * 50_000})
    new.flush(TIMEOUT)
    dropped = new.dropped
    assert 0 < dropped < 100
    for _ in range(100 - dropped):
        assert journal.receive()["WORKERD_EVENT"] == "event"
    new.put("later", "info", {})
    assert journal.receive()["WORKERD_EVENT"] == "later"
    assert journal.receive()["WORKERD_RECORDS"] == str(dropped)


def test_an_entry_that_no_datagram_can_hold_is_counted_too(
    journal: Journal, to_journal: ToJournal, a_log: Begin
) -> None:
    new = a_log(to_journal())
    new.put("event", "info", {"text": "x" * (8 << 20)})
    new.put("later", "info", {})
    assert journal.receive()["WORKERD_EVENT"] == "later"
    assert journal.receive()["WORKERD_RECORDS"] == "1"


def test_before_it_begins_an_event_is_written_at_once() -> None:
    new = Log()
    records: list[LogRecord] = []
    new._write = kept_in(records)
    new.put("event", "error", {"text": "x"})
    ((_, level, name, fields),) = records
    assert (level, name, dict(fields)) == ("error", "event", {"text": "x", "instance": None})


# Which writer it is.


@pytest.fixture
def stderr(tmp_path: Path) -> Iterator[TextIO]:
    """A file to be stderr."""
    with (tmp_path / "stderr").open("w") as file:
        yield file


def test_a_file_or_pipe_gets_json(stderr: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    log_formats.writer("auto")(record())
    assert json.loads(Path(stderr.name).read_text())["event"] == "done"


def test_a_terminal_gets_the_console_format(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb") as reading, os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        log_formats.writer("auto")(record(job_id="a"))
        assert reading.readline().endswith(b".678 done job_id=a\r\n")


def test_the_style_that_is_asked_for_is_taken(
    stderr: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    for style in ("json", "console"):
        log_formats.writer(style)(record())
    one, two = Path(stderr.name).read_text().splitlines()
    assert json.loads(one)["event"] == "done"
    assert two.endswith(".678 done")


def test_a_stderr_that_is_the_journal_gets_its_own_protocol(
    stderr: TextIO, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    status = os.fstat(stderr.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    monkeypatch.setattr(log_formats, "JOURNAL_SOCKET", journal.path)
    write = log_formats.writer("auto")
    with socket_of(write):
        write(record())
        assert journal.receive()["MESSAGE"] == "done"
        # A stream, as it is when the socket is hidden from a service: lines with a priority.
        os.unlink(journal.path)
        write(record(level="error"))
    assert Path(stderr.name).read_text() == "<3>done\n"


def test_somebody_elses_journal_is_not_taken_for_ours(
    stderr: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    log_formats.writer("auto")(record())
    assert json.loads(Path(stderr.name).read_text())["event"] == "done"
