"""What a sender wrote is payload: no message of his makes the daemon publish where he could not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.programs import SUBMIT, run
from tests.harness.tables import config


def test_a_failing_job_with_further_addresses_is_sent_to_none_of_them(
    broker: Broker, client: Client, daemon: Callable[..., Daemon]
) -> None:
    client.channel.queue_declare("payroll", durable=True)
    policy = {"retry": {"attempts": 3, "delay": "1s", "multiplier": 1.0, "jitter": False}}
    worker = daemon(config(broker.url, ["false"], handler=policy))
    worker.wait_event("consuming", queue="jobs.due")
    addresses = {"CC": ["payroll", "other"], "BCC": ["payroll"]}
    client.publish("jobs", type="job", message_id="cc", headers=addresses)
    # The broker has obeyed its publisher, once.
    client.await_ready("payroll", 1)
    worker.wait_event("dead letter")
    assert len(worker.events("start")) == 3
    assert {event["names"] for event in worker.events("headers dropped")} == {"CC"}
    assert worker.stop() == 0
    client.await_ready("jobs.dead", 1)
    client.await_ready("payroll", 1)


def test_submit_refuses_a_header_that_is_an_order(tmp_path: Path) -> None:
    path = tmp_path / "workerd.toml"
    path.write_text(config("amqp://guest@localhost", ["true"]))
    for name in ("CC", "BCC", "x-delay"):
        result = run([*SUBMIT, "--config", path, "--header", f"{name}=payroll", "job", "1"])
        assert (result.status, result.stdout) == (64, "")
        assert f"--header {name}: RabbitMQ would take it for an order" in result.stderr
