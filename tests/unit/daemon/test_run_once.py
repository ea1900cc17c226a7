"""`workerd run-once`: a handler without a broker."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.programs import WORKERD, Program, Result

Start = Callable[..., Program]

APP = """
import logging, os, time
from workerd import Reject, Retry
def f(job):
    print("printed")
    return {"body": job.body.decode(), "attempt": job.attempt, "headers": job.headers}
def retry(job): raise Retry(delay=5)
def reject(job): raise Reject("no")
def fail(job): raise ValueError("wrong")
def crash(job): os.kill(os.getpid(), 9)
def slow(job):
    print("runs")
    time.sleep(600)
"""

COMMANDS = {
    "three": ["sh", "-c", "exit 3"],
    "killed": ["sh", "-c", "kill -9 $$"],
    "bad": ["sh", "-c", "exit 65"],
    "count": ["wc", "-c"],
}


@pytest.fixture
def once(tmp_path: Path, program: Start) -> Callable[..., Program]:
    (tmp_path / "app.py").write_text(APP)
    lines = ['[log]\nformat = "json"']
    lines += [
        f'[handlers.{name}]\npython = "app:{name}"\nworking_directory = "{tmp_path}"'
        for name in ("f", "retry", "reject", "fail", "crash", "slow", "missing")
    ]
    lines += [f"[handlers.{name}]\ncommand = {json.dumps(c)}" for name, c in COMMANDS.items()]
    lines.append('[handlers.short]\ncommand = ["sleep", "600"]\ntimeout = "100ms"\nmax_body = 10')
    lines.append('[handlers.nowhere]\nstream = ["/no/such/program"]')
    config = tmp_path / "workerd.toml"
    config.write_text("\n".join(lines))

    def start(*words: str, body: bytes = b"") -> Program:
        running = program(*WORKERD, "run-once", "--config", config, *words)
        running.write(body)
        running.close_input()
        return running

    return start


def events(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stderr.splitlines()]


def test_the_result_is_printed_and_the_log_goes_to_stderr(once: Start) -> None:
    words = ("--header", "trace=a=b", "--attempt", "3", "--id", "one", "f")
    result = once(*words, body=b"hello").wait()
    assert result.status == 0
    assert json.loads(result.stdout) == {
        "body": "hello",
        "attempt": 3,
        "headers": {"trace": "a=b"},
    }
    names = [event["event"] for event in events(result)]
    assert names == ["start", "output", "done"]
    assert {event["job_id"] for event in events(result)} == {"one"}


def test_a_command_runs_as_well(once: Start) -> None:
    result = once("count", body=b"12345").wait()
    assert (result.status, result.stdout) == (0, "5\n")


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("retry", 75),
        ("reject", 65),
        ("fail", 1),
        ("crash", 128 + signal.SIGKILL),
        ("missing", 69),
        ("nowhere", 69),
        ("three", 3),
        ("killed", 128 + signal.SIGKILL),
        ("bad", 65),
        ("short", 124),
        ("non", 64),
    ],
)
def test_the_exit_status_says_how_the_job_has_ended(once: Start, name: str, status: int) -> None:
    result = once(name).wait()
    assert (result.status, result.stdout) == (status, "")
    assert result.stderr


def test_a_body_that_the_handler_may_not_have_is_refused(once: Start) -> None:
    result = once("short", body=b"x" * 11).wait()
    assert result.status == 65
    assert events(result)[-1]["reason"] == "too-large"


def test_it_can_be_interrupted(once: Start) -> None:
    running = once("slow")
    while b'"runs"' not in running._output["stderr"]:
        assert running.process.poll() is None
    running.signal(signal.SIGINT)
    assert running.wait().status == 130


@pytest.mark.parametrize("words", [("--attempt", "0"), ("--header", "x")])
def test_wrong_usage_is_told(once: Start, words: tuple[str, str]) -> None:
    result = once(*words, "f").wait()
    assert result.status == 64
    assert words[0] in result.stderr
