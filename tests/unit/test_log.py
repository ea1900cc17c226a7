"""The log: what is written, and that nobody ever waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.harness.log_records import Journal, kept_in
from tests.harness.waiting import TIMEOUT, until
from workerd import log, log_formats
from workerd.log import Log
from workerd.log_formats import LogRecord, Write

ToJournal = Callable[..., Write]
Written = Callable[..., list[str]]
Begin = Callable[..., Log]


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
