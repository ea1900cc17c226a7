"""Deliveries, read out of what a broker sends without pika's frame objects. Pure.

A short job costs pika more than all the rest of its life: three frames are decoded into seven
objects, and each is looked up in three tables. What is read here is a delivery whose frames all
are there, one after the other, which is nearly every one; the others are left to pika.

The layout: AMQP 0-9-1, 2.3.5 (frames), 4.2.6 (content) and basic.deliver.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from workerd.broker.codec import Incoming, decode_headers, decode_text
from workerd.core.job import Message

#: Type, channel and payload size of a frame, then of a method its class and number.
_METHOD = struct.Struct(">BHIHH")
#: Type, channel and payload size of a frame, then of a content header class, weight, the size
#: of the body, and the flags of the properties that it has.
_HEADER = struct.Struct(">BHIHHQH")
_FRAME = struct.Struct(">BHI")
_TAG = struct.Struct(">QB")
_TIMESTAMP = struct.Struct(">Q")
_END = 0xCE
#: A frame is so many bytes longer than its payload.
_AROUND = _FRAME.size + 1


class Arrival(NamedTuple):
    """A message as it came: on which channel, and where the next frame begins."""

    channel: int
    incoming: Incoming
    end: int


def arrival_at(data: bytes, start: int) -> Arrival | None:
    """Read the message whose frames begin at ``start``; None: there is none, or not all of it."""
    try:
        kind, channel, size, class_id, method_id = _METHOD.unpack_from(data, start)
        if kind != 1 or class_id != 60 or method_id != 60:
            return None
        at = start + _METHOD.size
        tag, redelivered = _TAG.unpack_from(data, at + 1 + data[at])
        header = start + size + _AROUND
        kind, on, size, _class, _weight, length, flags = _HEADER.unpack_from(data, header)
        if kind != 2 or on != channel or flags & 1:
            return None
        content = end = header + size + _AROUND
        properties = data[header + _HEADER.size : content - 1]
        body = b""
        if length:
            kind, on, size = _FRAME.unpack_from(data, end)
            if kind != 3 or on != channel or size != length:
                return None
            body = data[end + _FRAME.size : end + _FRAME.size + size]
            end += size + _AROUND
        if not data[header - 1] == data[content - 1] == data[end - 1] == _END:
            return None
        message = _message(properties, flags, body)
    except (struct.error, IndexError):
        return None
    return Arrival(channel, Incoming(tag, bool(redelivered & 1), message), end)


def _message(data: bytes, flags: int, body: bytes) -> Message:
    """A message with the properties that these flags name, which come in the order of the bits."""
    at = 0
    headers: Mapping[str, object] = {}
    content_type = content_encoding = correlation_id = reply_to = expiration = None
    message_id = kind = priority = timestamp = None
    if flags & 0x8000:
        content_type, at = _short(data, at)
    if flags & 0x4000:
        content_encoding, at = _short(data, at)
    if flags & 0x2000:
        headers, at = decode_headers(data, at)
    if flags & 0x1000:
        at += 1  # the delivery mode
    if flags & 0x0800:
        priority = data[at]
        at += 1
    if flags & 0x0400:
        correlation_id, at = _short(data, at)
    if flags & 0x0200:
        reply_to, at = _short(data, at)
    if flags & 0x0100:
        expiration, at = _short(data, at)
    if flags & 0x0080:
        message_id, at = _short(data, at)
    if flags & 0x0040:
        (timestamp,) = _TIMESTAMP.unpack_from(data, at)
        at += _TIMESTAMP.size
    if flags & 0x0020:
        kind, at = _short(data, at)
    return Message(
        body,
        kind,
        message_id,
        content_type,
        content_encoding,
        correlation_id,
        reply_to,
        expiration,
        timestamp,
        priority,
        headers,
    )


def _short(data: bytes, at: int) -> tuple[str | bytes, int]:
    end = at + 1 + data[at]
    return decode_text(data[at + 1 : end]), end
