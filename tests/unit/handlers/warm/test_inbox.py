"""What lies in the pipe of a warm process: it has not begun, and can be taken back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.harness.pools import (
    EVAL,
    begun,
    filled,
    in_loop,
    job,
    logged,
    named,
    pool,
    python,
    until_deep,
    until_logged,
)
from workerd.core.job import Outcome, Report


def test_jobs_that_lie_in_a_pipe_have_not_begun(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            tasks = await filled(warm, events, gate)
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
            first, *others = await filled(warm, events, tmp_path / "gate")
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


@pytest.mark.parametrize("leaves", [False, True])
def test_jobs_in_a_pipe_do_not_begin_once_it_is_held(tmp_path: Path, leaves: bool) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> list[Report]:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            first, *others = await filled(warm, events, gate)
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
            first, *others = await filled(warm, events, gate, *stops)
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
            await until_deep(warm)
            assert warm.capacity > 5
            # Some say nothing, and are ahead of the daemon when another does.
            names = [f"job {n}" if n % 5 == 0 else f"silent {n}" for n in range(300)]
            await asyncio.gather(*(warm.do(named(name)) for name in names))

    with logged() as events:
        in_loop(scenario())
    printed = [(e["job_id"], e["text"]) for e in events if e["event"] == "output"]
    assert sorted(printed) == sorted((f"job {n}", f"job {n}") for n in range(0, 300, 5))


def test_jobs_that_are_taken_out_of_a_pipe_again_and_again_take_no_more_memory(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    wait = f"[time.sleep(0.005) for _ in iter(lambda: os.path.exists({str(gate)!r}), True)]"
    large = b"0" + b" " * 200_000

    async def scenario() -> None:
        async with pool(python(tmp_path, EVAL, processes=1), depth=8) as warm:
            await until_deep(warm)
            tasks = [warm.soon(named("first", wait.encode()))]
            tasks += [warm.soon(named(str(n), large)) for n in range(4)]
            await until_logged(events, "begun", job_id="first")
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
