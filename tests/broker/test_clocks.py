"""Wall clocks that jump, by an hour, there and back: what is awaited takes as long as it did."""

from __future__ import annotations

import datetime
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import VERSION
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.clock import Clock
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config, gated
from tests.harness.tables import config as tables
from tests.harness.waiting import SCALE
from tests.harness.wire import Wire

StartDaemon = Callable[..., Daemon]

HOUR = 3600


either_way = pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "back"])


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    """The wall clock of a daemon that is started as it says."""
    return Clock(tmp_path)


@either_way
def test_a_jump_of_the_wall_clock_makes_no_pause_longer_and_no_job_older(
    broker: Broker,
    client: Client,
    wire: Wire,
    daemon: StartDaemon,
    oracle: Oracle,
    clock: Clock,
    tmp_path: Path,
    jump: int,
) -> None:
    command = clock.daemon(tmp_path / "workerd-1.toml")
    workerd = daemon(config(wire.url, oracle.command()), command=command)
    workerd.wait_event("consuming", queue="jobs.due")
    oracle.hold("a")
    began = time.monotonic()
    jobs = client.publish_jobs("jobs", ["a"])
    before = workerd.wait_event("start")

    # In the middle of a pause, too.
    wire.cut()
    workerd.wait_event("unreachable")
    clock.jump(jump)
    wire.mend()
    rejoined = workerd.wait_event("rejoined")
    # The daemon has seen it.
    assert abs(seconds_between(before, rejoined) - jump) < HOUR / 2
    oracle.release()
    done = workerd.wait_event("done")
    assert 0 <= done["duration_ms"] / 1000 < time.monotonic() - began
    broker.await_depth("jobs")
    oracle.check(jobs)
    assert not workerd.events("ack timeout near")

    # What is finished is still known, to this daemon and to the next.
    clock.jump(0)
    workerd.kill()
    later = daemon(config(wire.url, oracle.command()), command=command)
    jobs += client.publish_jobs("jobs", ["b"])
    later.wait_event("done", job_id="b")
    oracle.check(jobs)


@either_way
def test_a_timeout_takes_as_long_as_it_should_whatever_the_wall_clock_does(
    broker: Broker, client: Client, daemon: StartDaemon, clock: Clock, tmp_path: Path, jump: int
) -> None:
    workerd = daemon(
        tables(broker.url, gated(tmp_path / "gate", ["true"]), handler={"timeout": "500ms"}),
        command=clock.daemon(tmp_path / "workerd-1.toml"),
    )
    workerd.wait_ready()
    client.publish("jobs", message_id="late")
    workerd.wait_event("start")
    clock.jump(jump)
    late = workerd.wait_event("failed")
    assert late["reason"] == "timeout"
    assert 400 < late["duration_ms"] < 500 + 10_000 * SCALE


@either_way
def test_a_drain_takes_as_long_as_it_should_whatever_the_wall_clock_does(
    broker: Broker, client: Client, daemon: StartDaemon, clock: Clock, tmp_path: Path, jump: int
) -> None:
    workerd = daemon(
        tables(broker.url, gated(tmp_path / "gate", ["true"]), worker={"drain_timeout": "500ms"}),
        command=clock.daemon(tmp_path / "workerd-1.toml"),
    )
    workerd.wait_ready()
    client.publish("jobs", message_id="late")
    workerd.wait_event("start")
    began = time.monotonic()
    workerd.signal(signal.SIGTERM)
    workerd.wait_event("draining")
    clock.jump(jump)
    assert workerd.wait_exit() == 0
    assert 0.5 < time.monotonic() - began < 3 + 2 * SCALE
    assert workerd.events("interrupted", job_id="late")
    client.await_ready("jobs", 1)


def test_a_jump_of_the_brokers_clock_runs_no_job_twice(
    own_broker: Callable[..., Broker], daemon: StartDaemon, oracle: Oracle
) -> None:
    broker = own_broker(consumer_timeout_ms=600_000, own_clock=True)
    assert broker.clock
    workerd = daemon(config(broker.url, oracle.command()))
    workerd.wait_event("consuming", queue="jobs.due")
    oracle.hold("a", "b")
    with Client(broker.url) as client:
        jobs = client.publish_jobs("jobs", ["a", "b"])
        workerd.wait_event("start", count=2)
        for jump in (HOUR, 0):
            broker.clock.jump(jump)
            if VERSION == "3.10" and jump:
                # It takes the hour for the age of the deliveries. Later ones do not.
                workerd.wait_event("ack timeout")
                workerd.wait_event("rejoined", count=2)
            jobs += client.publish_jobs("jobs", [f"at-{jump}"])
            workerd.wait_event("done", job_id=f"at-{jump}")
    oracle.release()
    workerd.wait_event("done", count=4)
    broker.await_depth("jobs")
    oracle.check(jobs)


def seconds_between(first: dict[str, str], second: dict[str, str]) -> float:
    """By the wall clock of the log."""
    instants = [datetime.datetime.fromisoformat(entry["time"]) for entry in (first, second)]
    return (instants[1] - instants[0]).total_seconds()
