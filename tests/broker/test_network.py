"""The network between daemon and broker breaks, in every way a cable or a resolver can."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.network import BROKER_ADDRESS, Network
from tests.harness.oracle import Oracle
from tests.harness.processes import MissingTool
from tests.harness.tables import config
from tests.harness.waiting import TIMEOUT, until
from tests.harness.wire import Wire

StartBroker = Callable[..., Broker]
StartDaemon = Callable[..., Daemon]

# With a heartbeat of 1 s, pika finds a silent peer after 6 to 12 s.
HEARTBEAT = {"heartbeat": "1s"}
FOUND_WITHIN = 12 + TIMEOUT / 4
# What a connect may take; told to the operator when it took longer.
CONNECT_TIMEOUT = 10.0


@pytest.fixture
def distant(network: Network, own_broker: StartBroker) -> Broker:
    """A broker at the other end of the network."""
    return own_broker(address=BROKER_ADDRESS, netns=network.broker_ns)


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """The hosts file of a daemon that is started as `with_names` says."""
    if os.geteuid() != 0:
        raise MissingTool("a hosts file of one's own needs root")
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1 localhost\n")
    return path


def with_names(names: Path, nameserver: str) -> list[str | Path]:
    """The daemon's command, for a world with these host names and this nameserver."""
    resolver = names.with_name("resolv.conf")
    # As patient as the C library can be.
    resolver.write_text(f"nameserver {nameserver}\noptions timeout:30 attempts:5\n")
    script = 'mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf'
    inside: list[str | Path] = ["unshare", "--mount", "--propagation", "private"]
    inside += ["sh", "-c", f'{script} && shift 2 && exec "$@"', "sh"]
    inside += [names, resolver, sys.executable, "-m", "workerd", "run"]
    return [*inside, "--config", names.with_name("workerd-1.toml")]


def test_a_reset_connection_is_replaced_and_its_jobs_are_rejoined(
    network: Network, distant: Broker, daemon: StartDaemon, oracle: Oracle
) -> None:
    settings = config(distant.url, oracle.command(), broker=HEARTBEAT)
    workerd = daemon(settings, netns=network.daemon_ns)
    workerd.wait_ready()
    oracle.hold("a")
    with Client(distant.url, netns=network.broker_ns) as client:
        jobs = client.publish_jobs("jobs", ["a"])
        workerd.wait_event("start")

        # By something on the way, which answers the next heartbeat.
        network.reset()
        assert "reset" in workerd.wait_event("disconnected")["text"].lower()
        network.heal()
        workerd.wait_event("rejoined")

        # By this host's own kernel: one to consume, one to publish.
        until(lambda: network.connections() == 2, "both connections")
        assert network.kill_sockets() == 2
        workerd.wait_event("disconnected", count=2)
        workerd.wait_event("rejoined", count=2)

    oracle.release()
    workerd.wait_event("done")
    distant.await_depth("jobs")
    oracle.check(jobs)


def test_a_connection_into_a_black_hole_is_found_and_its_jobs_are_rejoined(
    network: Network, distant: Broker, daemon: StartDaemon, oracle: Oracle
) -> None:
    settings = config(distant.url, oracle.command(), broker=HEARTBEAT)
    workerd = daemon(settings, netns=network.daemon_ns)
    workerd.wait_ready()
    oracle.hold("a")
    with Client(distant.url, netns=network.broker_ns) as client:
        jobs = client.publish_jobs("jobs", ["a"])
        workerd.wait_event("start")
        # Nothing is on its way: heartbeats, and a look at idle queues, have to tell.
        workerd.wait_event("consuming", queue="jobs.due")

        network.drop()
        workerd.wait_event("disconnected", timeout=FOUND_WITHIN)
        network.heal()
        workerd.wait_event("rejoined")

    oracle.release()
    workerd.wait_event("done")
    distant.await_depth("jobs")
    oracle.check(jobs)


def test_a_job_whose_ack_is_lost_on_the_way_is_settled_from_memory(
    network: Network, distant: Broker, daemon: StartDaemon, oracle: Oracle
) -> None:
    settings = config(distant.url, oracle.command(), broker=HEARTBEAT)
    workerd = daemon(settings, netns=network.daemon_ns)
    workerd.wait_ready()
    oracle.hold("a", "b")
    with Client(distant.url, netns=network.broker_ns) as client:
        jobs = client.publish_jobs("jobs", ["a", "b"])
        workerd.wait_event("start", count=2)

        network.drop("to_broker")
        oracle.release()
        workerd.wait_event("done", count=2)
        workerd.wait_event("disconnected", timeout=FOUND_WITHIN)
        # The acks were sent, as far as the daemon could know.
        assert not workerd.events("verdict kept")
        network.heal()
        workerd.wait_event("settled from memory", count=2)

    distant.await_depth("jobs")
    oracle.check(jobs)


