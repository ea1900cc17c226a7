"""The memory on disk: what survives, what is skipped, and what other instances read in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.trixie import CHECKOUT
from workerd.core.dedup import ALL_CLOSED, GONE, NEVER_SENT, Elsewhere
from workerd.runlog.reader import RunLogReader
from workerd.runlog.records import END, RECORD, START, decode, encode
from workerd.runlog.writer import RunLog

HOUR = 3600.0
SLEEP = bytes(range(16))
RESIZE = bytes(range(16, 32))


@pytest.fixture
def troubles() -> list[str]:
    return []


@pytest.fixture
def remember(tmp_path: Path, troubles: list[str]) -> Callable[..., RunLog]:
    """Make the memory of an instance: `remember("1")`. It is alive until `dies`."""

    def make(instance: str = "1", seconds: float = HOUR, size: int = 100_000) -> RunLog:
        return RunLog(tmp_path, instance, seconds, troubles.append, size)

    return make


def dies(run_log: RunLog) -> None:
    """What the kernel does when the process ends."""
    run_log.close()
    os.close(run_log._lock)


def looking(run_log: RunLog) -> RunLog:
    """The memory, after a look at the others."""
    run_log.look()
    return run_log


def knows(run_log: RunLog, key: bytes) -> bool:
    return run_log.take(key, lambda _channel: True)


# One instance, one process after another.


def test_a_finished_job_is_remembered_by_the_next_process(
    remember: Callable[..., RunLog],
) -> None:
    run_log = remember()
    run_log.started(SLEEP, 1)
    run_log.settled(SLEEP, 1)
    dies(run_log)
    assert knows(remember(), SLEEP)


def test_a_job_that_was_cut_off_is_not_remembered_as_finished(
    remember: Callable[..., RunLog],
) -> None:
    run_log = remember()
    run_log.started(SLEEP, 1)
    dies(run_log)
    assert not knows(remember(), SLEEP)


def test_a_job_that_was_cut_off_runs_again_although_an_equal_one_had_finished(
    remember: Callable[..., RunLog],
) -> None:
    one = remember("1")
    one.started(SLEEP, 1)
    one.settled(SLEEP, 1)
    one.lost(1)
    one.started(SLEEP, 2)
    dies(one)
    two = remember("2")
    assert looking(two).recall(SLEEP)
    assert not looking(two).recall(SLEEP)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.FINISHED
    assert not looking(remember("1")).recall(SLEEP)


def test_verdicts_of_a_killed_process_may_not_have_been_read(
    remember: Callable[..., RunLog],
) -> None:
    run_log = remember()
    run_log.started(SLEEP, 1)
    run_log.settled(SLEEP, 1)
    dies(run_log)
    assert remember().take(SLEEP, lambda channel: channel == GONE)


def test_a_folder_that_could_not_be_made_at_the_start_is_used_later(
    tmp_path: Path, troubles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    state.write_text("in the way")
    run_log = RunLog(state, "1", HOUR, troubles.append)
    assert len(troubles) == 1
    state.unlink()
    monkeypatch.setattr(run_log, "_retry_at", 0.0)
    run_log.settled(SLEEP, 1)
    assert troubles[1:] == [""]
    assert looking(RunLog(state, "2", HOUR, troubles.append)).elsewhere(SLEEP) is Elsewhere.ATTACHED


def test_a_journal_that_could_not_be_read_at_the_start_is_used_later(
    remember: Callable[..., RunLog],
    tmp_path: Path,
    troubles: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_the_way = tmp_path / "1" / "00000001"
    in_the_way.mkdir(parents=True)
    run_log = remember()
    assert len(troubles) == 1
    in_the_way.rmdir()
    monkeypatch.setattr(run_log, "_retry_at", 0.0)
    run_log.settled(SLEEP, 1)
    assert troubles[1:] == [""]
    dies(run_log)
    assert knows(remember(), SLEEP)


@pytest.mark.parametrize("name", ["²", "notes", "1~", "-1"])
def test_what_is_no_segment_is_let_be(
    name: str, remember: Callable[..., RunLog], tmp_path: Path, troubles: list[str]
) -> None:
    stranger = tmp_path / "1" / name
    stranger.parent.mkdir()
    stranger.write_text("something else")
    run_log = remember()
    run_log.settled(SLEEP, 1)
    dies(run_log)
    assert knows(remember(), SLEEP)
    assert stranger.read_text() == "something else"
    assert troubles == []


def test_a_run_that_begins_as_the_disk_is_back_is_written_once(
    remember: Callable[..., RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = remember("1"), remember("2")
    one.close()
    monkeypatch.setattr(one, "_retry_at", 0.0)
    one.started(SLEEP, 1)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.ATTACHED
    one.returned(SLEEP, ran=True)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.UNKNOWN


def test_a_memory_that_has_no_lock_writes_nothing_when_it_grows_older(
    remember: Callable[..., RunLog], tmp_path: Path
) -> None:
    first, second = remember(), remember()
    second.age()
    second.settled(RESIZE, 1)
    assert len(list((tmp_path / "1").iterdir())) == 1
    assert looking(first).elsewhere(RESIZE) is Elsewhere.UNKNOWN


def test_a_job_that_went_back_runs_once_more_whatever_equal_one_has_finished(
    remember: Callable[..., RunLog],
) -> None:
    run_log = remember()
    run_log.returned(SLEEP, ran=False)
    run_log.settled(SLEEP, 1)
    dies(run_log)
    run_log = remember()
    assert [looking(run_log).recall(SLEEP) for _ in range(2)] == [True, False]
    assert knows(run_log, SLEEP)


def test_a_job_that_one_instance_gave_back_and_another_took_up_is_known_to_both(
    remember: Callable[..., RunLog],
) -> None:
    one, two = remember("1"), remember("2")
    one.returned(SLEEP, ran=False)
    assert looking(two).recall(SLEEP)
    assert not looking(one).recall(SLEEP)
    dies(two)
    assert not looking(one).recall(SLEEP)
    assert not looking(remember("2")).recall(SLEEP)


def test_runs_that_ended_with_their_daemon_are_counted_until_the_job_has_its_verdict(
    remember: Callable[..., RunLog],
) -> None:
    for _ in range(2):
        run_log = remember()
        run_log.started(SLEEP, 1)
        dies(run_log)
    other = remember("2")
    assert looking(other).cut_off(SLEEP) == 2
    run_log = remember()
    assert looking(run_log).cut_off(SLEEP) == 2
    run_log.started(SLEEP, 1)
    run_log.returned(SLEEP, ran=True)
    assert looking(run_log).cut_off(SLEEP) == 2
    run_log.settled(SLEEP, 1)
    assert looking(run_log).cut_off(SLEEP) is None
    assert looking(other).cut_off(SLEEP) is None


def test_runs_that_had_not_begun_when_their_daemon_ended_are_suspects_without_a_lost_start(
    remember: Callable[..., RunLog],
) -> None:
    run_log = remember()
    run_log.started(SLEEP, 1, begun=False)
    dies(run_log)
    assert looking(remember("2")).cut_off(SLEEP) == 0
    run_log = remember()
    assert looking(run_log).cut_off(SLEEP) == 0
    run_log.started(SLEEP, 1, begun=False)
    run_log.begun(SLEEP)
    dies(run_log)
    assert looking(remember()).cut_off(SLEEP) == 1


def test_equal_jobs_that_ended_with_one_daemon_are_blamed_once(
    remember: Callable[..., RunLog],
) -> None:
    run_log = remember()
    for _ in range(4):
        run_log.started(SLEEP, 1)
    dies(run_log)
    assert looking(remember("2")).cut_off(SLEEP) == 1


def test_a_start_leaves_one_segment_however_many_there_were(
    remember: Callable[..., RunLog], tmp_path: Path
) -> None:
    for number in range(10):
        run_log = remember()
        run_log.settled(bytes([number]) * 16, 1)
        dies(run_log)
    assert len(list((tmp_path / "1").iterdir())) == 1
    run_log = remember()
    assert all(knows(run_log, bytes([number]) * 16) for number in range(10))


def test_what_is_older_than_remember_is_forgotten(
    remember: Callable[..., RunLog], tmp_path: Path
) -> None:
    run_log = remember()
    run_log.settled(RESIZE, 1)
    dies(run_log)
    segment = max((tmp_path / "1").iterdir())
    with segment.open("ab") as file:
        file.write(encode(END, 1, SLEEP, 0.0))
    run_log = remember()
    assert not knows(run_log, SLEEP)
    assert knows(run_log, RESIZE)


def test_verdicts_of_channels_that_were_closed_in_order_are_told_apart(
    remember: Callable[..., RunLog],
) -> None:
    run_log = remember()
    run_log.settled(SLEEP, 1)
    run_log.settled(RESIZE, 2)
    run_log.lost(2)
    run_log.closed(1)
    dies(run_log)
    run_log = remember()
    assert run_log.take(SLEEP, lambda channel: channel == ALL_CLOSED)
    assert run_log.take(RESIZE, lambda channel: channel == GONE)


@pytest.mark.parametrize("size", range(3 * RECORD + 1))
def test_a_journal_that_is_torn_anywhere_loses_only_its_end(
    size: int, remember: Callable[..., RunLog], tmp_path: Path, troubles: list[str]
) -> None:
    run_log = remember()
    run_log.started(SLEEP, 1)
    run_log.settled(SLEEP, 1)
    dies(run_log)
    segment = tmp_path / "1" / "00000001"
    assert segment.stat().st_size == 3 * RECORD
    os.truncate(segment, size)
    assert knows(remember(), SLEEP) == (size == 3 * RECORD)
    assert troubles == []


@pytest.mark.parametrize("offset", range(RECORD))
def test_a_record_with_a_changed_byte_is_skipped_and_the_next_is_read(offset: int) -> None:
    spoilt = bytearray(encode(START, 1, SLEEP, 1.0) + encode(END, 1, SLEEP, 2.0))
    spoilt[offset] ^= 0x10
    assert [record[0] for record in decode(bytes(spoilt))] == [END]


def test_old_segments_are_removed_and_running_jobs_are_carried_on(
    remember: Callable[..., RunLog], tmp_path: Path
) -> None:
    run_log = remember(size=40)
    run_log.started(SLEEP, 1)
    for number in range(200):
        key = number.to_bytes(16, "big")
        run_log.started(key, 1)
        run_log.settled(key, 1)
    assert len(list((tmp_path / "1").iterdir())) == run_log.GENERATIONS
    assert len(run_log) <= 40
    run_log.lost(1)
    assert looking(remember("2")).elsewhere(SLEEP) is Elsewhere.ORPHANED


def test_two_processes_never_write_one_journal(
    remember: Callable[..., RunLog], troubles: list[str], tmp_path: Path
) -> None:
    first = remember()
    first.settled(SLEEP, 1)
    second = remember()
    assert len(troubles) == 1
    second.settled(RESIZE, 1)
    assert knows(second, RESIZE)
    assert len(list((tmp_path / "1").iterdir())) == 1


# Several instances.


def test_a_job_that_another_instance_has_finished_is_found_once_its_channel_is_lost(
    remember: Callable[..., RunLog],
) -> None:
    one, two = remember("1"), remember("2")
    one.started(SLEEP, 1)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.ATTACHED
    one.settled(SLEEP, 1)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.ATTACHED
    one.lost(1)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.FINISHED


def test_a_verdict_of_another_instance_settles_one_delivery(
    remember: Callable[..., RunLog],
) -> None:
    one, two = remember("1"), remember("2")
    one.settled(SLEEP, 1)
    one.lost(1)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.FINISHED
    assert looking(two).elsewhere(SLEEP) is Elsewhere.UNKNOWN


def test_a_job_that_another_instance_runs_without_its_channel_is_waited_for(
    remember: Callable[..., RunLog],
) -> None:
    one, two = remember("1"), remember("2")
    one.started(SLEEP, 1)
    one.lost(1)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.ORPHANED
    one.settled(SLEEP, NEVER_SENT)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.FINISHED


def test_a_job_that_another_instance_gave_back_is_not_waited_for(
    remember: Callable[..., RunLog],
) -> None:
    one, two = remember("1"), remember("2")
    one.started(SLEEP, 1)
    one.lost(1)
    one.returned(SLEEP, ran=True)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.UNKNOWN


def test_a_dead_instance_runs_nothing_and_what_it_finished_counts(
    remember: Callable[..., RunLog],
) -> None:
    one, two = remember("1"), remember("2")
    one.started(SLEEP, 1)
    one.settled(RESIZE, 1)
    dies(one)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.UNKNOWN
    assert looking(two).elsewhere(RESIZE) is Elsewhere.FINISHED


def test_what_another_instance_finished_long_ago_does_not_count(
    remember: Callable[..., RunLog],
) -> None:
    one = remember("1")
    one.settled(SLEEP, 1)
    dies(one)
    assert looking(remember("2", seconds=0.0)).elsewhere(SLEEP) is Elsewhere.UNKNOWN


def test_what_another_instance_has_finished_takes_little_memory(
    remember: Callable[..., RunLog], tmp_path: Path
) -> None:
    # Every instance of a host reads the journals of all the others when a broker has restarted.
    run_log = remember()
    for number in range(10_000):
        run_log.settled(os.urandom(16), number // 1000)
    history = RunLogReader(tmp_path / "1")
    tracemalloc.start()
    try:
        history.catch_up()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(list(history.finished())) == 10_000
    assert used < 60 * 10_000


def test_the_lock_of_an_instance_ends_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from workerd.runlog.writer import RunLog;"
        "memory = RunLog(Path(sys.argv[1]), '1', 3600.0, print);"
        "memory.started(bytes(16), 1); memory.lost(1);"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        here = RunLog(tmp_path, "2", HOUR, print)
        assert looking(here).elsewhere(bytes(16)) is Elsewhere.ORPHANED
        other.kill()
        other.wait()
        assert looking(here).elsewhere(bytes(16)) is Elsewhere.UNKNOWN


# A disk that cannot be written.


@pytest.fixture
def full_disk(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk], check=True)
    return disk


@pytest.fixture
def unmount(tmp_path: Path) -> object:
    yield
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=False)


@pytest.mark.usefixtures("unmount")
def test_a_full_disk_is_told_once_and_used_again_when_it_has_room(
    full_disk: Path, troubles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_log = RunLog(full_disk, "1", HOUR, troubles.append)
    filler = full_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(1 << 20))
    for number in range(1000):
        run_log.settled(number.to_bytes(16, "big"), 1)
    assert len(troubles) == 1
    assert "No space" in troubles[0]
    assert knows(run_log, (999).to_bytes(16, "big"))
    filler.unlink()
    monkeypatch.setattr(run_log, "_retry_at", 0.0)
    run_log.settled(SLEEP, 1)
    assert troubles[1:] == [""]
    dies(run_log)
    assert knows(RunLog(full_disk, "1", HOUR, troubles.append), SLEEP)


@pytest.mark.usefixtures("unmount")
def test_a_read_only_disk_is_told_once_and_jobs_go_on(full_disk: Path, troubles: list[str]) -> None:
    first = RunLog(full_disk, "1", HOUR, troubles.append)
    first.settled(SLEEP, 1)
    dies(first)
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    run_log = RunLog(full_disk, "1", HOUR, troubles.append)
    run_log.started(RESIZE, 1)
    run_log.settled(RESIZE, 1)
    assert len(troubles) == 1
    assert "Read-only" in troubles[0]
    assert knows(run_log, RESIZE)
    assert knows(run_log, SLEEP)
