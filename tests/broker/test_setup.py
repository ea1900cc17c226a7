"""`workerd setup`: an administrator declares everything, and workers need no right to configure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.tables import config
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import TIMEOUT
from workerd.check.broker import check_broker
from workerd.config.load import load

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def setup(tmp_path: Path) -> Run:
    """Run `workerd setup` for a configuration; it must exit with this status."""

    def run(text: str, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "setup.toml"
        file.touch(0o600)
        file.write_text(text)
        pika = os.environ.get("WORKERD_TEST_PIKA")
        result = subprocess.run(
            [sys.executable, "-m", "workerd", "setup", "--config", file, *words],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [pika, str(CHECKOUT)])),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT * 2,
            check=False,
        )
        assert result.returncode == status, result
        return result

    return run


def user(broker: Broker, configure: str, write: str = ".*", read: str = ".*") -> str:
    """The URL of a new user with these rights in the virtual host of the test."""
    name = f"user-of-{broker.vhost}"
    rights = ", ".join(f'<<"{right}">>' for right in (configure, write, read))
    broker.eval(
        f'rabbit_auth_backend_internal:add_user(<<"{name}">>, <<"secret">>, <<"tests">>), '
        "rabbit_auth_backend_internal:set_permissions("
        f'<<"{name}">>, <<"{broker.vhost}">>, {rights}, <<"tests">>)'
    )
    return broker.url.replace("guest:guest", f"{name}:secret")


def test_after_setup_a_worker_needs_no_right_to_configure(
    broker: Broker, client: Client, daemon: Callable[..., Daemon], setup: Run, tmp_path: Path
) -> None:
    url = user(broker, configure="^$")
    worker = config(url, ["false"])
    admin = tmp_path / "admin"
    admin.write_text(broker.url + "\n")
    told = setup(worker, "--url", f"@{admin}").stdout
    assert told.splitlines() == [
        "delay levels: 53 declared, 51 bound",
        "dead letters of jobs: 1 declared",
        "queue jobs: 1 declared",
        "due jobs of jobs: 1 declared, 1 bound",
    ]
    assert check_broker(load(tmp_path / "setup.toml", environ={})) == []
    # In the environment, for a file with a password is read by nobody else.
    running = daemon(config(broker.url, ["false"]), env={"WORKERD_BROKER_URL": url})
    running.wait_event("consuming", queue="jobs")
    client.publish("jobs", message_id="a")
    client.await_ready("jobs.dead", 1)


def test_what_was_there_and_what_differs_is_told(
    broker: Broker, client: Client, setup: Run
) -> None:
    client.declare("jobs", x_queue_type="classic")
    text = config(broker.url, ["true"])
    first = setup(text).stdout
    assert "queue jobs: differs: queue jobs: PRECONDITION_FAILED - inequivalent arg" in first
    second = setup(text).stdout.splitlines()
    assert second[:2] == ["delay levels: 53 there, 51 bound", "dead letters of jobs: 1 there"]
    states = [json.loads(line) for line in setup(text, "--json").stdout.splitlines()]
    assert {"differs"} == {each["state"] for each in states if each["object"] == "queue jobs"}


def test_a_queue_that_is_waited_for_is_not_declared(
    broker: Broker, client: Client, setup: Run
) -> None:
    setup(config(broker.url, ["true"], queues={"jobs": {"declare": "wait"}}))
    assert not client.exists("jobs")
    assert client.exists("jobs.dead")


def test_a_refused_binding_is_told_and_the_rest_is_declared(
    broker: Broker, client: Client, setup: Run
) -> None:
    url = user(broker, configure=".*", write="^(?!jobs.due$)")
    refused = setup(config(url, ["true"]), status=77).stdout
    assert "due jobs of jobs: failed: binding of queue jobs.due to workerd.due: ACCESS" in refused
    assert client.exists("jobs.due")


def test_no_broker_is_told(setup: Run) -> None:
    setup(config("amqp://guest@127.0.0.1:1", ["true"]), status=69)
