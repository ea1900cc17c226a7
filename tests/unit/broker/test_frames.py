"""Messages out of what a broker sends: what is read without pika is what pika would have read."""

from __future__ import annotations

import struct
from typing import Any

import pika
import pika.frame
import pika.spec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.octets import field
from workerd.broker.codec import message_of
from workerd.broker.frames import arrival_at
from workerd.core.job import UNREADABLE

pytestmark = pytest.mark.pika

SHORT = st.text(max_size=40).filter(lambda text: len(text.encode()) < 256)
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": SHORT,
        "content_encoding": SHORT,
        "headers": st.dictionaries(SHORT, st.integers(0, 9) | SHORT, max_size=3),
        "delivery_mode": st.integers(0, 255),
        "priority": st.integers(0, 255),
        "correlation_id": SHORT,
        "reply_to": SHORT,
        "expiration": SHORT,
        "message_id": SHORT,
        "timestamp": st.integers(0, 2**63),
        "type": SHORT,
        "user_id": SHORT,
        "app_id": SHORT,
        "cluster_id": SHORT,
    },
)


def frames(
    properties: bytes,
    body: bytes,
    *,
    channel: int = 1,
    tag: int = 1,
    redelivered: bool = False,
    pieces: int = 1,
) -> bytes:
    """A delivery as a broker sends it; these properties begin with their flags."""
    method = pika.spec.Basic.Deliver("consumer", tag, redelivered, "exchange", "key")
    header = struct.pack(">HHQ", 60, 0, len(body)) + properties
    size = -(-len(body) // pieces) or 1
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(
        [
            pika.frame.Method(channel, method).marshal(),
            struct.pack(">BHI", 2, channel, len(header)) + header + b"\xce",
            *(pika.frame.Body(channel, part).marshal() for part in parts),
        ]
    )


def encoded(**properties: Any) -> bytes:
    return b"".join(pika.BasicProperties(**properties).encode())


@given(PROPERTIES, st.binary(max_size=99), st.integers(1, 2**16 - 1), st.booleans())
def test_a_delivery_is_read_as_pika_reads_it(
    properties: dict[str, Any], body: bytes, channel: int, redelivered: bool
) -> None:
    header = encoded(**properties)
    data = frames(header, body, channel=channel, tag=7, redelivered=redelivered)
    arrival = arrival_at(b"before" + data + b"after", 6)
    assert arrival is not None
    assert (arrival.channel, arrival.end) == (channel, 6 + len(data))
    assert (arrival.incoming.tag, arrival.incoming.redelivered) == (7, redelivered)
    assert arrival.incoming.message == message_of(pika.BasicProperties().decode(header), body)


def test_what_is_not_text_and_what_is_no_table_come_as_with_pika() -> None:
    flags = struct.pack(">H", 1 << 13 | 1 << 7)
    inside = field(b"f", b"no such type")
    header = flags + struct.pack(">I", len(inside)) + inside + b"\x02\xff\xfe"
    arrival = arrival_at(frames(header, b"x"), 0)
    assert arrival is not None
    message = arrival.incoming.message
    assert message == message_of(pika.BasicProperties().decode(header), b"x")
    assert message.message_id == b"\xff\xfe"
    assert set(message.headers) == {UNREADABLE}


def test_what_is_not_all_there_is_left_alone() -> None:
    data = frames(encoded(message_id="a", headers={"a": "b"}), b"body")
    assert arrival_at(data, 0)
    assert not any(arrival_at(data[:end], 0) for end in range(len(data)))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frames(encoded(type="t"), b"x" * 10, pieces=2), id="a body in two frames"),
        pytest.param(frames(encoded()[:-2] + b"\0\1\0\0", b""), id="more flags"),
        pytest.param(pika.frame.Heartbeat().marshal() * 4, id="heartbeats"),
        pytest.param(
            pika.frame.Method(1, pika.spec.Basic.Ack(1)).marshal() * 4, id="another method"
        ),
    ],
)
def test_what_is_rare_is_left_to_pika(data: bytes) -> None:
    assert arrival_at(data, 0) is None


@given(st.data())
def test_spoilt_bytes_are_no_delivery_or_another_one(data: st.DataObject) -> None:
    whole = bytearray(frames(encoded(message_id="a", headers={"a": "b"}, type="t"), b"body"))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3)):
        whole[at] = data.draw(st.integers(0, 255))
    arrival = arrival_at(bytes(whole), 0)
    assert arrival is None or arrival.end <= len(whole)
