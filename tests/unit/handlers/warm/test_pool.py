"""Warm processes: who gets a job, what becomes of a process and of the jobs that it holds."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness import processes
from tests.harness.commands import ENVIRONMENT, alone, as_nobody, open_descriptors, unguarded
from tests.harness.pools import Warm, do, do_all, in_loop, job, logged, outcome, pool, python, sh
from tests.harness.waiting import TIMEOUT, until
from workerd.config.model import Handler
from workerd.core.job import Job, Outcome, Report
from workerd.handlers.registry import HandlerRegistry
from workerd.handlers.warm import respawn
from workerd.handlers.warm.dispatch import LOOK_AHEAD
from workerd.handlers.warm.pool import NOT_BEGUN

MiB = 1 << 20

#: Answers with its process id; a body that is a path is waited for first.
PID = """
import os, time
def f(job):
    print("runs", flush=True)
    while job.body and not os.path.exists(job.body):
        time.sleep(0.005)
    return os.getpid()
"""
#: Does what its body says.
EVAL = "import ctypes, os, signal, sys, time\ndef f(job): return eval(job.body)"


def named(name: str, body: bytes = b"") -> Job:
    return job(body, message_id=name)


async def told(events: list[dict[str, Any]], event: str, **fields: object) -> None:
    """Wait until this was logged."""
    while not any(e["event"] == event and fields.items() <= e.items() for e in events):
        await asyncio.sleep(0.005)


# Who gets a job


def test_a_process_handles_one_job_after_another(tmp_path: Path) -> None:
    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, PID)) as warm:
            return [await warm.do(job()) for _ in range(5)]

    pids = {report.output for report in in_loop(scenario())}
    assert len(pids) == 1


def test_a_job_is_told_to_begin_and_that_is_written_down_before_it_is_sent(tmp_path: Path) -> None:
    order: list[str] = []

    async def run() -> None:
        settings = python(tmp_path, "def f(job): open('ran', 'w')")
        async with pool(settings) as warm:

            def write_down() -> None:
                assert not (tmp_path / "ran").exists()
                order.append("written")

            warm.before_sending = write_down
            never = asyncio.get_running_loop().create_future()
            await warm.run(job(), never, lambda _details: order.append("begun"))
            order.append("done")

    in_loop(run())
    assert order == ["begun", "written", "done"]


def test_jobs_run_at_once_in_as_many_processes_as_configured_and_the_others_wait(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> None:
        async with pool(python(tmp_path, PID, processes=2)) as warm:
            tasks = [warm.soon(named(str(n), bytes(gate))) for n in range(4)]
            for name in ("0", "1"):
                await told(events, "output", job_id=name, text="runs")
            assert begun(events) == ["0", "1"]
            gate.touch()
            reports = await asyncio.gather(*tasks)
            assert len({report.output for report in reports}) == 2

    with logged() as events:
        in_loop(scenario())
    assert sorted(begun(events)) == ["0", "1", "2", "3"]
    assert sum(event["event"] == "child ready" for event in events) == 2


def begun(events: list[dict[str, Any]]) -> list[str]:
    return [event["job_id"] for event in events if event["event"] == "begun"]


def test_a_large_body_and_the_end_of_a_large_result_arrive_whole(tmp_path: Path) -> None:
    code = """
    import hashlib
    def f(job):
        return job.body[::-1] + hashlib.sha256(job.body).digest()
    """
    body = os.urandom(MiB) * 20
    report = do(python(tmp_path, code, output_limit=5 * MiB), job(body))
    expected = body[::-1] + hashlib.sha256(body).digest()
    assert report.output == expected[-5 * MiB :]


def test_without_room_for_a_result_none_is_kept(tmp_path: Path) -> None:
    assert do(python(tmp_path, "def f(job): return b'x'", output_limit=0), job()).output == b""


def test_a_process_has_no_descriptors_but_its_own_five() -> None:
    foreign = {fd for fd in open_descriptors() if os.get_inheritable(int(fd))}
    script = "ready; next; answer \"$(ls /proc/self/fd | tr '\\n' ' ')\""

    async def scenario() -> list[Report]:
        async with pool(sh(script, processes=4)) as warm:
            return await asyncio.gather(*(warm.do(job()) for _ in range(4)))

    for report in in_loop(scenario()):
        # The sixth is the folder that ls reads.
        assert set(report.output.decode().split()) - foreign <= {"0", "1", "2", "3", "4", "5"}


async def learn(warm: Warm) -> None:
    """Let it see that jobs are short: only then may some lie in a pipe.

    On a busy machine one may have taken long.
    """
    while warm.pace.depth < min(warm.pace.most, 8):
        await warm.do(job(b"0"))


async def ahead(
    warm: Warm, events: list[dict[str, Any]], gate: Path, *stops: asyncio.Future[None]
) -> list[asyncio.Task[Report]]:
    """A job that waits, and four in the pipe behind it; with these stops, in this order."""
    await learn(warm)
    wait = f"[time.sleep(0.005) for _ in iter(lambda: os.path.exists({str(gate)!r}), True)]"
    tasks = [warm.soon(named("first", wait.encode()))]
    for number in range(4):
        stop = stops[number] if number < len(stops) else None
        tasks.append(warm.soon(named(str(number), b"str(os.getpid())"), stop))
    await told(events, "begun", job_id="first")
    [works] = [child for child in warm.children if child.assignments]
    assert len(works.assignments) == 5
    return tasks


def test_jobs_that_lie_in_a_pipe_have_not_begun(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            tasks = await ahead(warm, events, gate)
            assert begun(events)[-1] == "first"
            gate.touch()
            return await asyncio.gather(*tasks)

    with logged() as events:
        reports = in_loop(scenario())
    assert {report.outcome for report in reports} == {Outcome.DONE}
    assert begun(events)[-5:] == ["first", "0", "1", "2", "3"]


def test_jobs_in_a_pipe_go_to_a_process_that_has_nothing_to_do(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            first, *others = await ahead(warm, events, tmp_path / "gate")
            warm._dispatch.limit = 2
            warm.hand_out()
            for task in others:
                assert (await task).outcome is Outcome.DONE
            assert not first.done()
            assert sorted(begun(events)[-5:]) == ["0", "1", "2", "3", "first"]
            (tmp_path / "gate").touch()
            assert (await first).outcome is Outcome.DONE
            # It passes over what it was sent and is not to do.
            again = await asyncio.gather(*(warm.do(job(b"'again'")) for _ in range(4)))
            assert {report.output for report in again} == {b"again"}

    with logged() as events:
        in_loop(scenario())


def test_another_process_starts_for_a_job_that_lies_in_a_pipe(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=2), depth=8) as warm:
            await learn(warm)  # one by one, so there is one process
            assert warm.processes == 1
            stop = asyncio.get_running_loop().create_future()
            long = warm.soon(named("long", b"time.sleep(600)"), stop)
            await told(events, "begun", job_id="long")
            assert (await warm.do(named("short", b"0"))).outcome is Outcome.DONE
            assert not long.done()
            stop.set_result(None)
            await long

    with logged() as events:
        in_loop(scenario())


def test_no_job_lies_behind_a_long_one_while_a_process_that_leaves_soon_has_nothing_to_do(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=2), depth=8) as warm:
            await learn(warm)
            stops = [asyncio.get_running_loop().create_future() for _ in range(2)]
            tasks = []
            for name, stop in zip(("one", "other"), stops, strict=True):
                tasks.append(warm.soon(named(name, b"time.sleep(600)"), stop))
                await told(events, "begun", job_id=name)
            stops[0].set_result(None)
            await tasks[0]
            await warm.do(named("short", b"0"))
            [idle] = [child for child in warm.children if not child.assignments]
            object.__setattr__(warm.settings, "recycle_after", idle.count + 2)
            await asyncio.wait_for(warm.do(named("shorter", b"0")), TIMEOUT)
            assert not tasks[1].done()
            stops[1].set_result(None)
            await tasks[1]

    with logged() as events:
        in_loop(scenario())


def test_as_many_processes_start_as_there_are_jobs_even_if_one_could_have_them_all() -> None:
    async def scenario() -> None:
        script = 'ready; while next; do answer "$body"; done'
        async with pool(sh(script, processes=3), depth=8) as warm:
            await warm.do(job())
            await asyncio.gather(*(warm.do(job()) for _ in range(6)))
            assert warm.processes == 3

    in_loop(scenario())


def test_a_long_job_is_a_reason_to_put_no_other_behind_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            await learn(warm)
            assert warm.capacity > 1
            await warm.do(job(f"time.sleep({2 * LOOK_AHEAD})".encode()))
            assert warm.capacity == 1

    in_loop(scenario())


@pytest.mark.parametrize("leaves", [False, True])
def test_jobs_in_a_pipe_do_not_begin_once_it_is_held(tmp_path: Path, leaves: bool) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            first, *others = await ahead(warm, events, gate)
            if leaves:
                warm.retire()
                await asyncio.sleep(0)
            warm.hold()
            gate.touch()
            assert (await first).outcome is Outcome.DONE
            warm.drain()
            return await asyncio.gather(*others)

    with logged() as events:
        reports = in_loop(scenario())
    assert {report.outcome for report in reports} == {Outcome.INTERRUPTED}
    assert begun(events)[-1] == "first"


def test_a_job_in_a_pipe_is_taken_out_of_it_without_harm_to_the_others(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            loop = asyncio.get_running_loop()
            stops = [loop.create_future(), loop.create_future()]
            first, *others = await ahead(warm, events, gate, *stops)
            stops[1].set_result(None)
            assert (await others[1]).outcome is Outcome.INTERRUPTED
            gate.touch()
            return [await first, *await asyncio.gather(*others)]

    with logged() as events:
        reports = in_loop(scenario())
    assert [report.outcome is Outcome.DONE for report in reports] == [True, True, False, True, True]
    assert "1" not in begun(events)


def test_what_jobs_print_by_themselves_is_never_anothers_however_many_lie_in_the_pipe(
    tmp_path: Path,
) -> None:
    code = """
    import os
    def f(job):
        if job.id.startswith("job "):
            os.write(1, job.id.encode() + b"\\n")
    """

    async def scenario() -> None:
        async with pool(python(tmp_path, code, processes=1), depth=50) as warm:
            await learn(warm)
            assert warm.capacity > 5
            # Some say nothing, and are ahead of the daemon when another does.
            names = [f"job {n}" if n % 5 == 0 else f"silent {n}" for n in range(300)]
            await asyncio.gather(*(warm.do(named(name)) for name in names))

    with logged() as events:
        in_loop(scenario())
    printed = [(e["job_id"], e["text"]) for e in events if e["event"] == "output"]
    assert sorted(printed) == sorted((f"job {n}", f"job {n}") for n in range(0, 300, 5))


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


# When a process ends


@pytest.mark.parametrize(
    ("end", "facts"),
    [
        ("ctypes.string_at(0)", (None, "SIGSEGV")),
        ("os.abort()", (None, "SIGABRT")),
        ("os._exit(3)", (3, None)),
        ("os.kill(os.getpid(), signal.SIGKILL)", (None, "SIGKILL")),
    ],
)
def test_a_crash_costs_its_own_job_an_attempt_and_disturbs_no_other(
    tmp_path: Path, end: str, facts: tuple[int | None, str | None]
) -> None:
    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, EVAL, processes=2)) as warm:
            warm.start()
            other = warm.soon(named("other", b"time.sleep(0.5) or os.getpid()"))
            crash = f"sys.stderr.write('last words\\n') and {end}".encode()
            reports = [await warm.do(named("crash", crash))]
            reports += [await warm.do(named("next", b"os.getpid()")), await other]
            return reports

    (crashed, after, other), events = outcome(scenario())
    assert (crashed.outcome, crashed.reason) == (Outcome.FAILED, "crashed")
    assert (crashed.exit_status, crashed.signal) == facts
    assert crashed.error.startswith("last words")
    assert after.outcome is other.outcome is Outcome.DONE
    (ended,) = [event for event in events if event["event"] == "child ended"]
    assert ended["level"] == "warning"
    assert str(ended["child"]).encode() not in (after.output, other.output)


def test_only_the_job_that_was_being_done_has_failed_and_those_behind_it_go_to_another(
    tmp_path: Path,
) -> None:
    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, EVAL, processes=1), depth=4) as warm:
            await learn(warm)
            bodies = [b"'well'", b"os._exit(1)", b"'well'", b"os._exit(2)", b"'well'", b"'well'"]
            return await asyncio.gather(
                *(warm.do(named(str(n), body)) for n, body in enumerate(bodies))
            )

    reports, events = outcome(scenario())
    assert [report.exit_status for report in reports] == [None, 1, None, 2, None, None]
    assert [report.outcome is Outcome.DONE for report in reports] == [True, False] * 2 + [True] * 2
    # Each has begun once, also those that two processes had.
    assert sorted(begun(events)[-6:]) == ["0", "1", "2", "3", "4", "5"]


def test_a_process_that_dies_without_a_job_is_replaced_and_no_job_pays(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, PID, processes=1)) as warm:
            first = await warm.do(job())
            os.kill(int(first.output), signal.SIGKILL)
            # Neither one that comes before the death is known, nor one that comes after it.
            os.waitid(os.P_PID, int(first.output), os.WEXITED | os.WNOWAIT)
            second = await warm.do(job())
            assert second.outcome is Outcome.DONE
            os.kill(int(second.output), signal.SIGKILL)
            while [int(second.output)] == await warm.await_ready():
                await asyncio.sleep(0.01)
            assert (await warm.do(job())).outcome is Outcome.DONE

    in_loop(scenario())


def test_what_it_leaves_in_its_group_ends_with_it(tmp_path: Path) -> None:
    code = """
    import subprocess
    def f(job):
        return subprocess.Popen(["sleep", "600"]).pid
    """
    report = do(python(tmp_path, code), job())
    assert processes.has_ended(int(report.output), TIMEOUT / 4)


# When a job takes too long, or must stop


def test_a_job_that_takes_too_long_is_ended_with_its_group_and_the_next_is_done() -> None:
    script = """
    ready
    while next; do
        [ "$body" ] || { trap '' TERM; sleep 600 & sleep 600; }
        answer "$body"
    done
    """

    async def scenario() -> list[Report]:
        settings = sh(script, timeout=0.3, kill_grace=0.1, processes=1)
        async with pool(settings) as warm:
            return [await warm.do(job(b"quick")), await warm.do(job()), await warm.do(job(b"next"))]

    quick, late, following = in_loop(scenario())
    assert quick.outcome is following.outcome is Outcome.DONE
    assert (late.outcome, late.reason, late.signal) == (Outcome.FAILED, "timeout", "SIGKILL")


def test_a_process_that_never_looks_at_its_job_has_failed_it() -> None:
    report = do(sh("ready; sleep 600", timeout=0.2, kill_grace=0.1), job())
    assert (report.outcome, report.reason) == (Outcome.FAILED, "timeout")


def test_the_time_of_a_job_counts_from_its_own_beginning(tmp_path: Path) -> None:
    async def scenario() -> list[Report]:
        settings = python(tmp_path, EVAL, processes=1, timeout=0.8)
        async with pool(settings, depth=8) as warm:
            await learn(warm)
            return await asyncio.gather(*(warm.do(job(b"time.sleep(0.3)")) for _ in range(5)))

    assert {report.outcome for report in in_loop(scenario())} == {Outcome.DONE}


def test_a_stop_interrupts_those_that_run_and_those_that_wait(tmp_path: Path) -> None:
    async def scenario() -> list[Report]:
        settings = python(tmp_path, EVAL, processes=1)
        async with pool(settings, depth=2) as warm:
            stop = asyncio.get_running_loop().create_future()
            tasks = [warm.soon(named(str(n), b"time.sleep(600)"), stop) for n in range(3)]
            await told(events, "begun")
            stop.set_result(None)
            return [*await asyncio.gather(*tasks), await warm.do(job(), stop)]

    with logged() as events:
        reports = in_loop(scenario())
    assert {report.outcome for report in reports} == {Outcome.INTERRUPTED}


@pytest.mark.parametrize("cause", ["drain", "timeout"])
def test_a_job_that_is_done_in_its_grace_is_done(tmp_path: Path, cause: str) -> None:
    code = """
    import time
    def f(job):
        try:
            print("runs", flush=True)
            time.sleep(600)
        except SystemExit:
            return "nevertheless"
    """

    async def scenario() -> Report:
        async with pool(python(tmp_path, code, timeout=0.3 if cause == "timeout" else 600)) as warm:
            stop = asyncio.get_running_loop().create_future()
            task = warm.soon(job(), stop)
            if cause == "drain":
                await told(events, "output", text="runs")
                stop.set_result(None)
            return await task

    with logged() as events:
        report = in_loop(scenario())
    assert (report.outcome, report.output) == (Outcome.DONE, b"nevertheless")


def test_a_job_that_nobody_waits_for_any_more_is_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL)) as warm:
            task = warm.soon(job(b"time.sleep(600)"))
            await told(events, "begun")
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    with logged() as events:
        in_loop(scenario())


# When a process cannot start


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
                await told(events, "child failed")
                mended.touch()
                reports = await asyncio.gather(*short)
                assert {report.output for report in reports} == {b"short"}
                assert not long.done()
                # Not one for each job.
                assert len(warm.children) == 2
                gate.touch()
                await long
                assert warm.degraded is None
                await told(events, "child recovered", handler="test")

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
            await told(events, "child failed")
            python(tmp_path, PID + "# of another size\n")
            await told(events, "child recovered")
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


# When a process is replaced


@pytest.mark.parametrize("depth", [1, 4])
def test_a_process_is_replaced_after_so_many_jobs(tmp_path: Path, depth: int) -> None:
    async def scenario() -> list[Report]:
        settings = python(tmp_path, PID, processes=1, recycle_after=3)
        async with pool(settings, depth=depth) as warm:
            return await asyncio.gather(*(warm.do(job()) for _ in range(9)))

    pids = [report.output for report in in_loop(scenario())]
    assert len(set(pids)) == 3
    assert {pids.count(pid) for pid in pids} == {3}


#: Keeps as many bytes as its body says, and answers with its process id; takes its time for "-1".
GROWS = """
import os, time
kept = []
def f(job):
    kept.append(b"x" * int(job.body))
    time.sleep(0.05 * (job.body == b"-1"))
    return os.getpid()
