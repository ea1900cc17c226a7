"""What a job may do to its Python process: the next job does not notice, or gets another."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.harness.commands import Ran
from tests.harness.pools import do, do_all, job, python
from workerd.core.job import Outcome


def twice(folder: Path, deed: str, look: str, **options: Any) -> Ran:
    """Do the deed in a first job, and have a second one look."""
    code = f"""
import os, signal, sys, threading, time
def f(job):
    if job.body == b"deed":
        {deed}
        return
    return {look}
"""
    ran = do_all(python(folder, code, **options), job(b"deed"), job(b"look"))
    assert ran.report.outcome is Outcome.DONE, ran.report
    return ran


UMASK = os.umask(0o22)

DEEDS = {
    "directory": ("os.chdir('/')", "os.getcwd()", "{folder}"),
    "removed directory": ("os.mkdir('x'); os.chdir('x'); os.rmdir('../x')", "os.getcwd()", None),
    "umask": ("os.umask(0o123)", "oct(os.umask(0o22))", oct(UMASK)),
    "variables": (
        "os.environ['NEW'] = '1'; os.environ['HOME'] = 'x'; del os.environ['PATH']",
        "os.popen('echo $NEW$HOME').read() + os.environ['PATH']",
        "/home\n/usr/bin:/bin",
    ),
    "other variables": ("os.environ = {}", "os.environ['HOME']", "/home"),
    "signal handler": (
        "signal.signal(signal.SIGUSR1, lambda *_: None)",
        "signal.getsignal(signal.SIGUSR1).name",
        "SIG_DFL",
    ),
    "ignored TERM": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "signal.getsignal(signal.SIGTERM).__name__",
        "_terminate",
    ),
    "blocked signals": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
        "list(signal.pthread_sigmask(signal.SIG_BLOCK, []))",
        "[]",
    ),
    "alarm": ("signal.alarm(1)", "time.sleep(1.5)", ""),
    "replaced stdout": ("sys.stdout = open(os.devnull, 'w')", "print('heard')", ""),
    "closed stdout": ("sys.stdout.close()", "print('heard')", ""),
    "no stdout": ("sys.stdout = sys.stderr = None", "print('heard')", ""),
    "moved descriptor 1": (
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)",
        "os.system('echo heard') or None",
        "",
    ),
    "closed descriptors 0 to 2": ("os.closerange(0, 3)", "os.system('echo heard') or None", ""),
    "closed descriptors": ("os.closerange(3, 1024)", "'well'", "well"),
    "other files instead": (
        # Which take whatever is written, and say nothing for ever.
        "global a, b; import socket; a, b = socket.socketpair();"
        " [os.dup2(a.fileno(), fd) for fd in (64, 65)]",
        "'well'",
        "well",
    ),
    "garbage on descriptors 3 and 4": (
        "any(map(lambda fd: __import__('contextlib').suppress(OSError).__enter__(), (3, 4)))",
        "'well'",
        "well",
    ),
    "garbage on the protocol's own": (
        "[os.write(fd, b'garbage\\n') for fd in range(64, 70) if os.path.exists("
        "f'/proc/self/fd/{fd}') and os.readlink(f'/proc/self/fd/{fd}').startswith('pipe')"
        " and os.open(f'/proc/self/fdinfo/{fd}', 0) and ('01' in open(f'/proc/self/fdinfo/{fd}')"
        ".read().split('flags:')[1].split()[0][-2:])]",
        "'well'",
        "well",
    ),
    "fork that returns": ("os.fork()", "'well'", "well"),
    "fork that fails": ("exec('if os.fork() == 0: raise ValueError')", "'well'", "well"),
    "thread that prints": (
        "threading.Thread(target=lambda: [print('x' * 5000) for _ in range(2000)]).start()",
        "[print('y' * 5000, file=sys.stderr) for _ in range(300)] and 'well'",
        "well",
    ),
}


@pytest.mark.parametrize("name", DEEDS)
def test_what_a_job_does_to_its_process_does_not_reach_the_next(tmp_path: Path, name: str) -> None:
    deed, look, seen = DEEDS[name]
    ran = twice(tmp_path, deed, look, environment={"HOME": "/home"})
    if seen is not None:
        assert ran.report.output.decode() == seen.format(folder=tmp_path)
    if "heard" in look:
        assert ran.lines() == ["heard"]
    if name == "thread that prints":
        # Nor has the first one noticed.
        assert not [event for event in ran.events if event["event"] == "child ended"]


def test_a_forked_copy_never_answers_and_its_prints_are_the_jobs(tmp_path: Path) -> None:
    code = """
    import multiprocessing, os
    def part(number):
        print("part", number, "x" * 3000)  # written in one piece (pipe(7))
    def f(job):
        with multiprocessing.get_context("fork").Pool(4) as processes:
            processes.map(part, range(40))
        pid = os.fork()
        if pid == 0:
            print("copy")
            return "copy"
        return f"original {os.waitpid(pid, 0)[1]}"
    """
    ran = do_all(python(tmp_path, code), job(), job())
    assert ran.report.output == b"original 0"
    lines = ran.lines()
    assert lines.count("copy") == 2
    assert sum(line.startswith("part") for line in lines) == 80


def test_a_forked_copy_dies_of_sigterm_even_when_it_cannot_run_a_handler(tmp_path: Path) -> None:
    code = """
    import os, signal, threading
    def f(job):
        pid = os.fork()
        if pid == 0:
            with open("blocked", "w"):
                pass
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            signal.sigwait([signal.SIGUSR1])  # whatever else comes is not looked at
        while not os.path.exists("blocked"):
            pass
        while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "S":
            pass
        os.kill(pid, signal.SIGTERM)
        return os.waitpid(pid, 0)[1]
    """
    assert do(python(tmp_path, code), job()).output == b"%d" % signal.SIGTERM


def test_a_thread_that_a_job_leaves_behind_is_told(tmp_path: Path) -> None:
    deed = "threading.Thread(target=time.sleep, args=(600,), name='left', daemon=True).start()"
    ran = twice(tmp_path, deed, "1")
    (told,) = [e for e in ran.events if e["event"] == "output" and e["level"] == "warning"]
    assert told["text"] == "left running by a job: thread left (logged once)"


def test_context_variables_are_a_jobs_own(tmp_path: Path) -> None:
    code = """
    import contextvars
    seen = contextvars.ContextVar("seen", default=0)
    def f(job):
        seen.set(seen.get() + 1)
        return seen.get()
    """
    assert do_all(python(tmp_path, code), job(), job()).report.output == b"1"
