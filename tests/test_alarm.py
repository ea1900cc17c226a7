"""RabbitMQ runs out of memory: it stops reading from those who publish, and from nobody else."""

from __future__ import annotations

from collections.abc import Callable

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.config import config
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle

StartDaemon = Callable[..., Daemon]


def test_in_an_alarm_acks_go_on_and_dead_letters_wait_for_its_end(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
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

    broker.raise_memory_alarm()
    oracle.release()
    workerd.wait_event("failed", job_id="bad")
    workerd.wait_notify(lambda text: text.endswith("; publishing blocked: low on memory"))
    # Everything but the one whose letter is still to be confirmed has been acknowledged.
    workerd.wait_event("done", job_id="good")
    broker.await_depth("jobs", unacked=1)
    assert not workerd.events("dead letter")

    broker.clear_memory_alarm()
    workerd.wait_event("dead letter", job_id="bad")
    broker.await_depth("jobs")
    assert [letter.id for letter in client.look("jobs.dead")] == ["bad"]
    oracle.check(jobs, dead=["bad"])
    assert not workerd.events("disconnected")
