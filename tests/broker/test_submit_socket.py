"""`submit` through an instance of the host: the same promises, without a broker of its own."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import call, submit
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.programs import SUBMIT, Program, run
from tests.harness.tables import config
from tests.harness.waiting import SCALE, until

StartDaemon = Callable[..., Daemon]

HANDLERS: dict[str, Any] = {
    "handlers.resize": {"command": ["true"], "queue": "images", "max_body": "1KiB"},
    "queues.images": {"max_length": 1},
}


@pytest.fixture
def workerd(broker: Broker, daemon: StartDaemon) -> Daemon:
    """A daemon that consumes the queue "jobs", and knows of "images"."""
    workerd = daemon(config(broker.url, ["true"], worker={"queues": ["jobs"]}, **HANDLERS))
    workerd.wait_event("consuming", queue="jobs.due")
    return workerd


def test_a_job_goes_through_the_daemon_and_its_submitter_is_known(
    workerd: Daemon, client: Client
) -> None:
    # Without any configuration, and so without any password.
    result = submit(workerd.runtime, "job", "--header", "note=a=b", stdin=b"4\0")
    assert (result.status, result.stderr) == (0, "")
    job_id = result.stdout.strip()
    event = workerd.wait_event("submitted", job_id=job_id)
    assert (event["job_type"], event["queue"], event["uid"]) == ("job", "jobs", 0)
    workerd.wait_event("done", job_id=job_id)

    call(workerd, "pause")
    result = submit(workerd.runtime, "job", "4", "--id", "mine", "--header", "note=a=b", "--json")
    assert json.loads(result.stdout) == {"id": "mine", "queue": "jobs"}
    (message,) = client.take("jobs")
    assert (message.body, message.id) == (b"4", "mine")
    properties = message.properties
    assert (properties.type, properties.delivery_mode) == ("job", 2)
    assert properties.timestamp
    headers = {name: value for name, value in message.headers.items() if name.startswith("x-w")}
    assert headers.pop("x-workerd-copy")
    assert headers == {"x-workerd-submitter": 0}
    assert message.headers["note"] == "a=b"


def test_a_delay_and_a_limit_are_kept(workerd: Daemon) -> None:
    result = submit(workerd.runtime, "job", "--in", "1s", "--ttl", "1h", "--json")
    told = json.loads(result.stdout)
    assert told["due"].endswith("Z")
    workerd.wait_event("done", job_id=told["id"])
    late = submit(workerd.runtime, "job", "--at", "2020-01-01 00:00", "--attempts", "3")
    workerd.wait_event("done", job_id=late.stdout.strip())


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["jb"], 64, "no handler is named 'jb', did you mean \"job\"?"),
        (["job", "x", "--id", ""], 64, "--id must be 1 to 255 bytes"),
        (["job", "x", "--header", "x-workerd-attempt=1"], 64, "only workerd or RabbitMQ may set"),
        (["job", "x", "--header", "novalue"], 64, "expected NAME=VALUE"),
        (["job", "x", "-f", "y"], 64, "BODY and --file exclude each other"),
        (["job", "x", "--at", "soon"], 64, "--at 'soon'"),
        (["job", "x", "--attempts", "1000"], 64, "--attempts must be at most 25"),
        (["resize", "x" * 1025], 65, "larger than 1024 bytes"),
        (["resize", "x"], 73, "no queue 'images'"),
    ],
)
def test_the_exit_statuses_are_the_same(
    workerd: Daemon, arguments: list[str], status: int, error: str
) -> None:
    result = submit(workerd.runtime, *arguments)
    assert (result.status, result.stdout) == (status, ""), result
    assert error in result.stderr


def test_a_full_queue_and_an_alarm_are_75(broker: Broker, workerd: Daemon, client: Client) -> None:
    client.declare("images", x_max_length=1, x_overflow="reject-publish", x_queue_type="quorum")

    def refused() -> str:
        # A quorum queue notices a moment later that it is full.
        result = submit(workerd.runtime, "resize", "x")
        assert result.status in (0, 75), result
        return result.stderr

    assert "the broker refused it: images is full" in until(refused, "the queue is full")
    broker.raise_memory_alarm()
    result = submit(workerd.runtime, "job", "x", "--timeout", f"{SCALE:g}s")
    assert result.status == 75
    assert "the broker takes nothing at present" in result.stderr
    broker.clear_memory_alarm()


def test_without_a_broker_it_waits_and_gives_up_in_time(
    broker: Broker, workerd: Daemon, program: Callable[..., Program]
) -> None:
    broker.stop()
    workerd.wait_event("disconnected")
    result = submit(workerd.runtime, "job", "x", "--timeout", "1s")
    assert result.status == 69
    assert result.seconds < 1 + 5 * SCALE
    words = [*SUBMIT, "job", "x", "--id", "patient", "--timeout", "60s"]
    waiting = program(*words, env={"RUNTIME_DIRECTORY": str(workerd.runtime)})
    broker.start()
    result = waiting.wait()
    assert (result.status, result.stdout) == (0, "patient\n"), result
    workerd.wait_event("done", job_id="patient")


# When it is not for the daemon


def test_what_the_daemon_is_not_to_do_goes_directly(
    broker: Broker, workerd: Daemon, client: Client, tmp_path: Path
) -> None:
    call(workerd, "pause")
    file = tmp_path / "workerd-1.toml"
    other = tmp_path / "other.toml"
    other.write_text(file.read_text())
    address = tmp_path / "address"
    address.write_text(broker.url)
    large = tmp_path / "large"
    large.write_bytes(b"x" * ((4 << 20) + 1))
    client.declare("elsewhere")
    ways: list[list[str | Path]] = [
        ["job", "--config", file, "--direct"],
        ["job", "--config", file, "--url", f"@{address}"],
        # The daemon has not read this one.
        ["job", "--config", other],
        # It knows no such queue.
        ["job", "--config", file, "--queue", "elsewhere"],
        ["job", "--config", file, "--instance", "2"],
        ["resize", "--config", file, "--queue", "elsewhere", "-f", large],
    ]
    for way in ways[:-1]:
        result = submit(workerd.runtime, *way)
        assert result.status == 0, (way, result)
    assert submit(workerd.runtime, *ways[-1]).status == 65
    through_environment = submit(
        workerd.runtime, "job", "--config", file, env={"WORKERD_BROKER_URL": broker.url}
    )
    assert through_environment.status == 0
    assert not workerd.events("submitted")
    assert len(client.take("elsewhere")) == 1
    messages = client.take("jobs", 5)
    assert not any("x-workerd-submitter" in message.headers for message in messages)

    # The same file is the daemon's own.
    assert submit(workerd.runtime, "job", "--config", file, "--id", "own").status == 0
    workerd.wait_event("submitted", job_id="own")


def test_a_large_body_from_a_pipe_goes_directly_and_whole(
    workerd: Daemon, client: Client, tmp_path: Path
) -> None:
    call(workerd, "pause")
    body = bytes(range(256)) * (5 << 12)
    file = tmp_path / "workerd-1.toml"
    sent = submit(workerd.runtime, "any", "--queue", "jobs", "--config", file, stdin=body)
    assert sent.status == 0, sent
    assert client.take("jobs")[0].body == body
    assert not workerd.events("submitted")


def test_while_it_drains_jobs_go_directly(
    broker: Broker, client: Client, daemon: StartDaemon, tmp_path: Path
) -> None:
    workerd = daemon(config(broker.url, ["sleep", "300"]))
    workerd.wait_event("consuming", queue="jobs.due")
    client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")
    workerd.signal(signal.SIGTERM)
    workerd.wait_event("draining")
    file = tmp_path / "workerd-1.toml"
    assert submit(workerd.runtime, "job", "--id", "b", "--config", file).status == 0
    client.await_ready("jobs", 1)
    assert not workerd.events("submitted")
    workerd.signal(signal.SIGTERM)
    assert workerd.wait_exit() == 0


def test_an_instance_that_dies_in_between_costs_no_job_and_doubles_none(
    broker: Broker,
    client: Client,
    daemon: StartDaemon,
    oracle: Oracle,
    program: Callable[..., Program],
    tmp_path: Path,
) -> None:
    text = config(broker.url, oracle.command())
    first = daemon(text)
    first.wait_event("consuming", queue="jobs.due")
    # It has published the job, and cannot say so.
    broker.freeze()
    words = [*SUBMIT, "job", "x", "--id", "once", "--config", tmp_path / "workerd-1.toml"]
    sender = program(*words, env={"RUNTIME_DIRECTORY": str(first.runtime)})
    until(lambda: call(first, "status")["submissions"] == 1, "the daemon has the job")
    first.kill()
    broker.thaw()
    result = sender.wait()
    assert (result.status, result.stdout) == (0, "once\n"), result
    # Whether the frozen broker has got one copy or two: they are one job.
    second = daemon(text)
    second.wait_event("done", job_id="once")
    broker.await_depth("jobs")
    oracle.check(["once"])


def test_a_job_that_came_twice_runs_once(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, tmp_path: Path
) -> None:
    workerd = daemon(config(broker.url, oracle.command()))
    workerd.wait_event("consuming", queue="jobs.due")
    call(workerd, "pause")
    wish = {"type": "job", "id": "once", "mark": "m", "timestamp": 1_700_000_000}
    for _ in range(2):
        assert call(workerd, "submit", b"x", **wish)["ok"]
    # What the broker sent before it knew of the pause goes back.
    client.await_ready("jobs", 2)
    call(workerd, "resume")
    workerd.wait_event("done", job_id="once")
    broker.await_depth("jobs")
    oracle.check(["once"])


def test_it_imports_neither_a_broker_client_nor_an_event_loop(workerd: Daemon) -> None:
    program = [SUBMIT[0], "-X", "importtime", *SUBMIT[1:], "job", "x"]
    result = run(program, env={"RUNTIME_DIRECTORY": str(workerd.runtime)})
    assert result.status == 0, result
    names = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "workerd.control.client" in names
    loaded = names | {name.split(".")[0] for name in names}
    assert not loaded & {"asyncio", "pika", "ssl", "tomli", "dataclasses", "workerd.config.load"}
