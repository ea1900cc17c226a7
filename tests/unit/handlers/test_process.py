"""Children of the daemon: how they are started, fed, listened to and brought to an end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import processes
from tests.harness.commands import (
    ENVIRONMENT,
    alone,
    as_nobody,
    handler,
    in_loop,
    job,
    open_descriptors,
    prepared,
    run,
    run_all,
    run_one,
    unguarded,
)
from tests.harness.waiting import SCALE, TIMEOUT
from workerd.core.job import Outcome, Report
from workerd.handlers.process import Process

MiB = 1 << 20

#: Seconds that a shell needs for a few commands, and more.
SOON = 0.2 * SCALE

#: Signals that a process may ignore and block, all but those that the C library keeps.
SIGNALS = [
    number
    for number in signal.valid_signals()
    if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)
]


def start(*argv: str, heard: Callable[[bytes], None] = lambda _: None) -> Process:
    """Start a child; what it writes to either stream goes to `heard`."""
    environment = {name.encode(): value.encode() for name, value in ENVIRONMENT.items()}
    command = [argument.encode() for argument in argv]
    return Process(command, environment, None, b"", heard, heard, unguarded)


# How it is started


def test_a_child_leads_a_session_and_a_process_group_of_its_own() -> None:
    report = run(handler("sh", "-c", "read -r stat </proc/$$/stat; echo $$ $stat"), job()).report
    pid, *stat = report.output.split()
    fields = b" ".join(stat).rpartition(b")")[2].split()
    group, session = fields[2], fields[3]
    assert group == session == pid


@contextlib.contextmanager
def every_signal_ignored_and_blocked() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, action in before.items():
            signal.signal(number, action)


def test_a_child_has_default_signals_and_an_empty_mask() -> None:
    with every_signal_ignored_and_blocked():
        report = run(handler("grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"), job()).report
    masks = {line.split()[0]: int(line.split()[1], 16) for line in report.output.splitlines()}
    assert masks[b"SigBlk:"] == 0
    ignored = {number for number in SIGNALS if masks[b"SigIgn:"] & 1 << number - 1}
    assert ignored == set()


def test_a_child_has_no_descriptors_but_its_own_four() -> None:
    # Several at once: the pipes of one must not leak into another.
    slow = handler("sh", "-c", "sleep 0.1; ls /proc/self/fd")
    # Those that whoever started the tests has left open are shed by the daemon, not here.
    foreign = {fd for fd in open_descriptors() if os.get_inheritable(int(fd))}
    for ran in run_all(slow, [job() for _ in range(8)]):
        # The fifth is the folder that ls reads.
        assert set(ran.lines()) - foreign <= {"0", "1", "2", "3", "4"}


def test_a_job_gets_its_working_directory_even_if_the_daemon_may_not_return_to_its_own() -> None:
    # As when root starts it as another user, from a folder that is closed to that user.
    said = as_nobody(
        """
        import pathlib
        os.chdir("private")
        os.chmod(".", 0)
        for _ in range(2):
            report = run(handler("pwd", working_directory=pathlib.Path("/usr")), job()).report
            print(report.outcome.value, report.output)
        """
    )
    assert said == "done b'/usr\\n'\n" * 2


# Running out of things


def test_without_descriptors_a_job_has_either_run_or_not(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    command = handler("sh", "-c", f"echo >>{ran}")

    async def with_so_many_free(free: int) -> Report:
        ready, never = prepared(command), asyncio.get_running_loop().create_future()
        with contextlib.ExitStack() as undo:
            used = set(map(int, open_descriptors()))
            # Without gaps below the limit, exactly so many are free.
            for _ in range(max(used) + 1 - len(used)):
                undo.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 1 + free, hard))
            return await run_one(ready, job(), never)

    outcomes = []
    for free in range(12):
        ran.write_text("")
        report = in_loop(with_so_many_free(free))
        outcomes.append(report.outcome)
        runs = 1 if report.outcome is Outcome.DONE else 0
        assert ran.read_text().count("\n") == runs, f"{free} free: {report}"
        if report.outcome is not Outcome.DONE:
            assert report.outcome is Outcome.UNAVAILABLE
            assert "Too many open files" in report.error
    # Both ends of three pipes, and the report. Once the program runs, nothing more may be missing.
    assert outcomes.index(Outcome.DONE) == 7


def test_a_job_that_no_process_is_left_for_is_not_to_blame() -> None:
    said = as_nobody(
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
        report = run(handler("true"), job()).report
        print(report.outcome.value, report.error)
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        print(run(handler("true"), job()).report.outcome.value)
        """
    )
    why = "Resource temporarily unavailable: no process is left (TasksMax=, ulimit -u)"
    assert said == f"unavailable cannot run true: {why}\ndone\n"


