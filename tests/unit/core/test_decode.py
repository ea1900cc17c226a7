"""A job: what becomes of a message's properties, and the copy that goes to the dead letters."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.harness.samples import FAILED, MESSAGE, NOW, PLACE
from workerd.core.decode import decode
from workerd.core.job import (
    ATTEMPT,
    COPY,
    EXPIRES,
    LAST_FAILURE,
    REPLAY,
    UNREADABLE,
    Message,
    count,
)
from workerd.core.republish import dead_letter
from workerd.ids import new_id

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
    assert decode(Message(headers={EXPIRES: expires}), "q").has_expired(NOW) is expired


def test_a_job_without_that_header_never_expires() -> None:
    assert not decode(Message(), "q").has_expired(NOW)


def expires(now: float = NOW, **changes: Any) -> int | None:
    return decode(replace(MESSAGE, **changes), "q", now=now).expires


def test_a_time_to_live_counts_from_the_end_of_the_second_in_which_it_was_sent() -> None:
    sent = 1_700_000_000
    assert expires(now=sent + 1, expiration="1500") == 1_700_000_002_499
    assert expires(now=sent + 60, expiration="90000") == 1_700_000_090_999


@pytest.mark.parametrize("timestamp", [None, 0, 1, 1_767_323_000, 1_767_323_100, 2**62])
def test_a_time_to_live_counts_from_the_arrival_where_the_timestamp_cannot_be_right(
    timestamp: int | None,
) -> None:
    # The broker has just handed it over, so its time was not over yet.
    assert expires(expiration="1500", timestamp=timestamp) == int(NOW * 1000) + 1500


def test_a_time_to_live_that_is_too_long_is_cut() -> None:
    assert expires(expiration="9" * 19) == 2**63 - 1
    assert expires() is None


@pytest.mark.parametrize("text", ["", "-1", "1.5", "x", "٣", b"\xff", "9" * 5000])
def test_a_time_to_live_that_is_none_is_left_out(text: str | bytes) -> None:
    assert expires(expiration=text) is None


def test_an_instant_that_was_set_before_stays() -> None:
    assert expires(headers={EXPIRES: 5}, expiration="1500") == 5
    assert expires(headers={EXPIRES: 2**63}, expiration="1500") == int(NOW * 1000) + 1500
    assert expires(headers={EXPIRES: "soon"}) is None


# Attempts that ended with their daemon.


def test_a_start_that_was_lost_was_an_attempt() -> None:
    job = decode(replace(MESSAGE, headers={ATTEMPT: 1}), "q", redelivered=True)
    again = job.after_lost_starts(2)
    assert (again.attempt, again.lost_starts, again.key) == (4, 2, job.key)


# Copies.


def test_only_a_copy_with_an_id_is_unique() -> None:
    copy = replace(MESSAGE, headers={COPY: "mark"})
    assert decode(copy, "q").unique
    assert not decode(MESSAGE, "q").unique
    assert not decode(replace(copy, message_id=None), "q").unique
    assert not decode(replace(MESSAGE, headers={COPY: 5}), "q").unique


def test_two_copies_have_two_keys() -> None:
    one, other = (replace(MESSAGE, headers={COPY: mark}) for mark in ("a", "b"))
    assert len({decode(message, "q").key for message in (one, other, MESSAGE)}) == 3
