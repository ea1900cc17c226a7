"""The run log on disk: what survives a process, what is skipped, a disk that cannot be written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.run_logs import HOUR, RESIZE, SLEEP, dies, knows, looking
from workerd.core.dedup import ALL_CLOSED, GONE, Elsewhere
from workerd.runlog import writer
from workerd.runlog.reader import RunLogReader
from workerd.runlog.records import END, RECORD, encode
from workerd.runlog.writer import RETRY, RunLog

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
    tmp_path: Path, failures: list[str]
) -> None:
    state = tmp_path / "state"
    state.write_text("in the way")
    run_log = RunLog(state, "1", HOUR, failures.append)
    assert len(failures) == 1
    state.unlink()
    run_log.settled(SLEEP, 1)
    run_log.retry()
    assert failures[1:] == [""]
    assert looking(RunLog(state, "2", HOUR, failures.append)).elsewhere(SLEEP) is Elsewhere.ATTACHED


def test_a_run_log_that_could_not_be_read_at_the_start_is_used_later(
    remember: Callable[..., RunLog],
    tmp_path: Path,
    failures: list[str],
) -> None:
    in_the_way = tmp_path / "1" / "00000001"
    in_the_way.mkdir(parents=True)
    run_log = remember()
    assert len(failures) == 1
    in_the_way.rmdir()
    run_log.settled(SLEEP, 1)
    run_log.retry()
    assert failures[1:] == [""]
    dies(run_log)
    assert knows(remember(), SLEEP)


@pytest.mark.parametrize("name", ["²", "notes", "1~", "-1"])
def test_what_is_no_segment_is_let_be(
    name: str, remember: Callable[..., RunLog], tmp_path: Path, failures: list[str]
) -> None:
    stranger = tmp_path / "1" / name
    stranger.parent.mkdir()
    stranger.write_text("something else")
    run_log = remember()
    run_log.settled(SLEEP, 1)
    dies(run_log)
    assert knows(remember(), SLEEP)
    assert stranger.read_text() == "something else"
    assert failures == []


def test_a_run_that_begins_as_the_disk_is_back_is_written_once(
    remember: Callable[..., RunLog],
) -> None:
    one, two = remember("1"), remember("2")
    one._fail(OSError("no"))
    one.started(SLEEP, 1)
    one.retry()
    assert looking(two).elsewhere(SLEEP) is Elsewhere.ATTACHED
    one.returned(SLEEP, ran=True)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.UNKNOWN


def test_a_run_log_without_its_lock_writes_nothing_when_it_grows_older(
    remember: Callable[..., RunLog], tmp_path: Path
) -> None:
    first, second = remember(), remember()
    second.age()
    second.settled(RESIZE, 1)
    assert len(list((tmp_path / "1").iterdir())) == 1
    assert looking(first).elsewhere(RESIZE) is Elsewhere.UNKNOWN


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
def test_a_run_log_that_is_torn_anywhere_loses_only_its_end(
    size: int, remember: Callable[..., RunLog], tmp_path: Path, failures: list[str]
) -> None:
    run_log = remember()
    run_log.started(SLEEP, 1)
    run_log.settled(SLEEP, 1)
    dies(run_log)
    segment = tmp_path / "1" / "00000001"
    assert segment.stat().st_size == 3 * RECORD
    os.truncate(segment, size)
    assert knows(remember(), SLEEP) == (size == 3 * RECORD)
    assert failures == []


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


def test_two_processes_never_write_one_run_log(
    remember: Callable[..., RunLog], failures: list[str], tmp_path: Path
) -> None:
    first = remember()
    first.settled(SLEEP, 1)
    second = remember()
    assert len(failures) == 1
    second.settled(RESIZE, 1)
    assert knows(second, RESIZE)
    assert len(list((tmp_path / "1").iterdir())) == 1


# A disk that cannot be written.


def test_what_was_not_written_is_written_by_time_when_the_disk_has_room(
    tmp_path: Path, failures: list[str]
) -> None:
    """On an idle host nothing else would have it written, and a sibling waits for it."""
    timers: list[tuple[float, Callable[[], None]]] = []
    one = RunLog(tmp_path, "1", HOUR, failures.append, later=lambda *timer: timers.append(timer))
    two = RunLog(tmp_path, "2", HOUR, failures.append)
    one.started(SLEEP, 1)
    (tmp_path / "1").rename(tmp_path / "away")
    one.age()
    assert one.failure
    one.settled(SLEEP, 1)
    one.lost(1)
    one.returned(RESIZE, ran=False)
    ((seconds, retry),) = timers
    assert seconds == RETRY
    retry()
    assert len(timers) == 2
    (tmp_path / "away").rename(tmp_path / "1")
    assert looking(two).elsewhere(SLEEP) is Elsewhere.ATTACHED
    timers[1][1]()
    assert (one.failure, failures[1:]) == ("", [""])
    assert looking(two).elsewhere(SLEEP) is Elsewhere.FINISHED
    assert looking(two).elsewhere(SLEEP) is Elsewhere.UNKNOWN
    assert looking(two).recall(RESIZE)


def test_a_verdict_that_waited_for_the_disk_ends_no_equal_job_that_runs_since(
    remember: Callable[..., RunLog],
) -> None:
    one, two = remember("1"), remember("2")
    one._fail(OSError("no"))
    one.started(SLEEP, 1)
    one.settled(SLEEP, 1)
    one.started(SLEEP, 2)
    one.retry()
    assert looking(two).elsewhere(SLEEP) is Elsewhere.ATTACHED
    one.lost(2)
    assert looking(two).elsewhere(SLEEP) is Elsewhere.ORPHANED


def test_what_waits_for_the_disk_is_bounded(
    remember: Callable[..., RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MOST_PENDING", 10)
    run_log = remember()
    run_log._fail(OSError("no"))
    for number in range(100):
        run_log.settled(number.to_bytes(16, "big"), 1)
    assert len(run_log._pending) <= 10
    run_log.retry()
    reader = RunLogReader(run_log._folder)
    reader.catch_up()
    assert (99).to_bytes(16, "big") in {key for key, _ in reader.finished()}


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
    full_disk: Path, failures: list[str]
) -> None:
    run_log = RunLog(full_disk, "1", HOUR, failures.append)
    filler = full_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(1 << 20))
    while not failures:
        run_log.settled(os.urandom(16), 1)
    for number in range(100):
        run_log.settled(number.to_bytes(16, "big"), 1)
        run_log.retry()
    assert len(failures) == 1
    assert len(list((full_disk / "1").iterdir())) == 1
    assert "No space" in failures[0]
    assert knows(run_log, (99).to_bytes(16, "big"))
    filler.unlink()
    run_log.settled(SLEEP, 1)
    run_log.retry()
    assert failures[1:] == [""]
    dies(run_log)
    later = RunLog(full_disk, "1", HOUR, failures.append)
    assert knows(later, SLEEP)
    assert knows(later, (98).to_bytes(16, "big"))
    assert not knows(later, (98).to_bytes(16, "big"))


@pytest.mark.usefixtures("unmount")
def test_a_read_only_disk_is_told_once_and_jobs_go_on(full_disk: Path, failures: list[str]) -> None:
    first = RunLog(full_disk, "1", HOUR, failures.append)
    first.settled(SLEEP, 1)
    dies(first)
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    run_log = RunLog(full_disk, "1", HOUR, failures.append)
    run_log.started(RESIZE, 1)
    run_log.settled(RESIZE, 1)
    assert len(failures) == 1
    assert "Read-only" in failures[0]
    assert knows(run_log, RESIZE)
    assert knows(run_log, SLEEP)
