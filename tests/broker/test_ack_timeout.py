"""A job runs for longer than RabbitMQ waits for an acknowledgement."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.peer import Peer, Settled
from tests.harness.tables import config
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
    # Once more, if it takes as long to come to its end on the new channel.
    warned = workerd.log[: workerd.log.index(told)]
    assert len([e for e in warned if e["event"] == "ack timeout near" and e["job_id"] == "a"]) == 2
    assert not workerd.events("connected")[1:]
    assert not workerd.events("settled from memory")


def test_the_ack_timeout_that_the_broker_tells_is_the_one_that_is_warned_of(
    own_broker: StartBroker, daemon: StartDaemon, oracle: Oracle
) -> None:
    broker = own_broker(consumer_timeout_ms=3000)
    workerd = daemon(config(broker.url, oracle.command()))
    workerd.wait_ready()
    oracle.hold("a")
    with Client(broker.url) as client:
        jobs = client.publish_jobs("jobs", ["a"])
        workerd.wait_event("ack timeout", queue="jobs")
    workerd.wait_event("rejoined")
    # Half an hour by the configuration.
    assert workerd.wait_event("ack timeout near", job_id="a")["ack_timeout"] == 3
    oracle.release()
    workerd.wait_event("done")
    oracle.check(jobs)


def test_after_a_cancel_for_one_late_job_each_is_settled_where_it_may_be(
    peer: Peer, daemon: StartDaemon, oracle: Oracle
) -> None:
    queues = {"jobs": {"concurrency": 2, "prefetch": 4}}
    settings = {"ack_timeout": f"{ACK_TIMEOUT}s"}
    workerd = daemon(config(peer.url, oracle.command(), queues=queues, broker=settings))
    workerd.wait_ready()
    oracle.hold("late", "young")
    jobs = peer.publish("jobs", "late")
    workerd.wait_event("ack timeout near", job_id="late", count=2)
    jobs += peer.publish("jobs", "young", "unstarted")
    workerd.wait_event("start", job_id="young")
    old = peer.channel_of("young")

    workerd.wait_event("consumer cancelled", queue="jobs")
    workerd.wait_event("rejoined", job_id="late")
    new = peer.channel_of("late")
    oracle.release("young")
    # Nothing is left to settle on the old channel.
    peer.until(lambda: old in peer.closed, "the old channel closed")
    oracle.release("late")
    workerd.wait_event("done", count=3)
    peer.until(lambda: len(peer.settled) == 4, "everything settled")

    assert new != old
    assert sorted(peer.settled, key=lambda settled: settled.id) == [
        Settled("ack", new, "late", timed_out=False),
        Settled("nack", old, "unstarted", timed_out=False),
        Settled("ack", new, "unstarted", timed_out=False),
        Settled("ack", old, "young", timed_out=False),
    ]
    assert peer.errors == []
    assert peer.accepted == 2
    oracle.check(jobs)


def test_a_late_job_that_ends_before_it_comes_again_is_settled_on_the_new_channel(
    peer: Peer, daemon: StartDaemon, oracle: Oracle
) -> None:
    settings = {"ack_timeout": f"{ACK_TIMEOUT}s"}
    workerd = daemon(config(peer.url, oracle.command(), broker=settings))
    workerd.wait_ready()
    oracle.hold("late")
    jobs = peer.publish("jobs", "late")
    workerd.wait_event("start")
    old = peer.channel_of("late")

    peer.pause()
    workerd.wait_event("consumer cancelled", queue="jobs")
    # It was the only one, so the channel serves nobody any more.
    peer.until(lambda: old in peer.closed, "the old channel closed")
    oracle.release()
    workerd.wait_event("verdict kept")
    peer.resume()
    workerd.wait_event("settled from memory")

    (settled,) = peer.until(lambda: peer.settled, "it is settled")
    assert settled.channel != old
    assert not settled.timed_out
    assert peer.errors == []
    oracle.check(jobs)
