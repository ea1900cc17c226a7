"""The documented protocol: the handlers of docs/protocol.md, and what the daemon makes of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.pools import do, in_loop, job, pool
from tests.harness.processes import MissingTool
from tests.harness.trixie import CHECKOUT
from workerd.config.model import Handler
from workerd.core.job import Outcome, Report
from workerd.core.topology import MAX_DELAY
from workerd.handlers.warm.protocol import (
    Answer,
    LogLine,
    Parser,
    Printed,
    ProtocolError,
    Ready,
    StartupError,
    frame,
)

TEXT = (CHECKOUT / "docs" / "protocol.md").read_text()

#: What each documented handler makes of a body.
EXAMPLES = {
    "sh": ("sh", b"a\nb\n", b"2"),
    "javascript": ("node", "größer\n".encode(), "GRÖSSER\n".encode()),
    "perl": ("perl", b"\xff\x00ab", b"ba\x00\xff"),
}


def example(language: str, folder: Path) -> Handler:
    """A handler of the documentation, as an operator would configure it."""
    program, *_ = EXAMPLES[language]
    if shutil.which(program) is None:
        raise MissingTool(f"no {program} is installed")
    (code,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    path = folder / f"handler.{language}"
    path.write_text(code)
    return Handler("test", stream=(program, str(path)))


@pytest.mark.parametrize("language", EXAMPLES)
def test_a_documented_handler_works(language: str, tmp_path: Path) -> None:
    _, body, result = EXAMPLES[language]

    async def scenario() -> list[Report]:
        async with pool(example(language, tmp_path)) as warm:
            reports = [await warm.do(job(each)) for each in (body, b"", body * 100_000)]
            # Headers and an id that need escaping.
            odd = job(body, message_id='ä"}:{,\n', headers={"x": '"length":3}', "ü": [1]})
            return [*reports, await warm.do(odd)]

    usual, empty, large, odd = in_loop(scenario())
    for report in (usual, empty, large, odd):
        assert report.outcome is Outcome.DONE, report
    assert usual.output == odd.output == result
    assert large.output == {"sh": b"200000"}.get(language, result * 100_000)[-64 * 1024 :]


@pytest.mark.parametrize("language", ["javascript", "perl"])
def test_a_failure_in_a_documented_handler_is_a_failed_attempt(
    language: str, tmp_path: Path
) -> None:
    settings = example(language, tmp_path)
    path = Path(settings.stream[1])
    code = path.read_text()
    was, now = {
        "javascript": ("=> body.toString().toUpperCase()", "=> { throw new Error('broken'); }"),
        "perl": ("return scalar reverse $body", 'die "broken"'),
    }[language]
    assert was in code
    path.write_text(code.replace(was, now))
    report = do(settings, job())
    assert (report.outcome, report.reason) == (Outcome.FAILED, "error")
    assert "broken" in report.error


@pytest.mark.parametrize("language", EXAMPLES)
def test_a_documented_handler_takes_several_jobs_at_once(language: str, tmp_path: Path) -> None:
    _, body, result = EXAMPLES[language]

    async def scenario() -> list[Report]:
        async with pool(example(language, tmp_path), depth=10) as warm:
            return await asyncio.gather(*(warm.do(job(body)) for _ in range(40)))

    assert {report.output for report in in_loop(scenario())} == {result}


# Pure


def test_a_frame_is_what_the_documentation_shows() -> None:
    # The example is wrapped there, and its id shortened.
    (shown,) = re.findall(r"    (\{\"frame\":1,\"id\".*?\})\n    hello\n", TEXT, re.DOTALL)
    properties: dict[str, Any] = {"type": "render", "content_type": "text/plain"}
    sent = job(b"hello", message_id="01a20e08", headers={"trace": "abc"}, **properties)
    expected = re.sub(r"\n +", "", shown).replace('"default"', '"work"')
    assert frame(1, sent, 5).decode() == f"{expected}\nhello"


texts = st.text(max_size=20)
headers = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | texts
    | st.binary(max_size=10)
    | st.datetimes()
    | st.decimals(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(texts, inside, max_size=3),
    max_leaves=5,
)


@given(
    st.binary(max_size=50),
    texts.filter(bool),
    st.dictionaries(texts | st.binary(max_size=5), headers, max_size=4),
)
def test_any_job_is_one_line_of_json_and_its_body(
    body: bytes, name: str, given_headers: dict[Any, Any]
) -> None:
    line, _, rest = frame(7, job(body, message_id=name, headers=given_headers), 3).partition(b"\n")

    def no_constant(_: str) -> None:
        raise AssertionError("NaN is no JSON")

    head = json.loads(line, parse_constant=no_constant)
    assert line.startswith(b'{"frame":7,')
    assert line.endswith(b'"length":%d}' % len(body))
    assert line.isascii()
    assert (head["id"], rest) == (name, body)


CONVERSATION = (
    b'{"ready":1}\n'
    b'{"output":"stdout","length":4}\nab\n\n'
    b'{"log":"warning","logger":"a.b","text":"c"}\n'
    b'{"frame":1,"outcome":"done","length":5}\n12345'
    b'{"frame":2,"outcome":"failed","error":"e","retry_after":1.5,"note":"n"}\n'
    b'{"output":"stderr","length":0}\n'
    b'{"frame":3,"outcome":"rejected","last":true}\n'
    b'{"error":"gone"}\n'
)


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=20), st.integers(0, 6))
def test_messages_are_the_same_however_they_are_cut(cuts: list[int], keep: int) -> None:
    parser = Parser(keep)
    edges = [0, *sorted(cuts), len(CONVERSATION)]
    found = [
        message
        for start, end in itertools.pairwise(edges)
        for message in parser.feed(CONVERSATION[start:end])
    ]
    printed = b"".join(each.data for each in found if isinstance(each, Printed))
    assert printed == b"ab\n\n"
    done, failed, rejected = (Outcome.DONE, Outcome.FAILED, Outcome.REJECTED)
    assert [each for each in found if not isinstance(each, Printed)] == [
        Ready(),
        LogLine("warning", "a.b", "c"),
        Answer(1, done, b"12345"[max(0, 5 - keep) :], "", "", None, False, printed=False),
        Answer(2, failed, b"", "e", "n", 1.5, False, printed=False),
        Answer(3, rejected, b"", "", "", None, True, printed=False),
        StartupError("gone"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b'{"frame": 5, "outcome": "done"}',
        b'{"frame":5,"outcome":"done"}',
        b'{"outcome": "done", "frame": 5}',
        b' {"frame": 5, "outcome": "done", "length": 0, "last": false} ',
    ],
)
def test_an_answer_means_the_same_however_it_is_spelt(line: bytes) -> None:
    assert list(Parser(10).feed(line + b"\n")) == [Answer(5, Outcome.DONE)]


@pytest.mark.parametrize(
    "line",
    [
        b'{"frame": 5, "outcome": "done", "last": true}',
        b'{"frame": 5, "outcome": "failed"}',
        b'{"frame": 5, "outcome": "done", "note": "n"}',
    ],
)
def test_an_answer_that_says_more_is_heard_out(line: bytes) -> None:
    (answer,) = Parser(10).feed(line + b"\n")
    assert answer != Answer(5, Outcome.DONE)


@pytest.mark.parametrize("delay", [MAX_DELAY + 1, 1e308, 10**400])
def test_a_delay_is_never_longer_than_any_that_there_is(delay: float) -> None:
    line = b'{"frame":1,"outcome":"failed","retry_after":%s}\n' % str(delay).encode()
    (answer,) = Parser(10).feed(line)
    assert isinstance(answer, Answer)
    assert answer.retry_after == MAX_DELAY


# Whatever a child sends is a message or a breach: nothing else comes of it.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["debug", "done", "failed", "stdout", "\ud800"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside),
    max_leaves=5,
)
KEYS = ["frame", "outcome", "length", "output", "log", "logger", "text", "ready", "error", "note"]
LINES = st.dictionaries(
    st.sampled_from([*KEYS, "retry_after", "last", "printed"]), JSON, max_size=5
).map(lambda line: json.dumps(line).encode() + b"\n")
DEEP = st.sampled_from(
    [
        b'{"log":' + b"[" * depth + b"]" * depth + b"}\n"
        for depth in (1, 100, 900, 970, 990, 100_000)
    ]
)


@given(st.lists(LINES | DEEP | st.binary(max_size=20), max_size=4), st.integers(0, 40))
def test_any_bytes_of_a_child_are_messages_or_a_breach_of_the_protocol(
    pieces: list[bytes], cut: int
) -> None:
    data = b"".join(pieces)
    parser = Parser(10)
    with contextlib.suppress(ProtocolError):
        for part in (data[:cut], data[cut:]):
            for message in parser.feed(part):
                check(message)


def check(message: object) -> None:
    """Each field is of its type."""
    match message:
        case Answer():
            assert type(message.frame) is int
            assert isinstance(message.outcome, Outcome)
            assert isinstance(message.output, bytes)
            assert isinstance(message.error, str)
            assert isinstance(message.note, str)
            assert {type(message.last), type(message.printed)} == {bool}
            if message.retry_after is not None:
                assert isinstance(message.retry_after, float)
                assert 0 <= message.retry_after <= MAX_DELAY
        case LogLine():
            assert message.level in ("debug", "info", "warning", "error")
            assert isinstance(message.logger, str)
            assert isinstance(message.text, str)
        case Printed():
            assert message.stream in ("stdout", "stderr")
            assert isinstance(message.data, bytes)
        case StartupError():
            assert isinstance(message.text, str)
        case _:
            assert isinstance(message, Ready)
