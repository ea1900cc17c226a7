"""Processes that cannot start: pauses, what the log says, and whose fault it is not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from pathlib import Path

import pytest

from tests.harness.commands import ENVIRONMENT, as_nobody, open_descriptors, unguarded
from tests.harness.pools import (
    PID,
    Warm,
    do,
    in_loop,
    job,
    logged,
    outcome,
    pool,
    python,
    sh,
    until_logged,
)
from tests.harness.waiting import TIMEOUT
from workerd.core.job import Outcome, Report
from workerd.handlers.warm import respawn
from workerd.handlers.warm.pool import NOT_BEGUN


def test_after_a_job_a_process_may_start_though_one_has_just_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(respawn, "FIRST_PAUSE", 600.0)
    # The second process ends as soon as it is ready; the first does a job and dies of the next.
    script = f"""
    if mkdir {tmp_path}/first 2>/dev/null; then
        ready; next; answer one; next; kill -9 $$
    elif mkdir {tmp_path}/second 2>/dev/null; then
        ready; exit 0
    fi
    ready; while next; do answer "$body"; done
    """

    async def scenario() -> list[Report]:
        async with pool(sh(script, processes=2)) as warm:
            warm.start()
            await warm.await_ready()
            child = warm.children[0]
            warm._dispatch.want(2)
            warm.hand_out()
            while len(warm.children) != 1 or warm.children[0] is not child or warm._leaving:
                await asyncio.sleep(0.01)
            first = await warm.do(job(b"1"))
            return [first, *await asyncio.gather(warm.do(job(b"2")), warm.do(job(b"3")))]

    reports = in_loop(scenario())
    assert [report.output for report in reports] == [b"one", b"", b"3"]
    assert reports[1].reason == "crashed"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaker between two starts are short."""
    monkeypatch.setattr(respawn, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(respawn, "LONGEST_PAUSE", 0.05)


def test_a_job_does_not_wait_for_an_interpreter_that_is_missing(
    tmp_path: Path, hasty: None
) -> None:
    interpreter = tmp_path / "python"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, PID, interpreter=interpreter)) as warm:
            reports = [await warm.do(job()) for _ in range(3)]
            interpreter.symlink_to(os.path.realpath("/proc/self/exe"))
            report = await warm.do(job())
            while report.outcome is Outcome.UNAVAILABLE:
                await asyncio.sleep(0.01)
                report = await warm.do(job())
            return [*reports, report]

    (*missing, there), events = outcome(scenario())
    for report in missing:
        assert (report.outcome, report.reason) == (Outcome.UNAVAILABLE, "cannot-run")
        assert report.error == f"cannot run {interpreter} in {tmp_path}: No such file or directory"
    assert there.outcome is Outcome.DONE
    # Told once.
    assert sum(event["event"] == "child failed" for event in events) == 1


def test_a_module_that_cannot_be_imported_is_no_jobs_fault(tmp_path: Path, hasty: None) -> None:
    async def scenario() -> list[Report]:
        settings = python(tmp_path, "import nothing_of_this_name\n" + PID)
        async with pool(settings) as warm:
            reports = await asyncio.gather(*(warm.do(job()) for _ in range(3)))
            python(tmp_path, PID + "# of another size\n")
            report = await warm.do(job())
            while report.outcome is Outcome.UNAVAILABLE:
                await asyncio.sleep(0.01)
                report = await warm.do(job())
            return [*reports, report]

    (*broken, mended), events = outcome(scenario())
    for report in broken:
        assert (report.outcome, report.reason) == (Outcome.UNAVAILABLE, "cannot-start")
        assert report.error.startswith("Traceback")
        assert report.error.endswith("No module named 'nothing_of_this_name'")
    assert mended.outcome is Outcome.DONE
    (failed,) = [event for event in events if event["event"] == "child failed"]
    assert failed["level"] == "error"
    assert failed["handler"] == "test"
    assert "job_id" not in failed


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo why >&2; exit 3", "ended with status 3 before it was ready\nwhy"),
        ("kill -9 $$", "ended with SIGKILL before it was ready"),
        ("echo '{\"ready\":2}' >&4; sleep 600", "broke the protocol: it speaks version 2, not 1"),
        ("echo nonsense >&4; sleep 600", "broke the protocol: a line that is not a JSON object"),
        ('echo \'{"error":"no database"}\' >&4; sleep 600', "no database"),
        ("ready", "it ended as soon as it was ready"),
    ],
)
def test_a_process_that_does_not_come_up_is_no_jobs_fault(script: str, error: str) -> None:
    began = time.monotonic()
    report = do(sh(script, kill_grace=0.1), job())
    assert (report.outcome, report.reason) == (Outcome.UNAVAILABLE, "cannot-start")
    assert error in report.error
    assert time.monotonic() - began < TIMEOUT / 4


