"""Handlers that cannot run here and now, for no fault of their jobs'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.waiting import TIMEOUT, until

Start = Callable[..., Daemon]


@pytest.fixture
def program(tmp_path: Path, oracle: Oracle) -> Path:
    """A program that runs the job whose id it is given, and may be made unusable."""
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\nexec {' '.join(oracle.command('$1'))}\n")
    path.chmod(0o755)
    return path


def configuration(broker: Broker, oracle: Oracle, program: Path, concurrency: int = 4) -> str:
    other = ", ".join(f'"{word}"' for word in oracle.command())
    return f'''
        [broker]
        urls = ["{broker.url}"]
        [worker]
        drain_timeout = "1h"
        [queues.default]
        concurrency = {concurrency}
        [handlers.broken]
        command = ["{program}", "{{id}}"]
        retry = {{ attempts = 1 }}
        [handlers.other]
        command = [{other}]
        [log]
        level = "debug"
    '''


def consuming(daemon: Start, text: str) -> Daemon:
    worker = daemon(text)
    worker.wait_event("consuming", queue="default")
    worker.wait_event("consuming", queue="default.due")
    return worker


def test_a_job_whose_program_is_missing_waits_in_the_delays_and_runs_when_it_is_there(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, program: Path
) -> None:
    aside = program.rename(program.with_name("aside"))
    worker = consuming(daemon, configuration(broker, oracle, program))
    client.publish("default", type="broken", message_id="a")
    paused = worker.wait_event("handler paused", job_id="a")
    assert "No such file" in paused["error"]
    worker.wait_event("postponed", job_id="a")
    worker.wait_notify(lambda text: f"handler broken paused: cannot run {program}" in text)
    # It holds no slot, and has spent no attempt.
    client.publish("default", type="other", message_id="b")
    worker.wait_event("done", job_id="b")
    aside.rename(program)
    worker.wait_event("handler resumed", handler="broken")
    assert worker.wait_event("done", job_id="a")["attempt"] == 1
    worker.wait_notify(lambda text: "2 done" in text and "paused" not in text)
    oracle.check(["a", "b"])


def test_a_program_that_is_not_executable_for_a_while_costs_no_job_and_stops_no_other_handler(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, program: Path
) -> None:
    worker = consuming(daemon, configuration(broker, oracle, program))
    broken = [f"broken-{number}" for number in range(1000)]
    other = [f"other-{number}" for number in range(20)]
    program.chmod(0o644)
    client.publish_jobs("default", broken, type="broken")
    for job in other:
        client.publish("default", type="other", message_id=job)
        worker.wait_event("done", job_id=job)
    until(lambda: client.ready("default") == 0, "all of them put off")
    assert len(worker.events("handler paused")) == 1
    assert not worker.events("done", job_type="broken")
    program.chmod(0o755)
    until(
        lambda: len(worker.events("done", job_type="broken")) == len(broken),
        "all of them run",
        timeout=2 * TIMEOUT,
    )
    assert {entry["attempt"] for entry in worker.events("done")} == {1}
    assert client.ready("default.dead") == 0
    oracle.check([*broken, *other])


@pytest.mark.parametrize("line", ["#!/nonexistent/interpreter", "#!/etc/passwd"])
def test_a_program_whose_interpreter_is_missing_is_no_fault_of_the_job(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, program: Path, line: str
) -> None:
    good = program.read_text()
    program.write_text(line + "\n")
    worker = consuming(daemon, configuration(broker, oracle, program))
    client.publish("default", type="broken", message_id="a")
    worker.wait_event("postponed", job_id="a")
    program.write_text(good)
    assert worker.wait_event("done", job_id="a")["attempt"] == 1


def test_a_reload_tries_a_paused_handler_again_at_once(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, program: Path
) -> None:
    aside = program.rename(program.with_name("aside"))
    worker = consuming(daemon, configuration(broker, oracle, program))
    client.publish("default", type="broken", message_id="a")
    worker.wait_event("postponed", job_id="a")
    told = len(worker.notifications)
    aside.rename(program)
    worker.signal(1)
    worker.wait_event("reloaded")
    worker.wait_notify(lambda text: "0 done, 0 failed" in text and "paused" not in text, since=told)
    worker.wait_event("done", job_id="a")


def test_a_job_that_waits_for_its_program_does_not_hold_up_a_stop(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, program: Path
) -> None:
    program.unlink()
    worker = consuming(daemon, configuration(broker, oracle, program))
    client.publish("default", type="broken", message_id="a")
    worker.wait_event("postponed", job_id="a")
    assert worker.stop() == 0
    client.await_ready("default.due", 1)
