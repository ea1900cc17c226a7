"""What a program says of its job in its report file."""

from __future__ import annotations

import os

import pytest

from tests.harness.commands import logged
from workerd.handlers import report_file
from workerd.handlers.report_file import LIMIT, ReportFile


def written(*pieces: bytes) -> ReportFile:
    """What is read of a file with these bytes."""
    file = report_file.create()
    try:
        for piece in pieces:
            os.write(file, piece)
        return report_file.read(file)
    finally:
        os.close(file)


def test_most_programs_say_nothing() -> None:
    assert written() == ReportFile()


@pytest.mark.parametrize(
    ("line", "seconds"), [(b"5m", 300.0), (b" 2.5 ", 2.5), (b"0", 0.0), (b"250ms", 0.25)]
)
def test_a_delay_is_a_duration_or_seconds(line: bytes, seconds: float) -> None:
    assert written(b"retry-after=" + line + b"\n").retry_after == seconds


def test_the_last_delay_counts_and_notes_are_joined() -> None:
    text = b"note=one\nretry-after=1\nnote= two \nretry-after=2"
    assert written(text) == ReportFile(2.0, "one; two")


@pytest.mark.parametrize("line", [b"retry-after=soon", b"retry-after=-1", b"else=1", b"\xff\x1b"])
def test_a_line_that_says_nothing_is_logged_and_left_out(line: bytes) -> None:
    with logged() as events:
        assert written(line, b"\n\nnote=n\n") == ReportFile(note="n")
    assert [event["event"] for event in events] == ["report ignored"]


def test_only_the_beginning_is_read() -> None:
    assert len(written(b"note=" + b"x" * 2 * LIMIT).note) == LIMIT - len("note=")


def test_what_is_written_by_name_and_by_number_is_not_overwritten() -> None:
    file = report_file.create()
    try:
        with open(f"/proc/self/fd/{file}", "w") as by_name:
            os.write(file, b"note=a\n")
            by_name.write("note=b\n")
        assert report_file.read(file).note
    finally:
        os.close(file)
