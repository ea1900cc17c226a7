"""`workerd status --watch` in a real terminal, and what the daemon answers for it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import call
from tests.harness.control import workerd as command
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.programs import WORKERD, Program
from tests.harness.tables import config
from tests.harness.terminal import Terminal
from tests.harness.waiting import until

StartDaemon = Callable[..., Daemon]
#: A name that the kernel has for the state of a process that was stopped.
STOPPED = "T"


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """A function that starts `status --watch` for the instances of a runtime directory."""
    terminals: list[Terminal] = []

    def start(runtime: Path, *words: str, env: Any = None, **options: Any) -> Terminal:
        environment = {"RUNTIME_DIRECTORY": str(runtime), **(env or {})}
        shown = [*WORKERD, "status", "--watch", *words]
        terminals.append(Terminal(shown, env=environment, **options))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def assert_left_as_it_was(terminal: Terminal) -> None:
    """The program is over, and the terminal is as it was before it."""
    assert terminal.attributes() == terminal.before
    terminal.catch_up()
    assert terminal.output.rindex("\x1b[?25h\x1b[?1049l") > terminal.output.rindex("\x1b[?1049h")
    assert terminal.output.count("\x1b[?1049h") == terminal.output.count("\x1b[?1049l")
    assert terminal.output.rindex("\x1b[?1049l") > terminal.output.rindex("\x1b[H")


def test_a_job_shows_while_it_runs_and_when_it_fails_and_q_leaves_the_terminal_as_it_was(
    broker: Broker,
    client: Client,
    daemon: StartDaemon,
    oracle: Oracle,
    terminal: Callable[..., Terminal],
) -> None:
    workerd = daemon(config(broker.url, oracle.command(status=3)))
    workerd.wait_event("consuming", queue="jobs.due")
    shown = terminal(workerd.runtime)
    shown.wait(lambda text: "nothing runs" in text, "an idle instance")
    assert shown.attributes() != shown.before  # keys come one by one
    oracle.hold("the-job")
    client.publish_jobs("jobs", ["the-job"], type="job")
    text = shown.wait(lambda text: text if "the-job" in text else "", "a running job")
    (line,) = [line.split() for line in text.splitlines() if line.startswith("the-job")]
    assert line[1:4] == ["job", "jobs", "1"]
    assert "1/4" in text
    oracle.release()
    shown.wait(lambda text: "exit-status  dead" in text, "its failure")
    # Counted at the broker.
    shown.wait(lambda text: [line for line in text.splitlines() if is_dead(line)], "its letter")
    shown.type("q")
    assert shown.wait_exit() == 0
    assert_left_as_it_was(shown)


def is_dead(line: str) -> bool:
    return line.split() == ["jobs", "0/4", "0", "0", "0", "1"]


def test_a_daemon_that_stops_dies_hangs_or_comes_back_shows_and_the_others_go_on(
    broker: Broker, daemon: StartDaemon, terminal: Callable[..., Terminal]
) -> None:
    text = config(broker.url, ["true"])
    first, second = daemon(text, "first"), daemon(text, "second")
    for each in (first, second):
        each.wait_ready()
    shown = terminal(first.runtime)

    def is_told(name: str, state: str) -> None:
        def told(screen: str) -> bool:
            return any(line.split()[:2] == [name, state] for line in screen.splitlines())

        shown.wait(told, f"{name} is {state}")

    for name in ("first", "second"):
        is_told(name, "running")
    first.signal(signal.SIGSTOP)
    # It is drawn before the question has been given up.
    shown.wait(lambda text: "no answer for " in text, "a question without an answer")
    is_told("first", "stuck")
    # Frozen as one of them is, the other is as fresh as ever.
    second.stop()
    is_told("second", "stopped")
    daemon(text, "second").wait_ready()
    is_told("second", "running")
    first.signal(signal.SIGCONT)
    is_told("first", "running")
    first.kill()
    is_told("first", "died")
    shown.wait(lambda text: "it was killed, or the host went down" in text, "why")
    shown.type("\x03")
    assert shown.wait_exit() == 0
    assert_left_as_it_was(shown)


def test_it_fills_the_terminal_whatever_its_size_becomes(
    broker: Broker, daemon: StartDaemon, terminal: Callable[..., Terminal]
) -> None:
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_ready()
    shown = terminal(workerd.runtime, env={"COLUMNS": "70", "LINES": "20"})
    for columns, lines in ((80, 24), (120, 40), (50, 18)):
        shown.resize(columns, lines)
        shown.wait(lambda text, n=columns: text.find("\n") == n - 1, "the new size")  # type: ignore[misc]
    shown.type("q")
    assert shown.wait_exit() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_the_terminal_is_as_it_was(
    number: signal.Signals, tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    shown = terminal(tmp_path)
    shown.wait(lambda text: "no instance of workerd" in text, "a screen")
    shown.process.send_signal(number)
    assert shown.wait_exit() == 128 + number
    assert_left_as_it_was(shown)


def test_put_aside_and_taken_up_again(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    shown = terminal(tmp_path)
    shown.wait(lambda text: "no instance of workerd" in text, "a screen")
    stat = Path(f"/proc/{shown.process.pid}/stat")
    shown.process.send_signal(signal.SIGTSTP)
    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == STOPPED, "it is stopped")
    assert_left_as_it_was(shown)
    before = len(shown.output)
    shown.process.send_signal(signal.SIGCONT)
    with_screen = "\x1b[?1049h"
    until(lambda: with_screen in shown.output[before:], "the screen is back")
    shown.type("q")
    assert shown.wait_exit() == 0
    assert_left_as_it_was(shown)


def test_without_rich_it_says_what_to_install(
    tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no rich', name='rich')\n")
    shown = Terminal(
        ["env", f"PYTHONPATH={tmp_path}:{':'.join(sys.path)}", *WORKERD, "status", "--watch"]
    )
    try:
        assert shown.wait_exit() == 69
        assert "apt install python3-rich" in shown.output
        assert shown.attributes() == shown.before
        assert "\x1b[?1049h" not in shown.output
    finally:
        shown.close()


def test_without_a_terminal_it_is_refused(tmp_path: Path) -> None:
    refused = command(tmp_path, "status", "--watch")
    assert (refused.status, refused.stdout) == (64, "")
    assert "--watch needs a terminal; for a program: --watch --json" in refused.stderr


def test_an_instance_that_nobody_knows_is_69(
    tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    shown = terminal(tmp_path, "--instance", "x")
    assert shown.wait_exit() == 69
    assert "instance x does not run on this host" in shown.output
    assert shown.attributes() == shown.before


def test_a_program_gets_a_line_for_each_instance_every_second(
    broker: Broker, daemon: StartDaemon, program: Callable[..., Program]
) -> None:
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("consuming", queue="jobs.due")
    environment = {"RUNTIME_DIRECTORY": str(workerd.runtime)}
    stream = program(*WORKERD, "status", "--watch", "--json", env=environment)
    told = [json.loads(line) for line in stream.wait_lines(5)]
    assert {state["instance"] for state in told} == {"1"}
    times = [state["time"] for state in told]
    assert all(later - earlier > 0.9 for earlier, later in pairwise(times))
    # Nobody counted before somebody looked.
    assert (told[0]["queues"][0]["ready"], told[-1]["queues"][0]["ready"]) == (None, 0)
    workerd.stop()
    until(lambda: b'"stopped"' in stream._output["stdout"], "the end of the instance")


# What the daemon answers


def test_depths_are_counted_for_those_who_want_them_and_missing_queues_do_no_harm(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    queues: dict[str, dict[str, Any]] = {
        "jobs": {"concurrency": 1},
        "absent": {"declare": "wait"},
    }
    workerd = daemon(config(broker.url, oracle.command(), queues=queues))
    workerd.wait_event("consuming", queue="jobs.due")
    oracle.hold("a")
    client.publish_jobs("jobs", ["a", "b", "c"], type="job")
    workerd.wait_event("start", job_id="a")
    client.publish_jobs("jobs.dead", ["x", "y", "z"])

    def depths() -> dict[str, list[int | None]]:
        found = call(workerd, "status", depths=True)["queues"]
        return {q["queue"]: [q[key] for key in ("ready", "due", "dead")] for q in found}

    until(lambda: depths()["jobs"] == [2, 0, 3], "the depths of jobs")
    assert depths()["absent"][0] is None
    assert "ready" not in call(workerd, "status")["queues"][0]
    # The connection that consumes has not suffered.
    assert not workerd.events("disconnected")
    assert not workerd.events("channel closed", queue="jobs")
    oracle.release()
    workerd.wait_event("done", count=3)
    until(lambda: depths()["jobs"] == [0, 0, 3], "they follow")


def test_the_daemon_tells_how_jobs_ended_of_late(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    retry = {"attempts": 2, "delay": "1s", "jitter": False}
    failing = ["sh", "-c", "echo first >&2; echo last words >&2; exit 3"]
    workerd = daemon(config(broker.url, failing, handler={"retry": retry}))
    workerd.wait_event("consuming", queue="jobs.due")
    client.publish_jobs("jobs", ["a"], type="job")
    workerd.wait_event("dead letter", job_id="a")

    def status() -> dict[str, Any]:
        return call(workerd, "status")

    told = until(lambda: told if (told := status())["failed"] else {}, "the last failure")
    first, second = told["failures"]
    assert 0 < first.pop("when") < second.pop("when")
    common = {"id": "a", "type": "job", "queue": "jobs", "reason": "exit-status"}
    assert first == {**common, "error": "last words", "attempt": 1, "last": False}
    assert second == {**common, "error": "last words", "attempt": 2, "last": True}
    assert (told["retried"], told["failed"]) == (1, 1)
    until(lambda: sum(status()["pace"]["failed"]) == 2, "the step is over")
    counted = status()["pace"]
    assert counted["seconds"] == 5.0
    assert len(counted["done"]) == len(counted["failed"])
