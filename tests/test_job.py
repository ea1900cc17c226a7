"""A job: what becomes of a message's properties, and the copy that goes to the dead letters."""

from __future__ import annotations

import datetime
import uuid
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from workerd.broker.codec import properties_of
from workerd.job import (
    ATTEMPT,
    EXPIRES,
    LAST_FAILURE,
    REPLAY,
    UNREADABLE,
    Message,
    Outcome,
    Place,
    Report,
    count,
    dead_letter,
    decode,
    has_expired,
    new_id,
    portable_headers,
)

MESSAGE = Message(
    b"body",
    type="resize",
    message_id="id",
    content_type="text/plain",
    content_encoding="identity",
    correlation_id="call-1",
    reply_to="workerd.reply.x",
    timestamp=1_700_000_000,
    priority=3,
    headers={"traceparent": "00-1"},
)
FAILED = Report(Outcome.FAILED, "exit-status", exit_status=3, error="no such photo")
PLACE = Place("host1", "2")
# 2026-01-02 03:04:05.678 UTC
NOW = 1767323045.678


# Decoding.


def test_a_message_becomes_the_first_attempt_at_a_job() -> None:
    job = decode(MESSAGE, "photos")
    assert (job.id, job.named, job.queue, job.type) == ("id", True, "photos", "resize")
    assert (job.attempt, job.redelivered, job.fault) == (1, False, None)
    assert job.body == b"body"
    assert job.message is MESSAGE
    assert decode(MESSAGE, "photos", redelivered=True).redelivered


def test_the_attempt_counts_the_starts_that_the_header_tells() -> None:
    assert decode(replace(MESSAGE, headers={ATTEMPT: 4}), "q").attempt == 5


@pytest.mark.parametrize("message_id", [None, ""])
def test_a_message_without_an_id_is_given_one_for_the_log(message_id: str | None) -> None:
    first, second = (decode(replace(MESSAGE, message_id=message_id), "q") for _ in range(2))
    assert not first.named
    assert first.id != second.id
    assert uuid.UUID(first.id)
    assert first.key == second.key


@pytest.mark.parametrize("type_", [None, ""])
def test_an_empty_type_is_none(type_: str | None) -> None:
    assert decode(replace(MESSAGE, type=type_), "q").type is None


def test_a_header_is_shown_unless_it_is_our_own() -> None:
    job = decode(replace(MESSAGE, headers={"x-a": 5, ATTEMPT: 2}), "q")
    assert (job.header("x-a"), job.header("absent"), job.header(ATTEMPT)) == (5, None, None)


@pytest.mark.parametrize(
    "name",
    [
        "type",
        "message_id",
        "content_type",
        "content_encoding",
        "correlation_id",
        "reply_to",
        "expiration",
    ],
)
def test_a_property_that_is_not_utf8_is_a_fault_of_the_job(name: str) -> None:
    changes: dict[str, Any] = {name: b"\xff" * 100}
    job = decode(replace(MESSAGE, **changes), "q")
    assert job.fault
    assert job.fault.reason == "bad-property"
    assert name in str(job.fault)
    assert len(str(job.fault)) < 300
    assert isinstance(job.id, str)
    assert job.type in ("resize", None)
    assert job.named == (name != "message_id")


def test_headers_that_cannot_be_decoded_are_a_fault_of_the_job() -> None:
    job = decode(replace(MESSAGE, headers={UNREADABLE: b"\xff"}), "q")
    assert job.fault
    assert job.fault.reason == "bad-headers"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0, 0),
        (7, 7),
        (1_000_000, 1_000_000),
        (1_000_001, 0),
        (-1, 0),
        (2**64, 0),
        (True, 0),
        (None, 0),
        ("7", 0),
        (b"7", 0),
        (1.5, 0),
        ([7], 0),
    ],
)
def test_whatever_is_not_a_sane_number_counts_as_none(value: object, number: int) -> None:
    assert count(value) == number


# The key.


def test_every_delivery_of_one_attempt_has_the_same_key() -> None:
    bookkeeping = {"x-delivery-count": 3, "x-acquired-count": 4, "x-death": [{"count": 1}]}
    again = replace(MESSAGE, headers={**MESSAGE.headers, **bookkeeping}, expiration="60000")
    assert decode(again, "q", redelivered=True).key == decode(MESSAGE, "q").key


