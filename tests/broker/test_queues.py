"""Queues that are missing, deleted, locked, forbidden, or not as configured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika
import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config

StartDaemon = Callable[..., Daemon]

TWO_QUEUES: dict[str, dict[str, Any]] = {"jobs": {}, "others": {}}


def warnings(daemon: Daemon) -> list[str]:
    return [entry["event"] for entry in daemon.events(level="warning")]


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_deleted_queue_is_consumed_again_once_it_is_back(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, queue_type: str
) -> None:
    queues = {"jobs": {"type": queue_type}, "others": {}}
    workerd = daemon(config(broker.url, oracle.command(), queues=queues))
    workerd.wait_event("consuming", queue="jobs")
    workerd.wait_event("consuming", queue="others")
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start", job_id="a")

    client.channel.queue_delete("jobs")
    workerd.wait_event("consumer cancelled", queue="jobs")
    workerd.wait_event("queue paused", queue="jobs")
    workerd.wait_notify(
        lambda text: (
            text.startswith("STATUS=consuming others: 1/4 running, ")
            and text.endswith("; jobs paused: waiting for it to be declared")
        )
    )
    # What runs goes on, and so does the other queue.
    jobs += client.publish_jobs("others", ["b"])
    workerd.wait_event("done", job_id="b")
    oracle.release()
    workerd.wait_event("done", job_id="a")
    assert not client.exists("jobs")

    client.declare("jobs")
    workerd.wait_event("consuming", queue="jobs", count=2)
    jobs += client.publish_jobs("jobs", ["c"])
    workerd.wait_event("done", job_id="c")

    broker.await_depth("jobs")
    oracle.check(jobs)
    assert warnings(workerd) == ["consumer cancelled", "queue paused"]
    assert not workerd.events("connected")[1:]


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_queue_that_exists_otherwise_is_used_as_it_is(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, queue_type: str
) -> None:
    # Of another type than configured, or only without the dead-letter arguments.
    client.declare("jobs", x_queue_type=queue_type)
    workerd = daemon(config(broker.url, oracle.command()))
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done", job_id="a")
    # Another connection finds the same, and has nothing new to say.
    broker.close_all_connections()
    workerd.wait_event("consuming", queue="jobs", count=2)
    with Client(broker.url) as later:
        jobs += later.publish_jobs("jobs", ["b"])
    workerd.wait_event("done", job_id="b")

    broker.await_depth("jobs")
    oracle.check(jobs)
    (warning,) = workerd.events("declare failed")
    assert warning["level"] == "warning"
    assert "inequivalent arg 'x-" in warning["text"]
    assert "for queue 'jobs'" in warning["text"]
    assert len(workerd.events("consuming", queue="jobs")) == 2


def test_a_queue_with_an_exclusive_consumer_is_consumed_once_that_has_left(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    client.declare("jobs", x_queue_type="classic")
    tag = client.channel.basic_consume("jobs", lambda *_: None, exclusive=True)
    workerd = daemon(config(broker.url, oracle.command(), queues=TWO_QUEUES))
    paused = workerd.wait_event("queue paused", queue="jobs")
    assert "exclusive" in paused["text"]
    workerd.wait_notify(lambda text: f"; jobs paused: {paused['text']}" in text)

    client.channel.basic_cancel(tag)
    workerd.wait_event("consuming", queue="jobs")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done")
    oracle.check(jobs)


def test_a_queue_that_another_connection_owns_is_made_once_that_has_gone(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    with Client(broker.url) as owner:
        owner.channel.queue_declare("jobs", exclusive=True)
        workerd = daemon(config(broker.url, oracle.command(), queues=TWO_QUEUES))
        paused = workerd.wait_event("queue paused", queue="jobs")
        assert "RESOURCE_LOCKED" in paused["text"]
        workerd.wait_notify(lambda text: f"; jobs paused: {paused['text']}" in text)
    workerd.wait_event("consuming", queue="jobs")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done")
    oracle.check(jobs)


def test_a_queue_to_wait_for_is_not_made_and_holds_up_nothing(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    queues = {"jobs": {"declare": "wait"}, "others": {}}
    workerd = daemon(config(broker.url, oracle.command(), queues=queues))
    workerd.wait_ready()
    workerd.wait_event("queue paused", queue="jobs")
    workerd.wait_notify(lambda text: text.endswith("; jobs paused: waiting for it to be declared"))
    jobs = client.publish_jobs("others", ["a"])
    workerd.wait_event("done", job_id="a")
    assert not client.exists("jobs")

    client.declare("jobs")
    workerd.wait_event("consuming", queue="jobs")
    jobs += client.publish_jobs("jobs", ["b"])
    workerd.wait_event("done", job_id="b")
    oracle.check(jobs)
    assert warnings(workerd) == ["queue paused"]


def test_a_plain_queue_is_the_one_that_the_tutorial_declares(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    queues = {"first": {"declare": "plain"}, "task_queue": {"declare": "plain"}}
    client.channel.queue_declare("first", durable=True)
    workerd = daemon(config(broker.url, oracle.command(), queues=queues))
    for queue in queues:
        workerd.wait_event("consuming", queue=queue)
        # As new_task.py does: 406 if workerd's own declare said anything else.
        client.channel.queue_declare(queue, durable=True)
        client.channel.basic_publish(
            "", queue, queue.encode(), pika.BasicProperties(delivery_mode=2, message_id=queue)
        )
    workerd.wait_event("done", count=2)
    oracle.check(queues)
    assert warnings(workerd) == []
