"""The copies of a job that are published: what goes along, and what is said of its failure."""

from __future__ import annotations

import datetime
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.samples import FAILED, MESSAGE, NOW, PLACE
from workerd.broker.codec import properties_of
from workerd.core.decode import decode
from workerd.core.job import (
    ATTEMPT,
    COPY,
    EXPIRES,
    FIRST_FAILURE,
    LAST_FAILURE,
    MAX_ATTEMPTS,
    REPLAY,
    UNREADABLE,
    Message,
    Outcome,
    Report,
)
from workerd.core.republish import Origin, dead_letter, next_attempt, portable_headers
from workerd.deadletters.letter import renewed, replayed

# Headers that may be published again.


def test_the_senders_headers_go_along_and_ours_and_the_brokers_do_not() -> None:
    sent = {"traceparent": "00-1", "n": 5, "nested": {"list": [1, None, True]}, "bytes": b"\xff"}
    not_sent = {
        ATTEMPT: 1,
        "x-workerd-anything": 1,
        "x-death": [],
        "x-first-death-reason": "expired",
        "x-last-death-queue": "q",
        "x-delivery-count": 2,
        "x-acquired-count": 3,
    }
    assert portable_headers({**not_sent, **sent}) == (sent, [])


ORDERS = (
    *("CC", "BCC", "x-delay", "x-deduplication-header", "x-cache-ttl", "x-stream-filter-value"),
    *("x-recent-history-no-store", "x-received-from"),
)


@pytest.mark.parametrize("name", ORDERS)
def test_a_header_that_the_broker_would_obey_is_in_no_copy(name: str) -> None:
    message = replace(MESSAGE, headers={name: ["payroll"], "cc": "a letter's, not an order"})
    job = decode(message, "q")
    for copy, dropped in (
        next_attempt(job, 1, "copy", 0.0),
        dead_letter(job, FAILED, PLACE, 0.0),
        replayed(message, "replay"),
    ):
        assert name not in copy.headers
        assert copy.headers["cc"] == "a letter's, not an order"
        assert dropped == [name]
    for whole in (message, renewed(message)):
        assert name not in properties_of(whole).headers


def test_the_reply_queue_of_another_channel_is_asked_for_by_no_copy() -> None:
    direct = replace(MESSAGE, reply_to="amq.rabbitmq.reply-to")
    assert properties_of(direct).reply_to is None
    token = replace(MESSAGE, reply_to="amq.rabbitmq.reply-to.g1h2.x==")
    assert properties_of(token).reply_to == token.reply_to


@pytest.mark.parametrize(
    "value",
    [2**63, -(2**63) - 1, {1, 2}, [2**63], {"k" * 256: 1}, {"deep": {"in": [2**63]}}],
    ids=repr,
)
def test_a_header_that_cannot_be_sent_is_dropped_and_named(value: object) -> None:
    assert portable_headers({"bad": value, "good": 1}) == ({"good": 1}, ["bad"])


def test_a_table_that_is_too_deep_is_dropped() -> None:
    value: object = 1
    for _ in range(1000):
        value = [value]
    assert portable_headers({"deep": value, "good": 1}) == ({"good": 1}, ["deep"])


@pytest.mark.parametrize("name", ["n" * 256, "ü" * 128])
def test_a_name_that_cannot_be_sent_is_dropped_and_told_in_short(name: str) -> None:
    assert portable_headers({name: 1, "good": 1}) == ({"good": 1}, [str(name)[:80]])


def test_what_does_not_fit_the_frame_is_dropped_but_not_what_comes_after_it() -> None:
    headers = {"a": "x" * 40_000, "b": "x" * 40_000, "c": "x" * 10_000}
    kept, dropped = portable_headers(headers)
    assert list(kept) == ["a", "c"]
    assert dropped == ["b"]


