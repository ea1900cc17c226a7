"""A job runs for longer than RabbitMQ waits for an acknowledgement."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.config import config
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.peer import Peer
from tests.harness.waiting import SCALE

StartBroker = Callable[..., Broker]
StartDaemon = Callable[..., Daemon]

# Long enough that a delivery sent when another is nearly out of time is not late as well.
ACK_TIMEOUT = 2.0 * SCALE


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A broker that does as RabbitMQ 4.3 does."""
    peer = Peer(ack_timeout=ACK_TIMEOUT)
    yield peer
    peer.close()


def test_a_job_that_outlives_the_ack_timeout_is_rejoined_and_so_are_its_neighbours(
    own_broker: StartBroker, daemon: StartDaemon, oracle: Oracle
) -> None:
    broker = own_broker(consumer_timeout_ms=3000)
    queues = {"jobs": {"concurrency": 2, "prefetch": 4}}
    workerd = daemon(
        config(broker.url, oracle.command(), queues=queues, broker={"ack_timeout": "3s"})
    )
    workerd.wait_ready()
    oracle.hold("a", "b")
    with Client(broker.url) as client:
        jobs = client.publish_jobs("jobs", ["a", "b", "c", "d"])
        workerd.wait_event("start", job_id="b")

        workerd.wait_event("ack timeout near", job_id="a", seconds=lambda age: age < 3)
        told = workerd.wait_event("ack timeout", queue="jobs", level="warning")
        assert "timed out" in told["text"]
        workerd.wait_event("rejoined", job_id="a")
        workerd.wait_event("rejoined", job_id="b")
        # c and d had not started; all four are held again.
        broker.await_depth("jobs", unacked=4)
        oracle.release()
        workerd.wait_event("done", count=4)

    broker.await_depth("jobs")
    oracle.check(jobs)
    assert len(workerd.events("ack timeout near", job_id="a")) == 2
    assert not workerd.events("connected")[1:]
    assert not workerd.events("settled from memory")
