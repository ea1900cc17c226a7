"""The records of a run log, as bytes."""

from __future__ import annotations

import pytest

from tests.harness.run_logs import RESIZE, SLEEP
from workerd.runlog.records import END, RECORD, START, VERSION, decode, encode


@pytest.mark.parametrize("offset", range(RECORD))
def test_a_record_with_a_changed_byte_is_skipped_and_the_next_is_read(offset: int) -> None:
    spoilt = bytearray(encode(START, 1, SLEEP, 1.0) + encode(END, 1, SLEEP, 2.0))
    spoilt[offset] ^= 0x10
    assert [record[0] for record in decode(bytes(spoilt))] == [END]


def test_a_record_is_read_as_it_was_written() -> None:
    data = encode(START, 7, SLEEP, 1.5, serial=0xFFFF) + encode(END, -2, RESIZE, 2.0)
    assert len(data) == 2 * RECORD
    assert list(decode(data)) == [
        (START, VERSION, 0xFFFF, 7, SLEEP, 1.5),
        (END, VERSION, 0, -2, RESIZE, 2.0),
    ]