# What it is given


def test_a_large_body_arrives_whole() -> None:
    body = os.urandom(MiB) * 20
    report = run(handler("sha256sum"), job(body)).report
    assert report.output.split()[0].decode() == hashlib.sha256(body).hexdigest()


def test_an_empty_body_is_an_empty_standard_input() -> None:
    assert run(handler("wc", "-c"), job()).report.output == b"0\n"


@pytest.mark.parametrize("status", [0, 3])
def test_a_child_may_close_a_large_standard_input_unread(status: int) -> None:
    script = f"exec 0<&-; sleep 0.1; exit {status}"
    report = run(handler("sh", "-c", script), job(bytes(50 * MiB))).report
    assert report.exit_status == status
    assert report.outcome is (Outcome.FAILED if status else Outcome.DONE)


def test_a_child_may_read_only_the_beginning_of_a_large_standard_input() -> None:
    report = run(handler("head", "-c", "3"), job(b"abc" + bytes(50 * MiB))).report
    assert (report.outcome, report.output) == (Outcome.DONE, b"abc")


def test_a_child_that_never_reads_a_large_standard_input_times_out_like_any_other() -> None:
    report = run(handler("sleep", "10", timeout=0.1), job(bytes(50 * MiB))).report
    assert (report.outcome, report.reason) == (Outcome.FAILED, "timeout")


