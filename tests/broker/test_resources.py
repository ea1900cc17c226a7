"""What the daemon takes of its host: at rest, after thousands of jobs, under a long backlog."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import pika
import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.tables import config
from tests.harness.waiting import SCALE, SEEDS, TIMEOUT, until

Start = Callable[..., Daemon]

MiB = 1 << 20
JOBS = 3_000 if SEEDS <= 2 else 10_000


@contextlib.contextmanager
def published(client: Client, queue: str, count: int, body: bytes = b"") -> Iterator[None]:
    """Publish as fast as the broker takes it; what it has not taken yet may be lost at the end.

    RabbitMQ may lose what nobody has it confirm behind many others, once their channel is closed.
    """
    channel = client.connection.channel()
    for number in range(count):
        properties = pika.BasicProperties(message_id=f"{queue}-{number}", delivery_mode=2)
        channel.basic_publish("", queue, body, properties)
    # Answered when it has come to all of them.
    channel.queue_declare(queue, passive=True)
    yield
    channel.close()


def test_an_idle_daemon_takes_next_to_no_processor_and_little_memory(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = daemon(config(broker.url, ["true"]))
    worker.wait_ready()
    worker.wait_event("consuming", queue="jobs.due")
    before = worker.cpu_seconds()
    # What is measured is a time.
    time.sleep(3)
    assert worker.cpu_seconds() - before < 0.1
    assert worker.rss() < 40 * MiB


@pytest.mark.campaign
def test_thousands_of_jobs_leave_nothing_behind_in_the_daemon(
    broker: Broker, client: Client, daemon: Start
) -> None:
    log = {"level": "info", "format": "json", "jobs": "failures"}
    worker = daemon(config(broker.url, ["/bin/true"], log=log))
    worker.wait_ready()
    client.await_topology()

    def run(count: int) -> tuple[int, int, list[int]]:
        with published(client, "jobs", count, b"small"):
            broker.await_depth("jobs", timeout=10 * TIMEOUT)
        until(lambda: len(worker.children()) == 1, "only the guardian is left")
        return worker.fds(), worker.threads(), worker.children()

    before = run(JOBS // 10)
    memory = worker.rss()
    assert run(JOBS) == before
    # What is remembered of a finished job takes less than 300 bytes.
    assert worker.rss() - memory < 2 * MiB + 300 * JOBS


def test_a_long_backlog_is_worked_off_fairly_in_bounded_memory_and_given_back_at_once(
    broker: Broker, client: Client, daemon: Start
) -> None:
    prefetch = {"single": 1, "few": 4, "many": 200}
    queues = {
        name: {"concurrency": 2, "prefetch": count, "default_handler": "job"}
        for name, count in prefetch.items()
    }
    count, done = 2000, 100
    for name in queues:
        client.declare(
            name,
            x_queue_type="quorum",
            x_delivery_limit=1_000_000,
            x_dead_letter_exchange="",
            x_dead_letter_routing_key=f"{name}.dead",
            x_dead_letter_strategy="at-least-once",
            x_overflow="reject-publish",
        )
        with published(client, name, count, os.urandom(4096)):
            client.await_ready(name, count)
    worker = daemon(config(broker.url, ["true"], queues=queues))
    worker.wait_event("done")
    client.await_topology()
    memory = worker.rss()
    for name in queues:
        worker.wait_event("done", queue=name, count=done, timeout=3 * TIMEOUT)
    ended = {name: len(worker.events("done", queue=name)) for name in queues}
    assert max(ended.values()) < 10 * min(ended.values()), ended
    for name, depth in broker.queues().items():
        assert depth.unacked <= prefetch.get(name, 0)
    # All messages together have 24 MiB.
    assert worker.rss() - memory < 6 * MiB

    stopped = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - stopped < 2 * SCALE
    for name in queues:
        broker.await_depth(name, ready=count - len(worker.events("done", queue=name)))
