"""The codec for headers: every type of field, and bytes that are none."""

from __future__ import annotations

import datetime
import decimal
import math
import struct
from typing import Any

import pika
import pika.spec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.octets import array, field, long_string, packed, table
from workerd.broker.codec import Timestamp, message_of, properties_of
from workerd.core.job import UNREADABLE, Message
from workerd.core.republish import portable_headers

pytestmark = pytest.mark.pika

NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)

NAMES = st.text(max_size=20) | st.binary(max_size=20).filter(lambda name: not is_text(name))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.datetimes(
        datetime.datetime(1970, 1, 1), timezones=st.just(datetime.UTC)
    ).map(lambda moment: moment.replace(microsecond=0))
    | st.builds(Timestamp, st.integers(10**12, 2**63 - 1))
    | st.builds(lambda digits, places: decimal.Decimal(digits).scaleb(-places),
                st.integers(-(2**31), 2**31 - 1), st.integers(0, 9)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def decoded(inside: bytes) -> Any:
    """The headers that a message has whose table has this inside."""
    encoded = struct.pack(">HI", 1 << 13, len(inside)) + inside
    return message_of(pika.BasicProperties().decode(encoded), b"").headers


def sent(message: Message) -> Message:
    """The message as its receiver sees it."""
    encoded = b"".join(properties_of(message).encode())
    return message_of(pika.BasicProperties().decode(encoded), message.body)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (packed("t", "B", 1), True),
        (packed("b", "b", -5), -5),
        (packed("B", "B", 200), 200),
        (packed("s", "h", -5), -5),
        (packed("u", "H", 60_000), 60_000),
        (packed("I", "i", -5), -5),
        (packed("i", "I", 2**32 - 1), 2**32 - 1),
        (packed("l", "q", -5), -5),
        (packed("L", "q", -5), -5),
        (packed("f", "f", 1.5), 1.5),
        (packed("d", "d", 0.1), 0.1),
        (packed("D", "Bi", 2, -314), decimal.Decimal("-3.14")),
        (packed("T", "Q", int(NOON.timestamp())), NOON),
        (packed("T", "Q", 1_700_000_000_000), 1_700_000_000_000),
        (long_string("é".encode()), "é"),
        (long_string(b"\xff"), b"\xff"),
        (b"x" + long_string(b"\0\xff")[1:], b"\0\xff"),
        (b"V", None),
        (array(packed("b", "b", 1) + b"V"), [1, None]),
        (table(field(b"\xff", packed("b", "b", 1))), {b"\xff": 1}),
    ],
)
def test_every_type_of_field_is_decoded(value: bytes, expected: object) -> None:
    headers = decoded(field(b"before", b"V") + field(b"h", value) + field(b"after", b"V"))
    assert headers == {"before": None, "h": expected, "after": None}
    assert type(headers["h"]) in (type(expected), Timestamp)


@settings(max_examples=50)
@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_headers_survive_being_sent(headers: dict[Any, Any]) -> None:
    assert sent(Message(headers=headers)).headers == headers


@given(VALUES)
def test_whatever_was_decoded_may_be_sent_again(value: object) -> None:
    own = dict.fromkeys(("x-workerd-attempt", "x-death", "x-first-death-queue"), value)
    assert portable_headers({"h": value, **own}) == ({"h": value}, [])


@pytest.mark.parametrize("wrap", [table, array])
def test_a_table_too_deep_to_be_handled_stays_bytes(wrap: Any) -> None:
    inside = b""
    for _ in range(1000):
        inside = wrap(inside if wrap is array else field(b"", inside or b"V"))
    encoded = field(b"h", inside)
    assert decoded(encoded) == {UNREADABLE: encoded}
    assert portable_headers(decoded(encoded)) == ({}, ["all of them"])


@given(st.binary(max_size=60))
def test_no_bytes_raise(inside: bytes) -> None:
    headers = decoded(inside)
    assert headers == {UNREADABLE: inside} or UNREADABLE not in headers


@pytest.mark.parametrize("inside", [b"\x05ab", field(b"h", b"?"), field(b"h", b"S\0\0\0\x09ab")])
def test_a_broken_table_stays_bytes_and_the_properties_after_it_are_read(inside: bytes) -> None:
    encoded = struct.pack(">HI", 1 << 13 | 1 << 7, len(inside)) + inside + b"\x02id"
    message = message_of(pika.BasicProperties().decode(encoded), b"")
    assert (message.headers, message.message_id) == ({UNREADABLE: inside}, "id")


def test_what_cannot_be_sent_is_dropped_by_name() -> None:
    deep: object = None
    for _ in range(40):
        deep = [deep]
    bad = {"deep": deep, "wide": 2**63, "long": "x" * 70_000, "n" * 300: 1, "odd": object()}
    kept, dropped = portable_headers({"good": 1.5, **bad, "also": {"pi": math.pi}})
    assert kept == {"good": 1.5, "also": {"pi": math.pi}}
    assert dropped == ["deep", "wide", "long", "n" * 80, "odd"]
