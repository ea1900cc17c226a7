"""One warm process: how it gets its jobs, answers them, and comes to its end."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from pathlib import Path

import pytest

from tests.harness import processes
from tests.harness.commands import alone, open_descriptors
from tests.harness.pools import (
    EVAL,
    PID,
    do,
    do_all,
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
from tests.harness.waiting import SCALE, TIMEOUT, until
from workerd.config.model import Handler
from workerd.core.job import Outcome, Report

MiB = 1 << 20


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


def test_what_it_leaves_in_its_group_ends_with_it(tmp_path: Path) -> None:
    code = """
    import subprocess
    def f(job):
        return subprocess.Popen(["sleep", "600"]).pid
    """
    report = do(python(tmp_path, code), job())
    assert processes.has_ended(int(report.output), TIMEOUT / 4)


def test_a_job_that_takes_too_long_is_ended_with_its_group_and_the_next_is_done() -> None:
    script = """
    ready
    while next; do
        [ "$body" ] || { trap '' TERM; sleep 600 & sleep 600; }
        answer "$body"
    done
    """

    async def scenario() -> list[Report]:
        settings = sh(script, timeout=0.3 * SCALE, kill_grace=0.1, processes=1)
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
            await until_deep(warm)
            return await asyncio.gather(*(warm.do(job(b"time.sleep(0.3)")) for _ in range(5)))

    assert {report.outcome for report in in_loop(scenario())} == {Outcome.DONE}


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
        timeout = 0.3 * SCALE if cause == "timeout" else 600.0
        async with pool(python(tmp_path, code, timeout=timeout)) as warm:
            stop = asyncio.get_running_loop().create_future()
            task = warm.soon(job(), stop)
            if cause == "drain":
                await until_logged(events, "output", text="runs")
                stop.set_result(None)
            return await task

    with logged() as events:
        report = in_loop(scenario())
    assert (report.outcome, report.output) == (Outcome.DONE, b"nevertheless")


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
            await until_deep(warm)
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
    "a level that is a list": "echo '{\"log\":[]}'",
    "a text that is a table": 'echo \'{"log":"info","text":{}}\'',
    "a length beyond all numbers": 'echo \'{"frame":1,"outcome":"done","length":1e999}\'',
    "a delay that is no number": 'echo \'{"frame":1,"outcome":"failed","retry_after":NaN}\'',
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
            await until_deep(warm)
            stop = asyncio.get_running_loop().create_future()
            tasks = [
                warm.soon(named("first", wait.encode()), stop),
                warm.soon(named("next", following.encode())),
            ]
            await until_logged(events, "begun", job_id="first")
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


def test_what_lies_in_the_pipe_of_a_process_that_gives_up_and_does_not_end_is_done_by_another(
    tmp_path: Path,
) -> None:
    hangs = b"__import__('threading').Thread(target=time.sleep, args=(600,)).start() or sys.exit(1)"

    async def scenario() -> list[Report]:
        settings = python(tmp_path, EVAL, processes=1, kill_grace=0.2)
        async with pool(settings, depth=8) as warm:
            await until_deep(warm)
            work = [warm.do(named("hangs", hangs)), warm.do(job(b"1")), warm.do(job(b"2"))]
            return await asyncio.wait_for(asyncio.gather(*work), TIMEOUT / 2)

    with logged():
        reports = in_loop(scenario())
    outcomes = [report.outcome for report in reports]
    assert outcomes == [Outcome.FAILED, Outcome.DONE, Outcome.DONE]
