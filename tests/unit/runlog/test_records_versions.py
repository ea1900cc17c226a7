"""Run logs of several versions beside each other: what is not understood may be running there."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from workerd.core.dedup import Elsewhere
from workerd.runlog.lock import hold
from workerd.runlog.records import (
    BACK,
    END,
    LOST,
    OPEN,
    RECALLED,
    RECORD,
    START,
    VERSION,
    WAIT,
    decode,
    encode,
)
from workerd.runlog.writer import RunLog

KEY = bytes(range(16))
NONCE = bytes(range(16, 32))
#: The record of the versions that numbered neither records nor deliveries.
OLD = struct.Struct("<cxxxi16sd")


def old(kind: bytes, channel: int, key: bytes, when: float) -> bytes:
    body = OLD.pack(kind, channel, key, when)
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.fixture
def mine(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path, "2", 3600.0, pytest.fail)


@pytest.fixture
def sibling(tmp_path: Path) -> Callable[[bytes], int]:
    """Has a living instance write this; returns its lock."""

    def write(records: bytes) -> int:
        lock = hold(tmp_path / "1")
        (tmp_path / "1" / "00000001").write_bytes(records)
        return lock

    return write


def says(mine: RunLog) -> Elsewhere:
    mine.look()
    return mine.elsewhere(KEY)


def test_what_an_older_version_runs_and_loses_is_known(
    mine: RunLog, sibling: Callable[[bytes], int], tmp_path: Path
) -> None:
    now = time.time()
    lock = sibling(old(OPEN, 0, NONCE, now) + old(START, 1, KEY, now))
    assert says(mine) is Elsewhere.ATTACHED
    with (tmp_path / "1" / "00000001").open("ab") as file:
        file.write(old(LOST, 1, bytes(16), now))
    assert says(mine) is Elsewhere.ORPHANED
    os.close(lock)
    assert says(mine) is Elsewhere.UNKNOWN
    assert [mine.recall(KEY) for _ in range(2)] == [True, False]


def test_what_an_older_version_gave_back_and_took_up_again_is_counted(
    mine: RunLog, sibling: Callable[[bytes], int]
) -> None:
    kinds = [(START, 1), (BACK, 2), (RECALLED, 3), (START, 4), (BACK, 5)]
    records = [old(kind, kind == START, KEY, time.time() - 60 + when) for kind, when in kinds]
    os.close(sibling(old(OPEN, 0, NONCE, time.time() - 60) + b"".join(records)))
    mine.look()
    assert [mine.recall(KEY) for _ in range(2)] == [True, False]


def test_a_verdict_of_an_older_version_ends_its_run(
    mine: RunLog, sibling: Callable[[bytes], int]
) -> None:
    now = time.time()
    records = old(OPEN, 0, NONCE, now) + old(START, 1, KEY, now) + old(END, 1, KEY, now)
    os.close(sibling(records))
    assert says(mine) is Elsewhere.FINISHED


def test_an_older_version_reads_what_this_one_writes(mine: RunLog, tmp_path: Path) -> None:
    mine.waits(KEY)
    mine.started(KEY, 7)
    mine.returned(KEY, ran=True)
    assert mine.recall(KEY)
    mine.started(KEY, 8)
    mine.settled(KEY, 8)
    mine.close()
    data = (tmp_path / "2" / "00000001").read_bytes()
    found = []
    for at in range(0, len(data), RECORD):
        body, checksum = data[at : at + OLD.size], data[at + OLD.size : at + RECORD]
        assert struct.unpack("<I", checksum)[0] == zlib.crc32(body)
        kind, channel, key, _ = OLD.unpack(body)
        found.append((kind, channel, key))
    assert [kind for kind, _, _ in found] == [OPEN, WAIT, START, BACK, RECALLED, START, END]
    assert (START, 7, KEY) in found
    assert (END, 8, KEY) in found


def test_a_record_of_a_newer_version_may_be_of_a_job_that_runs_there(
    mine: RunLog, sibling: Callable[[bytes], int]
) -> None:
    newer = encode(START, 1, KEY, 1.0, serial=1, version=VERSION + 1)
    lock = sibling(encode(OPEN, 0, NONCE, 1.0) + newer)
    assert says(mine) is Elsewhere.MAY_RUN
    os.close(lock)
    assert says(mine) is Elsewhere.UNKNOWN


@pytest.mark.parametrize("data", [b"workerd run log 3\n" + bytes(100), bytes(200)])
def test_a_log_of_another_form_may_tell_of_any_job(
    data: bytes, mine: RunLog, sibling: Callable[[bytes], int]
) -> None:
    lock = sibling(data)
    assert says(mine) is Elsewhere.MAY_RUN
    os.close(lock)
    assert says(mine) is Elsewhere.UNKNOWN


def test_a_segment_that_was_just_made_tells_nothing_yet(
    mine: RunLog, sibling: Callable[[bytes], int]
) -> None:
    sibling(b"")
    assert says(mine) is Elsewhere.UNKNOWN


def test_an_instance_that_finds_its_own_log_in_another_form_begins_anew(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    (folder / "00000001").write_bytes(b"workerd run log 3\n" + bytes(100))
    mine = RunLog(tmp_path, "1", 3600.0, pytest.fail)
    mine.started(KEY, 1)
    mine.close()
    (segment,) = folder.iterdir()
    assert [record[0] for record in decode(segment.read_bytes())] == [OPEN, START]
