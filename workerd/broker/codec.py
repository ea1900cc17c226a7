"""AMQP properties to and from `Message`, and a header decoder that no sender can break."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pika
import pika.data
import pika.spec

from workerd.job import UNREADABLE, Message

#: Deeper tables would make json, repr and copy recurse too far elsewhere.
_MAX_DEPTH = 32


class Incoming:
    """A message as it came: its tag, and whether the broker sent it before."""

    __slots__ = ("message", "redelivered", "tag")

    def __init__(self, method: Any, properties: Any, body: bytes) -> None:
        self.tag: int = method.delivery_tag
        self.redelivered: bool = method.redelivered
        self.message = message_of(properties, body)


def message_of(properties: Any, body: bytes) -> Message:
    return Message(
        body=body,
        type=properties.type,
        message_id=properties.message_id,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        expiration=properties.expiration,
        timestamp=properties.timestamp,
        priority=properties.priority,
        headers=properties.headers or {},
    )


def properties_of(message: Message) -> pika.BasicProperties:
    return pika.BasicProperties(
        type=message.type,
        message_id=message.message_id,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        expiration=message.expiration,
        timestamp=message.timestamp,
        priority=message.priority,
        headers=dict(message.headers) or None,
        delivery_mode=2,
    )


def _decode_headers(encoded: bytes, offset: int) -> tuple[dict[Any, Any], int]:
    """pika's decoder, except that a table it cannot decode does not end the connection.

    A timestamp in milliseconds (pika issue 1698) or a thousand nested arrays would raise
    inside frame processing, the broker would send the message again, and so for ever.
    """
    (size,) = struct.unpack_from(">I", encoded, offset)
    end = offset + 4 + size
    try:
        table, _ = pika.data.decode_table(encoded, offset)
    except Exception:  # noqa: BLE001 - whatever it stumbles over, the message must not come back
        table = None
    if table is None or _depth_exceeds(table, _MAX_DEPTH):
        table = {UNREADABLE: encoded[offset + 4 : end]}
    return table, end


def _depth_exceeds(value: object, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


# pika.spec reads header tables through its name `data`; tables inside tables go through
# pika.data itself, so that only the outermost one is guarded.
pika.spec.data = SimpleNamespace(**{**vars(pika.data), "decode_table": _decode_headers})
