"""What a run log tells: to its own instance after a restart, and to the others of the host."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from tests.harness.run_logs import HOUR, RESIZE, SLEEP, dies, knows, looking
from tests.harness.trixie import CHECKOUT
from workerd.core.dedup import NEVER_SENT, Elsewhere
from workerd.runlog.reader import RunLogReader
from workerd.runlog.writer import RunLog


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
    # Every instance of a host reads the run logs of all the others when a broker has restarted.
    run_log = remember()
    for number in range(10_000):
        run_log.settled(os.urandom(16), number // 1000)
    reader = RunLogReader(tmp_path / "1")
    tracemalloc.start()
    try:
        reader.catch_up()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(list(reader.finished())) == 10_000
    assert used < 60 * 10_000


def test_the_lock_of_an_instance_ends_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from workerd.runlog.writer import RunLog;"
        "log = RunLog(Path(sys.argv[1]), '1', 3600.0, print);"
        "log.started(bytes(16), 1); log.lost(1);"
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