values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1])
    | st.floats()
    | st.text(max_size=300)
    | st.binary(max_size=300)
    | st.builds(Decimal.scaleb, st.integers(-(2**31), 2**31 - 1).map(Decimal), st.integers(-255, 0))
    | st.datetimes(min_value=datetime.datetime(1970, 1, 1)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.binary(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.mark.pika
@given(st.dictionaries(st.text(max_size=300).map("n".__add__), values, max_size=6))
def test_pika_can_send_every_header_that_is_kept(headers: dict[str, Any]) -> None:
    kept, dropped = portable_headers(headers)
    assert kept.keys() | set(dropped) == {name if name in kept else name[:80] for name in headers}
    assert encoded_size(Message(headers=kept)) <= 64 * 1024 + 100


# Dead letters.


def the_letter(message: Message = MESSAGE, report: Report = FAILED) -> Message:
    letter, dropped = dead_letter(decode(message, "photos"), report, PLACE, NOW)
    assert not dropped
    return letter


def test_a_dead_letter_is_the_message_with_what_happened_in_its_headers() -> None:
    letter = the_letter(replace(MESSAGE, headers={**MESSAGE.headers, ATTEMPT: 2}))
    assert replace(letter, headers={}) == replace(MESSAGE, headers={})
    assert letter.headers == {
        "traceparent": "00-1",
        "x-workerd-reason": "exit-status",
        "x-workerd-exit-status": 3,
        "x-workerd-error": "no such photo",
        "x-workerd-attempts": 3,
        "x-workerd-queue": "photos",
        "x-workerd-host": "host1",
        "x-workerd-instance": "2",
        "x-workerd-first-failure": "2026-01-02T03:04:05.678Z",
        "x-workerd-last-failure": "2026-01-02T03:04:05.678Z",
    }


def test_a_signal_is_told_and_what_there_was_not_is_left_out() -> None:
    letter = the_letter(report=Report(Outcome.FAILED, "signal", signal="SIGKILL"))
    assert letter.headers["x-workerd-signal"] == "SIGKILL"
    assert not {"x-workerd-exit-status", "x-workerd-error"} & letter.headers.keys()
    assert None not in letter.headers.values()


def test_a_job_without_an_id_keeps_in_its_letter_the_one_from_the_log() -> None:
    job = decode(replace(MESSAGE, message_id=None), "q")
    letter, _ = dead_letter(job, FAILED, PLACE, NOW)
    assert letter.message_id == job.id


def test_the_first_failure_of_several_is_kept() -> None:
    first = {"x-workerd-first-failure": "2025-12-31T00:00:00.000Z"}
    letter = the_letter(replace(MESSAGE, headers=first))
    assert letter.headers["x-workerd-first-failure"] == "2025-12-31T00:00:00.000Z"
    assert letter.headers["x-workerd-last-failure"] == "2026-01-02T03:04:05.678Z"


@pytest.mark.parametrize("forged", ["x" * 40, 5, b"2025", None])
def test_a_first_failure_that_is_none_is_not_believed(forged: object) -> None:
    letter = the_letter(replace(MESSAGE, headers={"x-workerd-first-failure": forged}))
    assert letter.headers["x-workerd-first-failure"] == "2026-01-02T03:04:05.678Z"


@pytest.mark.parametrize("letter", ["x", "ü", "€", "🎉"])
def test_of_a_long_error_the_end_is_kept_in_whole_characters(letter: str) -> None:
    error = "begin" + letter * 9000 + "end"
    kept = the_letter(report=replace(FAILED, error=error)).headers["x-workerd-error"]
    assert isinstance(kept, str)
    assert 8192 - 4 < len(kept.encode()) <= 8192
    assert error.endswith(kept)


def test_an_error_that_is_no_valid_text_is_told_nevertheless() -> None:
    letter = the_letter(report=replace(FAILED, error="a\udcffb"))
    assert letter.headers["x-workerd-error"] == "a\\udcffb"


def test_headers_that_had_to_be_dropped_are_named() -> None:
    job = decode(replace(MESSAGE, headers={"huge": 2**64, "whole": 1}), "q")
    letter, dropped = dead_letter(job, FAILED, PLACE, NOW)
    assert dropped == ["huge"]
    assert letter.headers["whole"] == 1


@pytest.mark.pika
def test_the_largest_dead_letter_fits_one_frame() -> None:
    headers = {f"h{number}": "x" * 250 for number in range(1000)}
    texts = ("type", "message_id", "content_type", "content_encoding", "correlation_id", "reply_to")
    longest: dict[str, Any] = dict.fromkeys(texts, "x" * 255)
    message = Message(headers=headers, timestamp=1, priority=9, **longest)
    report = Report(Outcome.FAILED, "exit-status", 255, "SIGKILL", "x" * 10_000)
    letter, _ = dead_letter(decode(message, "q" * 200), report, Origin("h" * 64, "i" * 32), NOW)
    assert 64 * 1024 < encoded_size(letter) < 131_072 - 22


@pytest.mark.pika
def test_a_message_with_a_fault_can_become_a_dead_letter() -> None:
    changes: dict[str, Any] = {
        each.name: b"\xff" for each in fields(Message) if "bytes | None" in str(each.type)
    }
    assert len(changes) == 7
    job = decode(replace(MESSAGE, **changes, headers={UNREADABLE: b"\xff"}), "q")
    letter, _ = dead_letter(job, FAILED, PLACE, NOW)
    assert UNREADABLE not in letter.headers
    assert encoded_size(letter)


def encoded_size(message: Message) -> int:
    return len(b"".join(properties_of(message).encode()))


def test_a_dead_letter_has_no_time_to_live_and_tells_when_it_was_over() -> None:
    job = decode(replace(MESSAGE, expiration="1500"), "q", now=1_700_000_001.0)
    letter, _ = dead_letter(job, FAILED, PLACE, NOW)
    assert letter.expiration is None, "the broker would drop the letter"
    assert letter.headers[EXPIRES] == job.expires


def test_a_job_that_never_began_has_an_attempt_less() -> None:
    letter = the_letter(report=Report(Outcome.REJECTED, "unknown-type", ran=False))
    assert letter.headers["x-workerd-attempts"] == 0


def test_a_note_is_told_and_bounded() -> None:
    letter = the_letter(report=replace(FAILED, note="x" * 5000 + "end"))
    note = letter.headers["x-workerd-note"]
    assert isinstance(note, str)
    assert note.endswith("xend")
    assert len(note) == 1024


def test_a_dead_letter_keeps_what_was_asked_for_and_forgets_whose_copy_it_is() -> None:
    letter = the_letter(replace(MESSAGE, headers={MAX_ATTEMPTS: 9, ATTEMPT: 8, COPY: "m"}))
    assert letter.headers[MAX_ATTEMPTS] == 9
    assert letter.headers["x-workerd-attempts"] == 9
    assert not {ATTEMPT, COPY} & letter.headers.keys()


# The next attempt.


def test_the_next_attempt_is_the_message_with_one_more_that_is_spent() -> None:
    job = decode(replace(MESSAGE, headers={"traceparent": "00-1", ATTEMPT: 1}), "q")
    copy, dropped = next_attempt(job, job.attempt, "mark", NOW)
    assert not dropped
    assert replace(copy, headers={}) == replace(MESSAGE, headers={})
    assert copy.headers == {
        "traceparent": "00-1",
        ATTEMPT: 2,
        COPY: "mark",
        FIRST_FAILURE: "2026-01-02T03:04:05.678Z",
    }
    assert decode(copy, "q").attempt == 3


def test_a_job_that_is_put_off_has_failed_in_nothing() -> None:
    copy, _ = next_attempt(decode(MESSAGE, "q"), 0, "mark", None)
    assert copy.headers == {"traceparent": "00-1", COPY: "mark"}
    assert decode(copy, "q").attempt == 1


def test_the_next_attempt_keeps_what_was_asked_for_and_when_it_is_too_late() -> None:
    headers = {MAX_ATTEMPTS: 9, EXPIRES: 1_800_000_000_000, FIRST_FAILURE: "2025-12-31T00:00:00Z"}
    copy, _ = next_attempt(decode(replace(MESSAGE, headers=headers), "q"), 1, "mark", NOW)
    assert copy.headers == {**headers, ATTEMPT: 1, COPY: "mark"}


def test_a_time_to_live_is_an_instant_from_then_on() -> None:
    # It would cut the delay short.
    job = decode(replace(MESSAGE, expiration="1500"), "q", now=1_700_000_001.0)
    copy, _ = next_attempt(job, 1, "mark", NOW)
    assert copy.expiration is None
    assert copy.headers[EXPIRES] == job.expires == 1_700_000_002_499


@pytest.mark.parametrize("wish", [0, -1, "3", True, 10**9])
def test_a_wish_that_is_none_does_not_go_along(wish: object) -> None:
    copy, _ = next_attempt(decode(replace(MESSAGE, headers={MAX_ATTEMPTS: wish}), "q"), 1, "m", NOW)
    assert MAX_ATTEMPTS not in copy.headers


def test_no_two_goes_of_a_job_pass_for_each_other() -> None:
    # Nor for one of a replayed letter: the mark of the copy tells them apart.
    original = decode(replace(MESSAGE, headers={REPLAY: "r", LAST_FAILURE: "l"}), "q")
    copies = [next_attempt(original, 1, mark, NOW)[0] for mark in ("a", "b")]
    assert len({original.key, *(decode(copy, "q").key for copy in copies)}) == 3


def test_a_job_without_an_id_gets_the_one_from_the_log_for_all_its_attempts() -> None:
    job = decode(replace(MESSAGE, message_id=None), "q")
    copy, _ = next_attempt(job, 1, "mark", NOW)
    assert copy.message_id == job.id
    assert decode(copy, "q").unique
