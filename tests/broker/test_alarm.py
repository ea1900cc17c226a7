"""RabbitMQ runs out of memory or disk: it stops reading from those who publish, and only them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config
from tests.harness.waiting import SCALE

StartDaemon = Callable[..., Daemon]

of_either = pytest.mark.parametrize("resource", ["memory", "disk"])


def raise_alarm(broker: Broker, resource: str) -> None:
    broker.raise_memory_alarm() if resource == "memory" else broker.raise_disk_alarm()


def clear_alarm(broker: Broker, resource: str) -> None:
    broker.clear_memory_alarm() if resource == "memory" else broker.clear_disk_alarm()


@of_either
def test_in_an_alarm_acks_go_on_and_dead_letters_wait_for_its_end(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, resource: str
) -> None:
    # The body is the status with which a job ends.
    command = [*oracle.command()[:-1], "{body}"]
    queues = {"jobs": {"concurrency": 2, "prefetch": 4}}
    workerd = daemon(config(broker.url, command, queues=queues))
    workerd.wait_ready()
    oracle.hold("good", "bad")
    jobs = client.publish_jobs("jobs", ["good", "next", "last"], b"0")
    jobs += client.publish_jobs("jobs", ["bad"], b"1")
    workerd.wait_event("done", job_id="last")
    workerd.wait_event("start", job_id="bad")

    raise_alarm(broker, resource)
    oracle.release()
    workerd.wait_event("failed", job_id="bad")
    workerd.wait_notify(lambda text: text.endswith(f"; publishing blocked: low on {resource}"))
    # Everything but the one whose letter is still to be confirmed has been acknowledged.
    workerd.wait_event("done", job_id="good")
    broker.await_depth("jobs", unacked=1)
    assert not workerd.events("dead letter")

    clear_alarm(broker, resource)
    workerd.wait_event("dead letter", job_id="bad")
    broker.await_depth("jobs")
    assert [letter.id for letter in client.look("jobs.dead")] == ["bad"]
    oracle.check(jobs, dead=["bad"])
    assert not workerd.events("disconnected")


def test_an_alarm_in_a_stream_of_dead_letters_loses_and_doubles_none(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(broker.url, oracle.command(status=1)))
    workerd.wait_ready()
    jobs = client.publish_jobs("jobs", map(str, range(60)))
    for letters in (5, 20, 35):
        workerd.wait_event("dead letter", count=letters)
        broker.raise_memory_alarm()
        # Of those that run, each waits with its letter.
        broker.clear_memory_alarm()
    workerd.wait_event("dead letter", count=len(jobs))

    broker.await_depth("jobs")
    assert sorted(letter.id or "" for letter in client.look("jobs.dead")) == sorted(jobs)
    oracle.check(jobs, dead=jobs)
    assert not workerd.events("disconnected")


@of_either
def test_a_stop_in_an_alarm_is_bounded_and_what_waits_with_its_letter_goes_back(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, resource: str
) -> None:
    command = [*oracle.command()[:-1], "{body}"]
    queues = {"jobs": {"concurrency": 2, "prefetch": 4}}
    drain = f"{SCALE:g}s"
    settings = config(broker.url, command, queues=queues, worker={"drain_timeout": drain})
    workerd = daemon(settings)
    workerd.wait_ready()
    oracle.hold("good", "bad")
    jobs = client.publish_jobs("jobs", ["bad"], b"1")
    jobs += client.publish_jobs("jobs", ["good", "next", "last"], b"0")
    workerd.wait_event("start", count=2)

    raise_alarm(broker, resource)
    oracle.release("bad")
    workerd.wait_event("failed", job_id="bad")
    workerd.wait_notify(lambda text: text.endswith(f"; publishing blocked: low on {resource}"))
    began = time.monotonic()
    workerd.signal(signal.SIGTERM)
    workerd.wait_event("draining")
    oracle.release("good")
    assert workerd.wait_exit() == 0
    # The drain, and two seconds for a connection that the broker does not read.
    assert time.monotonic() - began < SCALE + 2 + 2 * SCALE
    assert workerd.events("done", job_id="good")
    assert workerd.events("drained", unfinished=0)
    assert not workerd.events("close timed out")
    broker.await_depth("jobs", ready=3)

    clear_alarm(broker, resource)
    later = daemon(settings)
    later.wait_event("dead letter", job_id="bad")
    broker.await_depth("jobs")
    # The first daemon's letter may have been on its way: then there are two.
    assert {letter.id for letter in client.look("jobs.dead")} == {"bad"}
    oracle.check(jobs, dead=["bad"])
