"""AMQP properties to and from `Message`, and a codec for headers that no sender can break.

pika's own turns 1.5 into 1, -5 into 18446744073709551611 (before 1.4), and cannot encode a
float. It raises for a timestamp in milliseconds (pika issue 1698) or a thousand nested
arrays, inside frame processing: that ends the connection, the broker sends the message
again, and so for ever.
"""

from __future__ import annotations

import datetime
import decimal
import struct
from types import SimpleNamespace
from typing import Any

import pika
import pika.data
import pika.spec

from workerd.core.job import UNREADABLE, Message
from workerd.core.republish import without_orders

#: The field types of fixed size, read as RabbitMQ reads them
#: (https://www.rabbitmq.com/amqp-0-9-1-errata).
_NUMBERS = {
    ord(kind): struct.Struct(">" + layout)
    for kind, layout in {
        "t": "?", "b": "b", "B": "B", "s": "h", "u": "H", "I": "i",
        "i": "I", "l": "q", "L": "q", "f": "f", "d": "d",
    }.items()
}  # fmt: skip
_SIZE = struct.Struct(">I")
_DECIMAL = struct.Struct(">Bi")
_TIMESTAMP = struct.Struct(">Q")
#: Deeper tables would make json, repr and copy recurse too far elsewhere.
_MAX_DEPTH = 32


class Timestamp(int):
    """Seconds since 1970 that no datetime can hold; meant as milliseconds, as a rule."""


class Incoming:
    """A message as it came: its tag, and whether the broker sent it before."""

    __slots__ = ("message", "redelivered", "tag")

    def __init__(self, tag: int, redelivered: bool, message: Message) -> None:
        self.tag = tag
        self.redelivered = redelivered
        self.message = message


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
    """The properties of a message to be published: by this way alone, and so as payload alone."""
    message = without_orders(message)
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


def decode_headers(encoded: bytes, offset: int) -> tuple[dict[Any, Any], int]:
    """A header table, in place of pika's decoder; one that cannot be decoded stays bytes."""
    end = offset + _SIZE.size + _SIZE.unpack_from(encoded, offset)[0]
    try:
        return _table(encoded[offset + _SIZE.size : end], 1), end
    except (ValueError, IndexError, struct.error):
        return {UNREADABLE: encoded[offset + _SIZE.size : end]}, end


def _table(data: bytes, depth: int) -> dict[Any, Any]:
    table = {}
    at = 0
    while at < len(data):
        name = data[at + 1 : at + 1 + data[at]]
        table[decode_text(name)], at = _value(data, at + 1 + len(name), depth)
    return table


def _array(data: bytes, depth: int) -> list[Any]:
    array = []
    at = 0
    while at < len(data):
        value, at = _value(data, at, depth)
        array.append(value)
    return array


def _value(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """The value whose type stands at ``at``, and where the next field begins.

    Raises ValueError, IndexError or struct.error for what is no value.
    """
    kind = data[at]
    at += 1
    number = _NUMBERS.get(kind)
    if number:
        return number.unpack_from(data, at)[0], at + number.size
    match chr(kind):
        case "V":
            return None, at
        case "D":
            places, digits = _DECIMAL.unpack_from(data, at)
            return decimal.Decimal(digits).scaleb(-places), at + _DECIMAL.size
        case "T":
            return _moment(_TIMESTAMP.unpack_from(data, at)[0]), at + _TIMESTAMP.size
    at += _SIZE.size
    end = at + _SIZE.unpack_from(data, at - _SIZE.size)[0]
    inside = data[at:end]
    if len(inside) < end - at or depth >= _MAX_DEPTH:
        raise ValueError("cut off, or too deep")
    match chr(kind):
        case "S":
            return decode_text(inside), end
        case "x":
            return inside, end
        case "A":
            return _array(inside, depth + 1), end
        case "F":
            return _table(inside, depth + 1), end
    raise ValueError(f"a field of type {chr(kind)!r}")


def decode_text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _moment(seconds: int) -> datetime.datetime | Timestamp:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return Timestamp(seconds)


def _encode_value(pieces: list[bytes], value: Any) -> int:
    """pika's encoder, and what it lacks."""
    if isinstance(value, float):
        pieces.append(struct.pack(">cd", b"d", value))
    elif isinstance(value, Timestamp):
        pieces.append(struct.pack(">cQ", b"T", value))
    else:
        return int(_encode_with_pika(pieces, value))
    return 9


# Tables inside tables go through pika.data's own name for the encoder of values; pika.spec
# reads header tables through its name `data`.
_encode_with_pika = pika.data.encode_value
pika.data.encode_value = _encode_value
pika.spec.data = SimpleNamespace(**{**vars(pika.data), "decode_table": decode_headers})
