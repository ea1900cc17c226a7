"""How events are written: that nothing can forge them, and which writer it is."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.harness.log_records import EVIL, WHEN, Journal, record, socket_of
from tests.harness.waiting import TIMEOUT
from workerd import log_formats
from workerd.log import Log
from workerd.log_formats import LogRecord, Write

ToJournal = Callable[..., Write]
Written = Callable[..., list[str]]
Begin = Callable[..., Log]


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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("two\nlines here", r'"two\nlines here"'),
        ('say "x"', r'"say \"x\""'),
        ('x\\" job_id=forged', r'"x\\\" job_id=forged"'),
        ("\x1b[31m\x9b red", r'"\u001b[31m\x9b red"'),
        ("\x1b[31m", r"\x1b[31m"),
    ],
)
def test_a_field_is_escaped_once(value: str, shown: str) -> None:
    reader, writer = os.pipe()
    log_formats.console(writer)((0.0, "info", "failed", {"error": value}))
    line = os.read(reader, 4096).decode()
    os.close(reader)
    os.close(writer)
    assert line.partition(" ")[2] == f"failed error={shown}\n"


# The journal.


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