def test_a_process_that_hangs_at_its_start_is_given_up_and_started_again_after_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(respawn, "FIRST_PAUSE", 0.8)
    settings = python(
        tmp_path,
        "import time\ntime.sleep(600)",
        processes=2,
        start_timeout=0.3,
        kill_grace=0.1,
    )
    started: set[int] = set()

    async def scenario() -> list[Report]:
        tasks = []
        before = time.monotonic()
        async with pool(settings) as warm:
            while len(started) < 6:
                tasks.append(warm.soon(job()))
                await asyncio.sleep(0.01)
                started.update(child.pid for child in warm.children)
            # A storm of jobs is no storm of starts: two at a time, and a pause of 0.4 s at least.
            assert time.monotonic() - before >= 2 * (0.3 + 0.4)
        return list(await asyncio.gather(*tasks))

    reports, events = outcome(scenario())
    errors = {"not ready within 0.3 s"}
    assert {report.error for report in reports if report is not NOT_BEGUN} == errors
    assert sum(event["event"] == "child failed" for event in events) == 1


def test_while_one_process_works_no_job_fails_for_want_of_another(tmp_path: Path) -> None:
    # Only the first one finds the way free.
    code = f"""
    import os, time
    os.mkdir({str(tmp_path / "first")!r})
    {"def f(job): return os.getpid()"}
    """

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, code, processes=2)) as warm:
            return await asyncio.gather(*(warm.do(job()) for _ in range(20)))

    reports = in_loop(scenario())
    assert {report.outcome for report in reports} == {Outcome.DONE}
    assert len({report.output for report in reports}) == 1


def test_while_no_process_is_to_be_had_those_there_are_do_all_jobs_and_it_is_told_once() -> None:
    said = as_nobody(
        """
        from tests.harness.pools import *

        async def scenario():
            echo = sh('ready; while next; do answer "$body"; done', processes=3)
            soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
            async with pool(echo) as warm:
                warm.start()
                await warm.await_ready()
                resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
                for _ in range(20):
                    reports = await asyncio.gather(*(warm.do(job(b"x")) for _ in range(6)))
                    assert {report.output for report in reports} == {b"x"}
                print(warm.degraded)
                resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
                # By itself, without a job.
                await warm.await_ready(2)
                while warm.degraded:
                    await asyncio.sleep(0.01)

        with logged() as events:
            in_loop(scenario())
        for name in ("child failed", "child recovered"):
            print(*(event.get("error", name) for event in events if event["event"] == name))
        """
    )
    why = "Resource temporarily unavailable: no process is left (TasksMax=, ulimit -u)"
    assert said.splitlines() == [
        f"short of processes: cannot run sh: {why}",
        f"cannot run sh: {why}",
        "child recovered",
    ]


def test_the_last_process_that_is_to_be_had_is_replaced_once_it_has_ended() -> None:
    said = as_nobody(
        """
        from tests.harness.pools import *
        from workerd.handlers.warm import respawn

        respawn.FIRST_PAUSE = 600.0

        async def scenario():
            # Without any process of its own.
            script = "ready; while read -r line <&3; do frame=1; answer; done"
            settings = sh(script, processes=1, recycle_after=1)
            _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
            # This one and a single process more.
            resource.setrlimit(resource.RLIMIT_NPROC, (2, hard))
            async with pool(settings) as warm:
                warm.start()
                for _ in range(3):
                    await warm.await_ready()
                    print((await warm.do(job())).outcome.value)

        in_loop(scenario())
        """
    )
    assert said.split() == ["done"] * 3


