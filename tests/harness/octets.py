"""Messages byte by byte: what no well-behaved client would send, and what came exactly as it came.

pika cannot encode a timestamp in milliseconds, a float or text that is not UTF-8, and decodes some
of them wrongly. So a hostile message is put together from bytes here, and a header table that was
read is kept as bytes too: `headers_of` decodes it by the AMQP 0-9-1 errata, in all its types.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pika
import pika.spec

RAW = "raw"

# The bits of the properties that `Properties` can have, in their order on the wire.
_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE, _CORRELATION_ID = 15, 13, 12, 10
_MESSAGE_ID, _TIMESTAMP, _TYPE = 7, 6, 5


class Properties:
    """Message properties from bytes, for pika's `basic_publish`.

    `headers` is what stands inside the table, such as two results of `field` joined.
    """

    # The number of the class basic, which pika looks for.
    INDEX = 0x003C

    def __init__(
        self,
        *,
        headers: bytes | None = None,
        message_id: bytes | None = None,
        type: bytes | None = None,  # noqa: A002 - the property's name
        content_type: bytes | None = None,
        correlation_id: bytes | None = None,
        timestamp: int | None = None,
    ) -> None:
        table = None if headers is None else struct.pack(">I", len(headers)) + headers
        seconds = None if timestamp is None else struct.pack(">Q", timestamp)
        self._parts = {
            _CONTENT_TYPE: short(content_type),
            _HEADERS: table,
            _DELIVERY_MODE: b"\x02",
            _CORRELATION_ID: short(correlation_id),
            _MESSAGE_ID: short(message_id),
            _TIMESTAMP: seconds,
            _TYPE: short(type),
        }

    def encode(self) -> list[bytes]:
        present = {bit: part for bit, part in self._parts.items() if part is not None}
        return [struct.pack(">H", sum(1 << bit for bit in present)), *present.values()]


def short(text: bytes | None) -> bytes | None:
    """A short string."""
    return None if text is None else struct.pack("B", len(text)) + text


def field(name: bytes, value: bytes) -> bytes:
    """An entry of a table: a name and a value of one of the functions below."""
    return struct.pack("B", len(name)) + name + value


def long_string(text: bytes) -> bytes:
    return b"S" + struct.pack(">I", len(text)) + text


def table(inside: bytes) -> bytes:
    return b"F" + struct.pack(">I", len(inside)) + inside


def array(inside: bytes) -> bytes:
    return b"A" + struct.pack(">I", len(inside)) + inside


def packed(kind: str, layout: str, *values: Any) -> bytes:
    """A value of fixed size: its type's letter, and its `struct` layout."""
    return kind.encode() + struct.pack(">" + layout, *values)


@contextlib.contextmanager
def raw_headers() -> Iterator[None]:
    """While this lasts, header tables that are read stay bytes, for `headers_of`."""

    def leave(encoded: bytes, offset: int) -> tuple[dict[str, bytes], int]:
        (size,) = struct.unpack_from(">I", encoded, offset)
        end = offset + 4 + size
        return {RAW: bytes(encoded[offset + 4 : end])}, end

    before = pika.spec.data
    pika.spec.data = SimpleNamespace(**{**vars(before), "decode_table": leave})
    try:
        yield
    finally:
        pika.spec.data = before


def headers_of(properties: pika.BasicProperties) -> dict[bytes, bytes]:
    """The header table of a message that was read within `raw_headers`: names and raw values."""
    raw = (properties.headers or {RAW: b""})[RAW]
    fields: dict[bytes, bytes] = {}
    offset = 0
    while offset < len(raw):
        start = offset + 1 + raw[offset]
        end = start + 1 + _size(raw, start)
        fields[raw[offset + 1 : start]] = raw[start:end]
        offset = end
    return fields


def _size(raw: bytes, start: int) -> int:
    """How many bytes follow the letter of the type at `start`."""
    kind = raw[start : start + 1]
    if kind in b"SxAF":
        size: int = struct.unpack_from(">I", raw, start + 1)[0]
        return 4 + size
    return {b"V": 0, b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"f": 4}.get(
        kind, 5 if kind == b"D" else 8
    )