def test_a_host_name_that_does_not_resolve_is_looked_up_again_until_it_does(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, names: Path
) -> None:
    jobs = client.publish_jobs(client.declare("jobs", x_queue_type="classic"), ["a"])
    url = broker.url.replace("127.0.0.1", "rabbit.test")
    # Nobody listens there, so that an answer that there is none comes at once.
    workerd = daemon(config(url, oracle.command()), command=with_names(names, "127.0.0.1"))
    missing = workerd.wait_event("unreachable", count=2)
    assert missing["text"].startswith("host name: ")

    names.write_text("127.0.0.1 localhost rabbit.test\n")
    workerd.wait_event("done")
    oracle.check(jobs)


def test_a_resolver_that_hangs_blocks_neither_the_loop_nor_a_stop(
    network: Network, daemon: StartDaemon, names: Path
) -> None:
    # Not a packet back, not even the refusal.
    network.drop("to_daemon")
    workerd = daemon(
        config("amqp://rabbit.test", ["true"], worker={"ready_wait": "500ms"}),
        command=with_names(names, BROKER_ADDRESS),
        netns=network.daemon_ns,
        env={"WATCHDOG_USEC": "600000"},
    )
    workerd.wait_ready()
    began = time.monotonic()
    workerd.wait_event("unreachable", timeout=CONNECT_TIMEOUT + TIMEOUT / 4)
    beats = [at for at, text in workerd.notifications if text == "WATCHDOG=1" and at > began]
    assert max(b - a for a, b in itertools.pairwise(beats)) < TIMEOUT / 10
    assert len(beats) > 10

    # In the middle of the next look-up: besides the main thread, the log's, and the two that the
    # first look-ups of both connections hang in for minutes.
    until(lambda: workerd.threads() > 4, "another look-up")
    stopped = time.monotonic()
    workerd.signal(signal.SIGTERM)
    assert workerd.wait_exit() == 0
    assert time.monotonic() - stopped < TIMEOUT / 4


def test_a_slow_network_that_loses_packets_is_no_outage(
    network: Network, distant: Broker, daemon: StartDaemon, oracle: Oracle
) -> None:
    settings = config(distant.url, oracle.command(), broker={"heartbeat": "10s"})
    workerd = daemon(settings, netns=network.daemon_ns)
    # The declarations take a round trip each, and there are many.
    workerd.wait_event("consuming", queue="jobs.due")
    workerd.wait_ready()
    with Client(distant.url, netns=network.broker_ns) as client:
        # Two seconds for the jobs alone.
        network.impair(loss=0.1, rate="256kbit")
        jobs = client.publish_jobs("jobs", map(str, range(40)), os.urandom(1500))
        workerd.wait_event("done", count=len(jobs), timeout=3 * TIMEOUT)
        distant.await_depth("jobs")
        assert workerd.stop() == 0
    oracle.check(jobs)
    assert not workerd.events("disconnected")
    assert not workerd.events("close timed out")


def test_a_broker_that_is_far_away_is_no_outage(
    broker: Broker, client: Client, wire: Wire, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(wire.url, oracle.command(), broker=HEARTBEAT))
    workerd.wait_event("consuming", queue="jobs.due")
    workerd.wait_ready()
    wire.delay = 1.0
    jobs = client.publish_jobs("jobs", ["a", "b"])
    workerd.wait_event("done", count=2)
    broker.await_depth("jobs")
    assert not workerd.events("disconnected")
    # Cancel and channel close are answered late, and waited for.
    assert workerd.stop() == 0
    oracle.check(jobs)
    for trouble in ("cancel failed", "close failed", "close timed out"):
        assert not workerd.events(trouble)


def test_a_broker_that_moved_is_found_at_its_new_address(
    network: Network, own_broker: StartBroker, daemon: StartDaemon, oracle: Oracle, names: Path
) -> None:
    distant = own_broker(address="0.0.0.0", netns=network.broker_ns)
    names.write_text(f"{BROKER_ADDRESS} rabbit.test\n")
    url = distant.url.replace("0.0.0.0", "rabbit.test")
    workerd = daemon(
        config(url, oracle.command(), broker=HEARTBEAT),
        command=with_names(names, "127.0.0.1"),
        netns=network.daemon_ns,
    )
    workerd.wait_ready()
    oracle.hold("a")
    with Client(distant.url, netns=network.broker_ns) as client:
        jobs = client.publish_jobs("jobs", ["a"])
        workerd.wait_event("start")

        network.move_broker("192.168.213.3")
        network.kill_sockets()
        workerd.wait_event("disconnected")
        names.write_text("192.168.213.3 rabbit.test\n")
        workerd.wait_event("rejoined")

    oracle.release()
    workerd.wait_event("done")
    distant.await_depth("jobs")
    oracle.check(jobs)
