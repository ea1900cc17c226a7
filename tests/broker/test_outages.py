"""The broker goes away and comes back: what runs goes on, and nothing is run twice for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pika.spec
import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.peer import Peer
from tests.harness.tables import config
from tests.harness.waiting import TIMEOUT, until
from tests.harness.wire import Wire

StartDaemon = Callable[..., Daemon]

CLASSIC = {"jobs": {"type": "classic"}}
QUORUM = {"jobs": {"type": "quorum"}}
both_types = pytest.mark.parametrize("queues", [CLASSIC, QUORUM], ids=["classic", "quorum"])

# With a heartbeat of 1 s, pika finds a silent peer after 6 to 12 s.
HEARTBEAT = "1s"
FOUND_WITHIN = 12 + TIMEOUT / 4


@pytest.fixture
def nobody() -> Iterator[str]:
    """The URL of a port of this machine that refuses connections."""
    with socket.socket() as taken:
        # Bound, so that nobody else gets it, but not listening.
        taken.bind(("127.0.0.1", 0))
        yield f"amqp://127.0.0.1:{taken.getsockname()[1]}"


def kill(broker: Broker, workerd: Daemon) -> None:
    """Kill the broker, but not in the middle of a declaration: RabbitMQ would lose that queue."""
    workerd.wait_event("consuming", queue="jobs.due")
    broker.kill()
    workerd.wait_event("disconnected")


def warnings(daemon: Daemon) -> list[str]:
    return [entry["event"] for entry in daemon.events(level="warning")]


@both_types
def test_a_job_that_runs_while_the_broker_is_killed_is_rejoined_and_settled_once(
    broker: Broker,
    client: Client,
    daemon: StartDaemon,
    oracle: Oracle,
    queues: dict[str, dict[str, str]],
) -> None:
    workerd = daemon(config(broker.url, oracle.command(), queues=queues))
    workerd.wait_ready()
    oracle.hold("a", "b")
    jobs = client.publish_jobs("jobs", ["a", "b"])
    workerd.wait_event("start", count=2)

    kill(broker, workerd)
    broker.start()
    workerd.wait_event("rejoined", count=2)
    oracle.release()
    workerd.wait_event("done", count=2)

    broker.await_depth("jobs")
    oracle.check(jobs)
    assert not workerd.events("settled from memory")
    # A second ack of one delivery would have closed the channel.
    assert warnings(workerd) == ["disconnected"]


@both_types
def test_a_job_that_ends_while_the_broker_is_away_is_settled_from_memory(
    broker: Broker,
    client: Client,
    daemon: StartDaemon,
    oracle: Oracle,
    queues: dict[str, dict[str, str]],
) -> None:
    workerd = daemon(config(broker.url, oracle.command(), queues=queues))
    workerd.wait_ready()
    oracle.hold("a", "b")
    jobs = client.publish_jobs("jobs", ["a", "b"])
    workerd.wait_event("start", count=2)

    kill(broker, workerd)
    oracle.release()
    workerd.wait_event("verdict kept", count=2)
    broker.start()
    workerd.wait_event("settled from memory", count=2)

    broker.await_depth("jobs")
    oracle.check(jobs)


def test_a_job_that_fails_while_the_broker_is_away_leaves_one_dead_letter(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(broker.url, oracle.command(status=1)))
    workerd.wait_ready()
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")

    kill(broker, workerd)
    oracle.release()
    workerd.wait_event("failed")
    broker.start()
    workerd.wait_event("dead letter")

    broker.await_depth("jobs")
    with Client(broker.url) as later:
        letters = later.look("jobs.dead")
    assert [letter.id for letter in letters] == jobs
    oracle.check(jobs, dead=jobs)


def test_the_status_line_tells_of_an_outage_and_of_its_end(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(broker.url, oracle.command()))
    workerd.wait_ready()
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")

    broker.stop()
    assert "shutdown" in workerd.wait_event("disconnected", level="warning")["text"]
    workerd.wait_notify(
        lambda text: (
            text.startswith("STATUS=reconnecting to 127.0.0.1 in ")
            and text.endswith(": connection refused; 1 running")
        )
    )
    broker.start()
    oracle.release()
    workerd.wait_notify("STATUS=consuming jobs: 0/4 running, 1 done, 0 failed; 127.0.0.1")

    broker.await_depth("jobs")
    oracle.check(jobs)
    assert warnings(workerd) == ["disconnected"]


def test_connections_closed_by_an_administrator_disturb_no_job(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    queues = {"jobs": {"concurrency": 2, "prefetch": 4}}
    workerd = daemon(config(broker.url, oracle.command(), queues=queues))
    workerd.wait_ready()
    workerd.wait_event("consuming", queue="jobs.due")
    # Besides our own one to consume and one to publish.
    until(lambda: broker.connections() == 3, "all connections")
    descriptors = workerd.fds()
    oracle.hold("a", "b")
    jobs = client.publish_jobs("jobs", ["a", "b", "c", "d"])
    workerd.wait_event("start", count=2)

    for closings in (1, 2, 3):
        broker.close_all_connections("maintenance tonight")
        workerd.wait_event("rejoined", count=2 * closings)
    oracle.release()
    workerd.wait_event("done", count=4)

    broker.await_depth("jobs")
    oracle.check(jobs)
    until(lambda: workerd.fds() <= descriptors, "no descriptor left open")
    assert warnings(workerd) == ["disconnected"] * 3
    assert "maintenance tonight" in workerd.events("disconnected")[0]["text"]


def test_without_a_broker_it_is_ready_waits_longer_each_time_and_warns_once(
    nobody: str, daemon: StartDaemon
) -> None:
    settings = {"reconnect_max": "800ms"}
    workerd = daemon(config(nobody, ["true"], broker=settings, worker={"ready_wait": "500ms"}))
    workerd.wait_ready()
    descriptors = workerd.fds()
    assert workerd.wait_event("unreachable", count=6)["level"] == "debug"
    # Each of two connections may be in the middle of an attempt.
    assert workerd.fds() <= descriptors + 4

    tried = [entry["retry_in"] for entry in workerd.events("unreachable")]
    # Each pause is drawn from the upper half of its step, and told to a tenth of a second.
    for pause, step in zip(tried, [0.2, 0.25, 0.31, 0.39, 0.49, 0.61], strict=False):
        assert step / 2 - 0.05 <= pause <= step + 0.05, tried
    workerd.wait_notify(
        lambda text: (
            text.startswith("STATUS=waiting for broker 127.0.0.1 in ")
            and text.endswith("s: connection refused")
        )
    )
    assert warnings(workerd) == ["unreachable"]


def test_a_dead_broker_among_several_is_passed_over(
    broker: Broker, nobody: str, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config([nobody, broker.url], oracle.command()))
    workerd.wait_ready()
    jobs = client.publish_jobs("jobs", ["a", "b"])
    workerd.wait_event("done", count=2)
    oracle.check(jobs)
    assert warnings(workerd) == []


def test_several_brokers_are_tried_in_random_order(broker: Broker, daemon: StartDaemon) -> None:
    urls = [broker.url, broker.url.replace("127.0.0.1", "localhost")]
    workerd = daemon(config(urls, ["true"], broker={"reconnect_max": "50ms"}))
    used = set()
    # That 40 draws agree is as likely as a meteorite.
    for connections in range(1, 41):
        used.add(workerd.wait_event("connected", count=connections)["broker"])
        if len(used) == 2:
            break
        broker.close_all_connections()
    assert used == {"127.0.0.1", "localhost"}


def test_a_broker_that_freezes_is_found_by_the_heartbeat_and_rejoined_when_it_thaws(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(broker.url, oracle.command(), broker={"heartbeat": HEARTBEAT}))
    workerd.wait_ready()
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")
    # Nothing is being asked, so only the heartbeat can tell.
    workerd.wait_event("consuming", queue="jobs.due")

    broker.freeze()
    lost = workerd.wait_event("disconnected", timeout=FOUND_WITHIN)
    assert lost["text"] == "no heartbeat from the broker"
    broker.thaw()
    workerd.wait_event("rejoined")
    oracle.release()
    workerd.wait_event("done")

    broker.await_depth("jobs")
    oracle.check(jobs)


def test_a_broker_that_is_frozen_at_the_start_is_given_up_and_found_when_it_thaws(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    jobs = client.publish_jobs(client.declare("jobs", x_queue_type="classic"), ["a"])
    broker.freeze()
    workerd = daemon(config(broker.url, oracle.command(), worker={"ready_wait": "500ms"}))
    workerd.wait_ready()
    lost = workerd.wait_event("unreachable", timeout=10 + TIMEOUT / 4)
    assert lost["text"] == "no AMQP answer within 10 s"
    broker.thaw()
    workerd.wait_event("done")

    broker.await_depth("jobs")
    oracle.check(jobs)


def test_a_stop_does_not_wait_for_a_peer_that_never_answers(daemon: StartDaemon) -> None:
    peer = Peer(silent=True)
    workerd = daemon(config(peer.url, ["true"]))
    # Both connections are being opened.
    peer.until(lambda: peer.accepted >= 2, "two connections")
    began = time.monotonic()
    assert workerd.stop() == 0
    assert time.monotonic() - began < TIMEOUT / 4
    peer.close()


@pytest.mark.parametrize("unanswered", [pika.spec.Queue.Declare, pika.spec.Channel.Close])
def test_a_broker_that_stops_answering_but_keeps_the_connection_is_given_up(
    daemon: StartDaemon, oracle: Oracle, unanswered: Any
) -> None:
    peer = Peer(mute=(unanswered,))
    workerd = daemon(config(peer.url, oracle.command(), worker={"ready_wait": "500ms"}))
    workerd.wait_ready()
    lost = workerd.wait_event("disconnected", timeout=15 + TIMEOUT / 4)
    assert lost["text"] == "connection lost: no answer within 15 s"
    peer.mute = ()
    jobs = peer.publish("jobs", "a")
    workerd.wait_event("done")
    oracle.check(jobs)
    peer.close()


def test_an_outage_since_the_boot_is_sat_out_quietly_with_bounded_pauses(
    broker: Broker, client: Client, wire: Wire, daemon: StartDaemon, oracle: Oracle
) -> None:
    jobs = client.publish_jobs(client.declare("jobs", x_queue_type="classic"), ["a"])
    wire.cut()
    longest = 0.3
    settings = {"reconnect_max": f"{longest * 1000:.0f}ms"}
    workerd = daemon(
        config(wire.url, oracle.command(), broker=settings, worker={"ready_wait": "500ms"})
    )
    workerd.wait_ready()
    workerd.wait_event("unreachable", count=20)
    # At the limit, and told to a tenth of a second.
    pauses = [entry["retry_in"] for entry in workerd.events("unreachable")][5:]
    assert min(pauses) >= longest / 2 - 0.05
    assert max(pauses) <= longest + 0.05
    # What an operator sees of an hour is what he sees of a second.
    told = [entry["event"] for entry in workerd.log if entry["level"] != "debug"]
    assert sorted(told) == ["ready", "starting", "unreachable"]

    wire.mend()
    workerd.wait_event("done")
    broker.await_depth("jobs")
    oracle.check(jobs)
