"""What a job prints: which lines of it reach the log, and the end that is kept."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerd import log, log_formats
from workerd.handlers.output import MAX_LINE, Output


def logged(*pieces: bytes, lines: int = 1000) -> list[str]:
    """The log of a job that prints these pieces; `-5` stands for five lines left out."""
    records: list[log_formats.LogRecord] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "_log", log.Log())
        patch.setattr(log._log, "_write", records.append)
        output = Output("stderr", "info", lines, keep=0)
        for piece in pieces:
            output.feed(piece)
        output.close()
    for _, level, name, fields in records:
        assert (level, fields["stream"]) == ("info", "stderr")
        assert name in ("output", "output omitted")
    return [str(fields.get("text", f"-{fields.get('lines')}")) for *_, fields in records]


def test_every_line_is_an_event_as_soon_as_it_is_complete() -> None:
    records: list[log_formats.LogRecord] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "_log", log.Log())
        patch.setattr(log._log, "_write", records.append)
        output = Output("stdout", "info", 1000, keep=0)
        output.feed(b"one\ntw")
        assert len(records) == 1
        output.feed(b"o\n")
        assert len(records) == 2


def test_lines_are_put_together_from_whatever_pieces_arrive() -> None:
    assert logged(b"on", b"e\ntwo", b"", b"\n\nfo", b"ur") == ["one", "two", "", "four"]


def test_a_job_that_prints_nothing_logs_nothing() -> None:
    assert logged() == []
    assert logged(b"") == []


def test_a_last_line_needs_no_end() -> None:
    assert logged(b"one\ntwo") == logged(b"one\ntwo\n") == ["one", "two"]


def test_line_ends_of_other_systems_are_none_of_the_text() -> None:
    assert logged(b"one\r\ntwo\r\n") == ["one", "two"]


def test_what_could_deceive_a_reader_is_escaped() -> None:
    assert logged(b"\x1b[2Jall is well\rnot\0 \xff\n") == ["\\x1b[2Jall is well\\rnot\\x00 \\xff"]


def test_the_first_and_the_last_lines_are_shown_and_the_rest_is_counted() -> None:
    numbers = b"".join(b"%d\n" % number for number in range(10))
    assert logged(numbers, lines=4) == ["0", "1", "-6", "8", "9"]
    assert logged(numbers, lines=5) == ["0", "1", "2", "-5", "8", "9"]
    assert logged(numbers, lines=10) == [str(number) for number in range(10)]
    assert logged(numbers, lines=1) == ["0", "-9"]
    assert logged(numbers, lines=0) == ["-10"]


@st.composite
def printed(draw: st.DrawFn) -> list[bytes]:
    """Some output, cut at arbitrary places."""
    data = draw(st.lists(st.sampled_from([b"a", b"bc", b"\n"]), max_size=30).map(b"".join))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[start:end] for start, end in pairwise([0, *cuts, len(data)])]


@given(printed(), st.integers(0, 8))
def test_no_line_is_shown_twice_or_uncounted(pieces: list[bytes], limit: int) -> None:
    lines = b"".join(pieces).decode().splitlines()
    first, last = limit - limit // 2, limit // 2
    omitted = len(lines) - limit
    if omitted > 0:
        lines[first : len(lines) - last] = [f"-{omitted}"]
    assert logged(*pieces, lines=limit) == lines


def test_a_long_line_is_cut() -> None:
    longest = b"x" * MAX_LINE
    assert logged(longest + b"\n") == ["x" * MAX_LINE]
    assert logged(longest + b"y\nnext\n") == ["x" * MAX_LINE + "…", "next"]
    assert logged(*[b"x" * 5000] * 100, b"\nnext\n") == ["x" * MAX_LINE + "…", "next"]
    assert logged(b"first\n", longest + b"yz", lines=2) == ["first", "x" * MAX_LINE + "…"]


def test_the_last_lines_of_very_much_output_are_its_last_lines() -> None:
    pieces = [b"".join(b"line %d\n" % (i * 1000 + j) for j in range(1000)) for i in range(200)]
    assert logged(*pieces, lines=4) == [
        "line 0",
        "line 1",
        "-199996",
        "line 199998",
        "line 199999",
    ]


@given(printed(), st.integers(0, 20))
def test_the_tail_is_the_end_of_all_that_was_printed(pieces: list[bytes], keep: int) -> None:
    output = Output("stdout", "debug", 0, keep)
    for piece in pieces:
        output.feed(piece)
    data = b"".join(pieces)
    assert output.tail == data[max(0, len(data) - keep) :]


@pytest.mark.parametrize("piece", [b"x" * 65_536, b"x\n" * 32_768], ids=["no line end", "lines"])
@pytest.mark.parametrize("lines", [0, 3])
def test_a_flood_takes_constant_memory(piece: bytes, lines: int) -> None:
    output = Output("stdout", "debug", lines, keep=65_536)
    tracemalloc.start()
    try:
        for _ in range(500):
            output.feed(piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