"""


def test_a_process_that_has_grown_is_replaced(tmp_path: Path) -> None:
    async def scenario() -> list[bytes]:
        settings = python(tmp_path, GROWS, processes=1, memory_limit=100 * MiB)
        async with pool(settings) as warm:
            return [(await warm.do(job(b"%d" % size))).output for size in (1, 1, 150 * MiB, 1, 1)]

    (first, second, third, fourth, fifth), events = outcome(scenario())
    assert first == second == third != fourth == fifth
    first_to_leave = next(e for e in events if e["event"] == "child leaves")
    assert first_to_leave["reason"] == "memory_limit"


def test_what_lies_in_the_pipe_of_a_process_that_has_grown_is_done_by_another(
    tmp_path: Path,
) -> None:
    async def scenario() -> list[bytes]:
        settings = python(tmp_path, GROWS, processes=1, memory_limit=100 * MiB)
        async with pool(settings, depth=50) as warm:
            await learn(warm)
            sizes = [150 * MiB] + [-1] * 15
            reports = await asyncio.gather(*(warm.do(job(b"%d" % size)) for size in sizes))
            return [report.output for report in reports]

    grown, *others = in_loop(scenario())
    # It begins the next before anybody can look at it, and may do more while nobody does.
    assert others.count(grown) < len(others) / 2


def test_a_job_behind_one_that_ends_its_process_is_done_by_another(tmp_path: Path) -> None:
    # The first process has read the second job already, but not begun it.
    script = f"""
    ready
    if mkdir {tmp_path}/first 2>/dev/null; then
        next
        said='{{"frame":1,"outcome":"done","last":true}}'
        next
        echo "$said" >&4
        exit 1
    fi
    while next; do answer "$body"; done
    """

    async def scenario() -> list[Report]:
        async with pool(sh(script, processes=1), depth=4) as warm:
            warm.start()
            await warm.await_ready()
            return await asyncio.gather(*(warm.do(job(b"%d" % n)) for n in range(4)))

    reports = in_loop(scenario())
    assert [report.output for report in reports] == [b"", b"1", b"2", b"3"]
    assert {report.outcome for report in reports} == {Outcome.DONE}


def test_processes_leave_at_the_end_of_their_input() -> None:
    settings = sh("ready; while next; do answer x; done; echo left")

    async def scenario() -> Report:
        async with pool(settings) as warm:
            return await warm.do(job())

    report, events = outcome(scenario())
    assert report.outcome is Outcome.DONE
    assert [e["text"] for e in events if e["event"] == "output"] == ["left"]
    assert [e["handler"] for e in events if e["event"] == "output"] == ["test"]
    assert not [e for e in events if e["event"] == "child ended"]


def test_a_process_that_does_not_leave_is_killed() -> None:
    began = time.monotonic()
    settings = sh("trap '' TERM; ready; next; answer x; sleep 600", kill_grace=0.1)
    assert do(settings, job()).outcome is Outcome.DONE
    assert time.monotonic() - began < TIMEOUT / 4


def test_a_drain_lets_those_that_run_end_and_starts_none(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, PID, processes=1)) as warm:
            tasks = [warm.soon(named(str(n), bytes(gate))) for n in range(2)]
            await told(events, "output", text="runs")
            warm.drain()
            waiting = await tasks[1]
            gate.touch()
            running = await tasks[0]
            return [running, waiting, await warm.do(job())]

    with logged() as events:
        running, *others = in_loop(scenario())
    assert running.outcome is Outcome.DONE
    assert {report.outcome for report in others} == {Outcome.INTERRUPTED}
    assert begun(events) == ["0"]


def test_a_process_that_dies_in_a_drain_leaves_its_jobs_to_nobody() -> None:
    async def scenario() -> list[Report]:
        async with pool(sh("ready; next; echo runs; sleep 600", processes=1), depth=3) as warm:
            warm.start()
            (pid,) = await warm.await_ready()
            tasks = [warm.soon(named(str(n))) for n in range(3)]
            await told(events, "output", text="runs")
            warm.hold()
            warm.drain()
            os.kill(pid, signal.SIGKILL)
            return await asyncio.gather(*tasks)

    with logged() as events:
        reports = in_loop(scenario())
    assert [report.reason for report in reports] == ["crashed", "not begun", "not begun"]


def test_a_process_that_is_ready_and_ends_is_told_once(hasty: None) -> None:
    async def scenario() -> None:
        async with pool(sh("ready")) as warm:
            for _ in range(5):
                assert (await warm.do(job())).outcome is Outcome.UNAVAILABLE
                await asyncio.sleep(0.06)  # a new one may be started then

    _, events = outcome(scenario())
    assert len([event for event in events if event["event"] == "child failed"]) == 1


def test_those_that_have_been_replaced_still_do_what_they_have(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, PID, processes=1)) as warm:
            tasks = [warm.soon(named(str(n), bytes(gate))) for n in range(3)]
            await told(events, "output", text="runs")
            warm.retire()
            gate.touch()
            reports = await asyncio.gather(*tasks)
            while warm.processes:
                await asyncio.sleep(0.01)
            return reports

    with logged() as events:
        reports = in_loop(scenario())
    assert len({report.output for report in reports}) == 1


# What breaks the protocol

BREACHES = {
    "nonsense": "echo nonsense",
    "an empty line": "echo",
    "an array": "echo '[]'",
    "deeper than any parser": "head -c 500000 /dev/zero | tr '\\0' '['; echo",
    "unknown": "echo '{\"what\":1}'",
    "ready again": "echo '{\"ready\":1}'",
    "another frame": 'echo \'{"frame":99,"outcome":"done"}\'',
    "no outcome": "echo '{\"frame\":1}'",
    "a wrong outcome": 'echo \'{"frame":1,"outcome":"unavailable"}\'',
    "a length below nothing": 'echo \'{"frame":1,"outcome":"done","length":-1}\'',
    "a length in words": 'echo \'{"frame":1,"outcome":"done","length":"1"}\'',
    "a delay below nothing": 'echo \'{"frame":1,"outcome":"failed","retry_after":-1}\'',
    "a wrong level": 'echo \'{"log":"loud","text":"x"}\'',
    "a wrong stream": 'echo \'{"output":"stdin","length":1}\'; echo',
    "a line without end": "head -c 3000000 /dev/zero",
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_process_that_breaks_the_protocol_is_replaced_and_has_failed_its_job(name: str) -> None:
    script = f"""
    ready
    while next; do
        if [ "$body" = bad ]; then echo cause >&2; {{ {BREACHES[name]}; }} >&4; sleep 600; fi
        answer "$body"
    done
    """

    async def scenario() -> list[Report]:
        async with pool(sh(script, processes=1, kill_grace=600.0)) as warm:
            return [await warm.do(job(b"bad")), await warm.do(job(b"good"))]

    (bad, good), events = outcome(scenario())
    assert (bad.outcome, bad.reason) == (Outcome.FAILED, "crashed")
    assert bad.error.startswith("broke the protocol: ")
    assert bad.error.endswith("\ncause")
    assert (good.outcome, good.output) == (Outcome.DONE, b"good")
    assert [e for e in events if e["event"] == "child ended"]


def test_a_job_is_never_settled_by_a_second_answer_to_the_one_before() -> None:
    # It has read the next job when it sends them.
    script = """
    ready
    next
    next
    printf '{"frame":1,"outcome":"done"}\\n{"frame":1,"outcome":"done"}\\n' >&4
    sleep 600
    """

    async def scenario() -> tuple[Report, Report]:
        async with pool(sh(script, processes=1), depth=2) as warm:
            warm.start()
            await warm.await_ready()
            return await asyncio.gather(warm.do(job()), warm.do(job()))

    first, second = in_loop(scenario())
    assert first.outcome is Outcome.DONE
    assert (second.outcome, second.reason) == (Outcome.FAILED, "crashed")


def test_ten_thousand_lines_and_keys_nobody_knows_are_no_breach() -> None:
    script = """
    echo '{"ready":1,"name":"new"}' >&4
    while next; do
        yes '{"log":"debug","logger":"a","text":"b","new":1}' | head -n 10000 >&4
        printf '{"frame":%d,"outcome":"failed","error":"no","note":"n","new":[]}\\n' "$frame" >&4
    done
    """
    ran = do_all(sh(script), job(), output_lines=2)
    assert (ran.report.outcome, ran.report.error, ran.report.note) == (Outcome.FAILED, "no", "n")
    assert ran.omitted("log") == 9998


def test_no_text_of_a_process_can_forge_anything() -> None:
    script = """
    ready
    next
    text='a\\\\nb\\\\u001b[31m\\\\ud800'
    printf '{"frame":1,"outcome":"failed","error":"%b","note":"\\\\r"}\\n' "$text" >&4
    next
    """
    report = do(sh(script), job())
    assert (report.error, report.note) == ("a\nb\\x1b[31m\\ud800", "\\r")


# Many


def test_five_hundred_spawns_leave_no_zombie_and_no_descriptor() -> None:
    # in_loop looks for both.
    settings = sh("ready; while next; do answer x; done", recycle_after=1, processes=4)

    async def scenario() -> None:
        async with pool(settings) as warm:
            for _ in range(25):
                reports = await asyncio.gather(*(warm.do(job()) for _ in range(20)))
                assert {report.outcome for report in reports} == {Outcome.DONE}

    in_loop(scenario())
    until(lambda: not processes.strays(), "no strays")


def test_children_come_by_exec_and_no_lock_of_the_daemon_goes_with_them() -> None:
    # Whoever forks this process runs what is registered here; posix_spawn does not.
    said = alone(
        """
        import asyncio, logging, threading
        from tests.harness.pools import job, pool, sh
        os.register_at_fork(before=lambda: print("forked"))
        held = logging.StreamHandler()
        threading.Thread(target=held.acquire, daemon=True).start()
        logging.root.addHandler(held)
        settings = sh("ready; while next; do answer x; done", recycle_after=1, processes=4)

        async def scenario():
            async with pool(settings) as warm:
                for _ in range(20):
                    reports = await asyncio.gather(*(warm.do(job()) for _ in range(10)))
                    assert {report.output for report in reports} == {b"x"}, reports

        asyncio.run(scenario())
        sys.stdout.flush()
        os._exit(0)  # the lock is still held
        """
    )
    assert "forked" not in said


def test_a_program_is_found_in_the_path_of_its_handler(tmp_path: Path) -> None:
    script = tmp_path / "handler"
    script.write_text("#!/bin/sh\necho '{\"ready\":1}' >&4\nread -r line <&3\n")
    script.chmod(0o755)
    settings = Handler("test", stream=("handler",), environment={"PATH": f"{tmp_path}:/bin"})
    assert do(settings, job()).reason == "crashed"


# Where the daemon knows less than its processes


@pytest.mark.parametrize("end", ["timeout", "stop"])
def test_the_end_of_a_job_that_is_done_already_does_not_hit_the_next_one(
    tmp_path: Path, end: str
) -> None:
    gate, at_next = tmp_path / "gate", tmp_path / "next"
    wait = f"[time.sleep(0.005) for _ in iter(lambda: os.path.exists({str(gate)!r}), True)]"
    following = f"open({str(at_next)!r}, 'x').close() or time.sleep(0.1)"

    async def scenario() -> list[Report]:
        settings = python(tmp_path, EVAL, processes=1, timeout=0.3 if end == "timeout" else 600)
        async with pool(settings, depth=8) as warm:
            await learn(warm)
            stop = asyncio.get_running_loop().create_future()
            tasks = [
                warm.soon(named("first", wait.encode()), stop),
                warm.soon(named("next", following.encode())),
            ]
            await told(events, "begun", job_id="first")
            [child] = warm.children
            gate.touch()
            # Without the loop: its answer has come, and was not read.
            until(at_next.exists, "that the next one has begun")
            if end == "timeout":
                until(lambda: time.monotonic() > child._deadline, "the end of its time")
                assert child._timer
                child._timer.cancel()
                child._look()
            else:
                stop.set_result(None)
            return await asyncio.gather(*tasks)

    with logged() as events:
        reports = in_loop(scenario())
    assert {report.outcome for report in reports} == {Outcome.DONE}


def test_jobs_that_are_taken_out_of_a_pipe_again_and_again_take_no_more_memory(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    wait = f"[time.sleep(0.005) for _ in iter(lambda: os.path.exists({str(gate)!r}), True)]"
    large = b"0" + b" " * 200_000

    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            await learn(warm)
            tasks = [warm.soon(named("first", wait.encode()))]
            tasks += [warm.soon(named(str(n), large)) for n in range(4)]
            await told(events, "begun", job_id="first")
            [child] = warm.children
            for _ in range(50):
                warm.recall()
                await asyncio.sleep(0)
            assert child._inbox.unread() < 6 * len(large)
            gate.touch()
            for task in tasks:
                assert (await task).outcome is Outcome.DONE

    with logged() as events:
        in_loop(scenario())


def test_what_lies_in_the_pipe_of_a_process_that_gives_up_and_does_not_end_is_done_by_another(
    tmp_path: Path,
) -> None:
    hangs = b"__import__('threading').Thread(target=time.sleep, args=(600,)).start() or sys.exit(1)"

    async def scenario() -> list[Report]:
        settings = python(tmp_path, EVAL, processes=1, kill_grace=0.2)
        async with pool(settings, depth=8) as warm:
            await learn(warm)
            work = [warm.do(named("hangs", hangs)), warm.do(job(b"1")), warm.do(job(b"2"))]
            return await asyncio.wait_for(asyncio.gather(*work), TIMEOUT / 2)

    with logged():
        reports = in_loop(scenario())
    outcomes = [report.outcome for report in reports]
    assert outcomes == [Outcome.FAILED, Outcome.DONE, Outcome.DONE]


def test_a_process_that_was_kept_for_a_job_that_never_began_leaves_without_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            await learn(warm)
            stop = asyncio.get_running_loop().create_future()
            waits = asyncio.ensure_future(
                warm.run(job(), stop, lambda _details: None, lambda *_, **__: False)
            )
            await asyncio.sleep(0)
            warm.retire()
            assert warm.processes == 1
            stop.set_result(None)
            assert (await waits).outcome is Outcome.INTERRUPTED
            async with asyncio.timeout(TIMEOUT / 4):
                while warm.processes:
                    await asyncio.sleep(0.01)

    with logged():
        in_loop(scenario())


def test_a_job_that_waits_without_a_process_is_not_forgotten_by_reloads(tmp_path: Path) -> None:
    def configured(**handlers: Handler) -> Any:
        log_settings = SimpleNamespace(output_lines=10, level="info")
        worker = SimpleNamespace(queues=[])
        return SimpleNamespace(handlers=handlers, log=log_settings, queues={}, worker=worker)

    async def scenario() -> Report:
        handlers = HandlerRegistry(ENVIRONMENT, unguarded)
        warm = handlers.of(configured(test=python(tmp_path, PID)))["test"]
        stop = asyncio.get_running_loop().create_future()
        slots: list[None] = []
        waits = asyncio.ensure_future(
            warm.run(job(), stop, lambda _details: None, lambda behind=None: bool(slots))
        )
        await asyncio.sleep(0)
        for _ in range(2):
            handlers.of(configured())
        slots.append(None)
        handlers.hand_out()
        try:
            return await asyncio.wait_for(waits, TIMEOUT / 4)
        finally:
            await handlers.close()

    assert in_loop(scenario()).outcome is Outcome.DONE