def test_a_slow_reader_holds_nobody_up(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    script = f"""
    case $WORKERD_JOB_ID in
    slow) until [ -e {flag} ]; do sleep 0.01; done; wc -c ;;
    quick) touch {flag} ;;
    esac
    """
    slow, quick = run_all(
        handler("sh", "-c", script), [job(bytes(MiB), message_id="slow"), job(message_id="quick")]
    )
    assert quick.report.outcome is Outcome.DONE
    assert slow.report.output == f"{MiB}\n".encode()


# What it says


def test_what_a_child_wrote_last_is_not_lost() -> None:
    # A pipe that holds more than is read at once, still full when the child is gone.
    script = (
        "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20); os.write(1, b'x' * 300000)"
    )
    heard: list[bytes] = []

    async def scenario() -> int:
        process = start(sys.executable, "-I", "-S", "-c", script, heard=heard.append)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return await process.wait()

    assert in_loop(scenario()) == 0
    assert b"".join(heard) == b"x" * 300_000


def test_a_child_may_close_its_output_and_go_on(tmp_path: Path) -> None:
    script = f"echo said; exec >&- 2>&-; sleep 0.1; touch {tmp_path}/went-on"
    report = run(handler("sh", "-c", script), job()).report
    assert (report.outcome, report.output) == (Outcome.DONE, b"said\n")
    assert (tmp_path / "went-on").exists()


def test_a_flood_of_output_is_counted_in_constant_memory() -> None:
    # Hundreds of megabytes on each stream.
    said = alone(
        """
        def peak():
            with open("/proc/self/status") as file:
                return next(int(l.split()[1]) for l in file if l.startswith("VmHWM"))

        script = "yes out | head -c 200000000 & yes err! | head -c 200000000 >&2; wait; echo end"
        flood = handler("sh", "-c", script, output_limit=1000)
        run(handler("true"), job())
        before = peak()
        ran = run(flood, job(), output_lines=6)
        print(peak() - before)
        print(ran.report.outcome.value, ran.report.output == (b"out\\n" * 250)[4:] + b"end\\n")
        print(ran.lines("stdout"), ran.omitted("stdout"))
        print(ran.lines("stderr"), ran.omitted("stderr"))
        """
    )
    grown, *rest = said.splitlines()
    assert int(grown) < 16_384  # KiB
    assert rest == [
        "done True",
        str(["out"] * 5 + ["end"]) + f" {50_000_001 - 6}",
        str(["err!"] * 6) + f" {40_000_000 - 6}",
    ]


def test_the_last_lines_of_a_long_output_are_whole_ones() -> None:
    # Of more than is kept in memory, the oldest line that is kept has lost its beginning.
    lines = [b"%05d " % number + b"x" * 5000 for number in range(500)]
    ran = run(handler("cat"), job(b"\n".join(lines)), output_lines=400)
    shown = ran.lines()
    assert {len(line) for line in shown} == {5006}
    assert shown[:200] == [line.decode() for line in lines[:200]]
    assert 50 < len(shown[200:]) <= 200
    assert shown[200:] == [line.decode() for line in lines[-len(shown[200:]) :]]
    assert ran.omitted() == 500 - len(shown)


@pytest.mark.parametrize(
    ("printed", "text"),
    [
        (b"plain \t text", "plain \t text"),
        ("grün →".encode(), "grün →"),
        (b"\xff\x00", "\\xff\\x00"),
        (b"\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        (b"windows\r", "windows"),
        (b"50 %\r100 %", "50 %\\r100 %"),
        ("\u2028\u202e\x85".encode(), "\\u2028\\u202e\\x85"),
        (b'{"event": "forged"}', '{"event": "forged"}'),
        (b"%s %n \\n $(id)", "%s %n \\n $(id)"),
    ],
)
@pytest.mark.parametrize("ending", [b"", b"\n"])
@pytest.mark.parametrize("command", ["cat", "cat >&2"])
def test_what_is_printed_stays_one_harmless_line(
    printed: bytes, text: str, ending: bytes, command: str
) -> None:
    ran = run(handler("sh", "-c", command), job(printed + ending))
    assert ran.lines("stderr" if ">&2" in command else "stdout") == [text]


# How it ends


def test_a_child_that_ignores_its_term_is_killed_with_its_group() -> None:
    script = """
    trap 'echo told' TERM
    (trap '' TERM; exec sleep 60) & echo $!
    (trap '' TERM; exec sleep 60) & echo $!
    while :; do wait; done
    """
    ran = run(handler("sh", "-c", script, timeout=SOON, kill_grace=SOON), job())
    assert (ran.report.outcome, ran.report.reason) == (Outcome.FAILED, "timeout")
    assert ran.report.signal == "SIGKILL"
    first, second, *told = ran.lines()
    assert told == ["told"]
    for pid in (first, second):
        assert processes.has_ended(int(pid), TIMEOUT / 4)


def test_a_child_has_its_grace_to_put_things_in_order() -> None:
    script = "trap 'echo in order; exit 3' TERM; sleep 60 & while :; do wait; done"
    ran = run(handler("sh", "-c", script, timeout=SOON, kill_grace=10 * TIMEOUT), job())
    assert (ran.report.reason, ran.report.exit_status) == ("timeout", 3)
    assert ran.lines() == ["in order"]


def test_the_whole_group_is_told_to_end(tmp_path: Path) -> None:
    script = "(trap 'echo told; exit' TERM; sleep 60 & wait) & trap '' TERM; wait"
    ran = run(handler("sh", "-c", script, timeout=SOON, kill_grace=10 * TIMEOUT), job())
    assert ran.lines() == ["told"]
    assert ran.report.exit_status == 0


def test_what_a_child_leaves_in_its_group_is_killed_with_it() -> None:
    script = "(trap '' TERM HUP; exec sleep 60) & echo $!"
    ran = run(handler("sh", "-c", script), job())
    assert ran.report.outcome is Outcome.DONE
    assert processes.has_ended(int(ran.report.output), TIMEOUT / 4)


@pytest.mark.parametrize("grandchild", ["sleep 600", "yes"])
def test_a_grandchild_in_a_session_of_its_own_holds_nothing_up(
    tmp_path: Path, grandchild: str
) -> None:
    # It has inherited all three pipes, and the second writes for ever.
    script = f"""
    setsid sh -c 'echo $$ >pid; exec {grandchild}' &
    until [ -s pid ]; do sleep 0.01; done
    echo done
    """
    command = handler("sh", "-c", script, working_directory=tmp_path, output_limit=10)

    async def scenario() -> Report:
        never = asyncio.get_running_loop().create_future()
        report = await run_one(prepared(command), job(), never)
        pid = int((tmp_path / "pid").read_text())
        # It is no part of the job any more, and lives until it writes to the closed pipe.
        assert grandchild == "yes" or not processes.has_ended(pid, 0)
        os.kill(pid, signal.SIGKILL)
        return report

    assert in_loop(scenario()).outcome is Outcome.DONE


def test_a_child_that_has_just_ended_is_not_told_to_end() -> None:
    async def scenario() -> tuple[int, str]:
        process = start("/bin/true")
        # It has ended, and the loop does not know yet.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        process.end("drain", grace=10.0)
        return await process.wait(), process.cause

    assert in_loop(scenario()) == (0, "")


def test_five_hundred_quick_jobs_leave_no_zombie_and_no_descriptor() -> None:
    async def scenario() -> None:
        command = prepared(handler("true"))
        never = asyncio.get_running_loop().create_future()
        before = processes._direct_children(os.getpid()), open_descriptors()
        for _ in range(125):
            reports = await asyncio.gather(*(run_one(command, job(), never) for _ in range(4)))
            assert {report.outcome for report in reports} == {Outcome.DONE}
        assert (processes._direct_children(os.getpid()), open_descriptors()) == before

    in_loop(scenario())