@pytest.mark.parametrize(
    "changes",
    [
        {"body": b"other"},
        {"message_id": "other"},
        {"type": "other"},
        {"timestamp": 1_700_000_001},
        {"correlation_id": "call-2"},
        {"headers": {ATTEMPT: 1}},
        {"headers": {REPLAY: "1"}},
        {"headers": {LAST_FAILURE: "2026-01-01T00:00:00.000Z"}},
    ],
    ids=str,
)
def test_what_makes_another_job_of_it_makes_another_key(changes: dict[str, Any]) -> None:
    assert decode(replace(MESSAGE, **changes), "q").key != decode(MESSAGE, "q").key


def test_the_same_message_in_another_queue_has_another_key() -> None:
    assert decode(MESSAGE, "q").key != decode(MESSAGE, "p").key


def test_a_dead_letter_that_is_moved_back_is_not_taken_for_the_original() -> None:
    # RabbitMQ's shovel moves a letter as it is: it sets no replay mark.
    letter, _ = dead_letter(decode(MESSAGE, "q"), FAILED, PLACE, NOW)
    assert decode(letter, "q").key != decode(MESSAGE, "q").key


short = st.text("a(),'\"\\ None0", max_size=3)


@given(st.tuples(short, st.binary(max_size=3)), st.tuples(short, st.binary(max_size=3)))
def test_no_two_messages_have_one_key(one: tuple[str, bytes], two: tuple[str, bytes]) -> None:
    assume(one != two)
    keys = {decode(Message(body, message_id=text), "q").key for text, body in (one, two)}
    keys |= {decode(Message(body, correlation_id=text), "q").key for text, body in (one, two)}
    assert len(keys) == 4


# Ids.


def test_an_id_is_a_uuid_of_version_7_made_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_767_323_045_678_901_234)
    made = uuid.UUID(new_id())
    assert str(made) == str(made).lower()
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert made.int >> 80 == 1_767_323_045_678


@given(st.integers(0, 2**48 - 1), st.binary(min_size=16, max_size=16))
def test_every_instant_and_all_randomness_make_a_valid_id(ms: int, randomness: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time_ns", lambda: ms * 1_000_000)
        patch.setattr("os.urandom", lambda _: randomness)
        made = uuid.UUID(new_id())
    assert (made.version, made.variant, made.int >> 80) == (7, uuid.RFC_4122, ms)
    # Of the 74 random bits none is lost.
    random = int.from_bytes(randomness, "big")
    assert made.int & ((1 << 62) - 1) == random & ((1 << 62) - 1)
    assert made.int >> 64 & 0xFFF == random >> 64 & 0xFFF


def test_ids_sort_by_the_millisecond_they_were_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    instants = [5, 15, 16, 255, 256, 2**40, 2**47]
    made = []
    for ms in instants:
        monkeypatch.setattr("time.time_ns", lambda ms=ms: ms * 1_000_000)
        made.append(new_id())
    assert made == sorted(made)


def test_ids_are_unique() -> None:
    assert len({new_id() for _ in range(10_000)}) == 10_000


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
    letter, _ = dead_letter(decode(message, "q" * 200), report, Place("h" * 64, "i" * 32), NOW)
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


# Expiry.


@pytest.mark.parametrize(
    ("expires", "expired"),
    [
        (1_767_323_045_677, True),
        (1_767_323_045_679, False),
        (1, True),
        (0, False),
        (-1, False),
        (True, False),
        ("1", False),
        (None, False),
    ],
)
def test_a_job_expires_at_the_instant_in_its_own_header(expires: object, expired: bool) -> None:
    assert has_expired(Message(headers={EXPIRES: expires}), NOW) is expired


def test_a_job_without_that_header_never_expires() -> None:
    assert not has_expired(Message(), NOW)


def expires_of_letter(**changes: Any) -> object:
    letter = the_letter(replace(MESSAGE, **changes))
    assert letter.expiration is None, "the broker would drop the letter"
    return letter.headers.get(EXPIRES)


def test_a_time_to_live_becomes_an_instant() -> None:
    assert expires_of_letter(expiration="1500") == 1_700_000_001_500
    assert expires_of_letter(expiration="1500", timestamp=None) == int(NOW * 1000) + 1500
    assert expires_of_letter(expiration="9" * 30) == 2**63 - 1
    assert expires_of_letter() is None


@pytest.mark.parametrize("text", ["", "-1", "1.5", "x", "٣", b"\xff"])
def test_a_time_to_live_that_is_none_is_left_out(text: str | bytes) -> None:
    assert expires_of_letter(expiration=text) is None


def test_an_instant_that_was_set_before_stays() -> None:
    assert expires_of_letter(headers={EXPIRES: 5}, expiration="1500") == 5
    assert expires_of_letter(headers={EXPIRES: 2**63}, expiration="1500") == 1_700_000_001_500
    assert expires_of_letter(headers={EXPIRES: "soon"}) is None
