"""How often a broker may send one message, and what becomes of one that is worn out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import VERSION
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config
from workerd.core.job import COPY

Start = Callable[..., Daemon]

#: A quorum queue of RabbitMQ 4.0 that was declared without a limit drops at the 21st return.
LIMIT = 20


def wear_out(client: Client, queue: str, times: int) -> None:
    """Take the one message of a queue so often, and give it back."""
    for _ in range(times):
        client.look(queue)
        client.await_ready(queue, 1)


def test_a_message_that_has_come_back_too_often_is_a_dead_letter(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    queues = {"jobs": {"max_deliveries": 3}, "others": {"max_deliveries": 3}}
    text = config(broker.url, oracle.command(), queues=queues)
    before = daemon(text)
    before.wait_event("consuming", queue="jobs.due")
    before.wait_event("consuming", queue="others.due")
    assert before.stop() == 0
    client.publish("jobs", message_id="twice")
    wear_out(client, "jobs", 2)
    client.publish("others", message_id="thrice")
    wear_out(client, "others", 3)
    worker = daemon(text)
    worker.wait_event("done", job_id="twice")
    dead = worker.wait_event("dead letter", job_id="thrice")
    assert dead["reason"] == "max-deliveries"
    [letter] = client.take("others.dead")
    assert letter.headers["x-workerd-attempts"] == 0
    assert "it has come back to its queue 3 times" in letter.headers["x-workerd-error"]
    oracle.check(["twice", "thrice"], dead=["thrice"])


# A quorum queue of others


@pytest.fixture
def theirs(client: Client) -> str:
    """A queue of somebody who knows nothing of delivery limits, and of no dead letters."""
    return client.declare("jobs", x_queue_type="quorum")


def drain_with_it_in_hand(daemon: Start, text: str, client: Client) -> Daemon:
    worker = daemon(text)
    worker.wait_event("start", job_id="a")
    client.await_ready("jobs", 0)
    assert worker.stop() == 0
    client.await_ready("jobs", 1)
    return worker


def test_a_queue_of_others_drops_no_job_that_was_given_back_again_and_again(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, theirs: str
) -> None:
    oracle.hold("a")
    text = config(broker.url, oracle.command(), worker={"drain_timeout": "0s"})
    client.publish(theirs, message_id="a")
    for _ in range(LIMIT + 5):
        drain_with_it_in_hand(daemon, text, client)
    oracle.release()
    worker = daemon(text)
    assert worker.wait_event("done", job_id="a")["attempt"] == 1


def test_a_job_that_wears_out_in_a_queue_of_others_is_published_anew(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, theirs: str
) -> None:
    oracle.hold("a")
    queues = {"jobs": {"concurrency": 1, "prefetch": 2}}
    text = config(broker.url, oracle.command(), queues=queues, worker={"drain_timeout": "0s"})
    client.publish(theirs, message_id="a")
    client.publish(theirs, message_id="waits")
    for _ in range(12):
        client.look(theirs)
        client.await_ready(theirs, 2)
    worker = daemon(text)
    worker.wait_event("start")
    client.await_ready(theirs, 0)
    assert worker.stop() == 0
    client.await_ready(theirs, 2)
    copied = [COPY in message.headers for message in client.look(theirs)]
    # No other version drops it, so that none copies it.
    assert copied == [VERSION.startswith("4.0")] * 2
    oracle.release()
    worker = daemon(text)
    for job in ("a", "waits"):
        assert worker.wait_event("done", job_id=job)["attempt"] == 1
