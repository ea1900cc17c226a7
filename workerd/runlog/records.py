"""The records of a run log, as bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

#: Stands in each record; 0 in those of versions that did not number deliveries.
VERSION = 1

#: A process begins, or goes on in a new segment. The key tells processes apart.
OPEN = b"O"
#: A delivery is in hand, and its job cannot start yet.
WAIT = b"W"
#: A run begins; its delivery came on this channel.
START = b"S"
#: A run has its slot, and does not begin yet; its delivery came on this channel.
TAKE = b"T"
#: A run that had its slot begins.
BEGIN = b"G"
#: A run has ended with a verdict, sent on this channel or one of `dedup`'s stand-ins.
END = b"E"
#: A run has ended with a verdict that must not settle a redelivery.
OVER = b"V"
#: A run has ended, and its job goes back.
BACK = b"B"
#: A job goes back that did not run.
RETURNED = b"R"
#: A job that had gone back, or is sure to, has come here, and will run. In place of a channel
#: stands the process that had it, and beside it that one's number for it; 0: any one of this key.
RECALLED = b"A"
#: What waited is in hand no more, and does not go back.
DROPPED = b"D"
#: A channel was lost, and perhaps what was sent on it.
LOST = b"L"
#: A channel was closed in an orderly way: all that was sent on it has been read.
CLOSED = b"C"
#: So many attempts of a job, in place of a channel, were cut off, all in all.
CUT_OFF = b"X"

# The number of a delivery tells apart those of equal jobs in one process; that it begins anew
# after 65,535 does no harm.
_BODY = struct.Struct("<cBHi16sd")

_SUM = struct.Struct("<I")

#: The size of a record in bytes.
RECORD = _BODY.size + _SUM.size

#: Kind, version, number of the delivery, channel, key, and seconds since 1970.
Record = tuple[bytes, int, int, int, bytes, float]


def encode(
    kind: bytes, channel: int, key: bytes, when: float, serial: int = 0, version: int = VERSION
) -> bytes:
    body = _BODY.pack(kind, version, serial, channel, key, when)
    return body + _SUM.pack(zlib.crc32(body))


def decode(data: bytes) -> Iterator[Record]:
    """The records in ``data``, a multiple of RECORD bytes; those that are spoilt are skipped."""
    for offset in range(0, len(data), RECORD):
        body = data[offset : offset + _BODY.size]
        if _SUM.unpack_from(data, offset + _BODY.size)[0] == zlib.crc32(body):
            yield _BODY.unpack(body)
