"""The pool of a warm handler: processes that start, work and leave, and their jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from tests.harness import processes
from tests.harness.pools import (
    EVAL,
    PID,
    begun,
    in_loop,
    job,
    logged,
    named,
    outcome,
    pool,
    python,
    sh,
    until_deep,
    until_logged,
)
from tests.harness.waiting import TIMEOUT, until
from workerd.core.job import Outcome, Report
from workerd.handlers.warm.dispatch import LOOK_AHEAD


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
                await until_logged(events, "output", job_id=name, text="runs")
            assert begun(events) == ["0", "1"]
            gate.touch()
            reports = await asyncio.gather(*tasks)
            assert len({report.output for report in reports}) == 2

    with logged() as events:
        in_loop(scenario())
    assert sorted(begun(events)) == ["0", "1", "2", "3"]
    assert sum(event["event"] == "child ready" for event in events) == 2


def test_another_process_starts_for_a_job_that_lies_in_a_pipe(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=2), depth=8) as warm:
            await until_deep(warm)  # one by one, so there is one process
            assert warm.processes == 1
            stop = asyncio.get_running_loop().create_future()
            long = warm.soon(named("long", b"time.sleep(600)"), stop)
            await until_logged(events, "begun", job_id="long")
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
            await until_deep(warm)
            stops = [asyncio.get_running_loop().create_future() for _ in range(2)]
            tasks = []
            for name, stop in zip(("one", "other"), stops, strict=True):
                tasks.append(warm.soon(named(name, b"time.sleep(600)"), stop))
                await until_logged(events, "begun", job_id=name)
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
            await until_deep(warm)
            assert warm.capacity > 1
            await warm.do(job(f"time.sleep({2 * LOOK_AHEAD})".encode()))
            assert warm.capacity == 1

    in_loop(scenario())


def test_only_the_job_that_was_being_done_has_failed_and_those_behind_it_go_to_another(
    tmp_path: Path,
) -> None:
    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, EVAL, processes=1), depth=4) as warm:
            await until_deep(warm)
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


def test_a_stop_interrupts_those_that_run_and_those_that_wait(tmp_path: Path) -> None:
    async def scenario() -> list[Report]:
        settings = python(tmp_path, EVAL, processes=1)
        async with pool(settings, depth=2) as warm:
            stop = asyncio.get_running_loop().create_future()
            tasks = [warm.soon(named(str(n), b"time.sleep(600)"), stop) for n in range(3)]
            await until_logged(events, "begun")
            stop.set_result(None)
            return [*await asyncio.gather(*tasks), await warm.do(job(), stop)]

    with logged() as events:
        reports = in_loop(scenario())
    assert {report.outcome for report in reports} == {Outcome.INTERRUPTED}


def test_a_job_that_nobody_waits_for_any_more_is_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL)) as warm:
            task = warm.soon(job(b"time.sleep(600)"))
            await until_logged(events, "begun")
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    with logged() as events:
        in_loop(scenario())


def test_a_drain_lets_those_that_run_end_and_starts_none(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, PID, processes=1)) as warm:
            tasks = [warm.soon(named(str(n), bytes(gate))) for n in range(2)]
            await until_logged(events, "output", text="runs")
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
            await until_logged(events, "output", text="runs")
            warm.hold()
            warm.drain()
            os.kill(pid, signal.SIGKILL)
            return await asyncio.gather(*tasks)

    with logged() as events:
        reports = in_loop(scenario())
    assert [report.reason for report in reports] == ["crashed", "not begun", "not begun"]


def test_those_that_have_been_replaced_still_do_what_they_have(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, PID, processes=1)) as warm:
            tasks = [warm.soon(named(str(n), bytes(gate))) for n in range(3)]
            await until_logged(events, "output", text="runs")
            warm.retire()
            gate.touch()
            reports = await asyncio.gather(*tasks)
            while warm.processes:
                await asyncio.sleep(0.01)
            return reports

    with logged() as events:
        reports = in_loop(scenario())
    assert len({report.output for report in reports}) == 1


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


def test_a_process_that_was_kept_for_a_job_that_never_began_leaves_without_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            await until_deep(warm)
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