@pytest.mark.parametrize("fails", ["exit 1", "ready; exit"])
def test_jobs_do_not_wait_for_a_busy_process_once_others_can_be_had(
    tmp_path: Path, hasty: None, fails: str
) -> None:
    gate, mended = tmp_path / "gate", tmp_path / "mended"
    # At first only one finds the way free; the only other one has failed when that is told.
    script = f"""
    mkdir {tmp_path}/first || [ -e {mended} ] || {{ {fails}; }}
    ready
    while next; do
        while [ "$body" = long ] && ! [ -e {gate} ]; do sleep 0.01; done
        answer "$body"
    done
    """

    async def scenario() -> None:
        with logged() as events:
            async with pool(sh(script, processes=2)) as warm:
                warm.start()
                await warm.await_ready()
                long = warm.soon(job(b"long"))
                short = [warm.soon(job(b"short")) for _ in range(4)]
                await until_logged(events, "child failed")
                mended.touch()
                reports = await asyncio.gather(*short)
                assert {report.output for report in reports} == {b"short"}
                assert not long.done()
                # Not one for each job.
                assert len(warm.children) == 2
                gate.touch()
                await long
                assert warm.degraded is None
                await until_logged(events, "child recovered", handler="test")

    in_loop(scenario())


def test_what_cannot_start_is_tried_again_without_a_job(tmp_path: Path, hasty: None) -> None:
    async def scenario() -> list[str]:
        changes: list[str] = []
        settings = python(tmp_path, "import nothing_of_this_name\n" + PID)
        warm = Warm(
            settings, ENVIRONMENT, 10, unguarded, changed=lambda: changes.append(str(warm.degraded))
        )
        warm.start()
        with logged() as events:
            await until_logged(events, "child failed")
            python(tmp_path, PID + "# of another size\n")
            await until_logged(events, "child recovered")
        await warm.close()
        return changes

    why, *again, last = in_loop(scenario())
    assert why == "paused: ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert {why, *again} == {why}
    assert last == "None"


def test_a_process_that_ends_as_soon_as_it_is_ready_is_told_once_while_another_works(
    tmp_path: Path, hasty: None
) -> None:
    script = f"""
    ready
    mkdir {tmp_path}/first || exit 0
    while next; do answer; done
    """

    async def scenario() -> None:
        async with pool(sh(script, processes=2)) as warm:
            warm.start()
            await warm.await_ready()
            ready = 0
            while ready < 5:
                reports = await asyncio.gather(warm.do(job()), warm.do(job()))
                assert {report.outcome for report in reports} == {Outcome.DONE}
                ready = sum(event["event"] == "child ready" for event in events)

    with logged() as events:
        in_loop(scenario())
    assert sum(event["event"] == "child failed" for event in events) == 1


def test_without_descriptors_no_job_pays(tmp_path: Path, hasty: None) -> None:
    async def scenario() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with pool(python(tmp_path, PID)) as warm:
            with contextlib.ExitStack() as undo:
                used = set(map(int, open_descriptors()))
                # Without gaps below the limit, exactly three are free.
                for _ in range(max(used) + 1 - len(used)):
                    undo.callback(os.close, os.open(os.devnull, os.O_RDONLY))
                undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 4, hard))
                report = await warm.do(job())
            assert report.outcome is Outcome.UNAVAILABLE
            assert "Too many open files" in report.error
            while report.outcome is Outcome.UNAVAILABLE:
                await asyncio.sleep(0.01)
                report = await warm.do(job())
            assert report.outcome is Outcome.DONE

    in_loop(scenario())


def test_a_process_that_is_ready_and_ends_is_told_once(hasty: None) -> None:
    async def scenario() -> None:
        async with pool(sh("ready")) as warm:
            for _ in range(5):
                assert (await warm.do(job())).outcome is Outcome.UNAVAILABLE
                await asyncio.sleep(0.06)  # a new one may be started then

    _, events = outcome(scenario())
    assert len([event for event in events if event["event"] == "child failed"]) == 1
