"""Messages that are equal in everything, id included, as cron may send them: each is run.

The first has been finished, and its verdict may have been lost with its channel, so it is
remembered.
The second goes back unfinished in one way or another, and comes again flagged as redelivered.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.broker.test_host import close_connections, state_of
from tests.harness import processes
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import AGAIN, config
from tests.harness.waiting import TIMEOUT, until
from workerd.core.job import COPY

StartDaemon = Callable[..., Daemon]


@pytest.fixture
def text(broker: Broker, oracle: Oracle) -> str:
    queue = {"concurrency": 1, "prefetch": 2}
    return config(broker.url, oracle.command(), queues={"jobs": queue}, handler=AGAIN)


@pytest.fixture
def one(broker: Broker, client: Client, daemon: StartDaemon, text: str) -> Daemon:
    """Instance 1, which has finished the job `cron`, and lost its connections since."""
    one = daemon(text, "1")
    one.wait_event("consuming")
    client.publish_jobs("jobs", ["cron"])
    one.wait_event("done", job_id="cron")
    broker.await_depth("jobs")
    close_connections(broker, "1")
    one.wait_event("consuming", queue="jobs", count=2)
    return one


def test_one_that_another_instance_gave_back_in_a_drain_is_run(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, one: Daemon, text: str
) -> None:
    oracle.hold("x", "y", "z")
    client.publish_jobs("jobs", ["x", "y"])
    one.wait_event("start", job_id="x")
    until(lambda: state_of(one)["waiting"] == 1, "y waits at 1")
    two = daemon(text, "2")
    two.wait_event("consuming")
    client.publish_jobs("jobs", ["z", "cron"])
    two.wait_event("start", job_id="z")
    until(lambda: state_of(two)["waiting"] == 1, "cron waits at 2")
    oracle.release("x", "y")
    one.wait_event("done", job_id="y")

    two.signal(signal.SIGTERM)
    one.wait_event("done", job_id="cron", count=2)
    oracle.release("z")
    assert two.wait_exit() == 0
    broker.await_depth("jobs")
    assert oracle.report(["cron"]).starts["cron"] == 2


def test_one_that_was_cut_off_with_another_instance_is_run(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, one: Daemon, text: str
) -> None:
    oracle.hold("x", "y", "cron")
    client.publish_jobs("jobs", ["x", "y"])
    one.wait_event("start", job_id="x")
    until(lambda: state_of(one)["waiting"] == 1, "y waits at 1")
    two = daemon(text, "2")
    two.wait_event("consuming")
    client.publish_jobs("jobs", ["cron"])
    two.wait_event("start", job_id="cron")
    until(lambda: oracle.journal.count("start cron") == 2, "cron runs at 2")
    run = int(oracle.journal.rpartition("start cron ")[2].split()[0])

    two.kill()
    # Let go before that, it could still come to its end.
    assert processes.has_ended(run, within=TIMEOUT)
    oracle.release()
    broker.await_depth("jobs")
    assert oracle.journal.count("finish cron") == 2


def test_one_that_waited_when_its_daemon_was_killed_is_run(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, one: Daemon, text: str
) -> None:
    oracle.hold("x")
    client.publish_jobs("jobs", ["x", "cron"])
    one.wait_event("start", job_id="x")
    until(lambda: state_of(one)["waiting"] == 1, "cron waits")

    one.kill()
    oracle.release()
    daemon(text, "1")
    broker.await_depth("jobs")
    assert oracle.journal.count("finish cron") == 2


def test_one_that_waited_when_another_instance_was_killed_is_run(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, text: str
) -> None:
    two = daemon(text, "2")
    two.wait_event("consuming")
    client.publish_jobs("jobs", ["cron"])
    two.wait_event("done", job_id="cron")
    broker.await_depth("jobs")
    two.kill()  # so its acknowledgement may be lost
    oracle.hold("x")
    one = daemon(text, "1")
    one.wait_event("consuming")
    client.publish_jobs("jobs", ["x", "cron"])
    one.wait_event("start", job_id="x")
    until(lambda: state_of(one)["waiting"] == 1, "cron waits at 1")
    two = daemon(text, "2")
    two.wait_event("consuming")

    one.kill()
    oracle.release()
    broker.await_depth("jobs")
    assert oracle.journal.count("finish cron") == 2


def test_a_copy_that_was_published_twice_and_waits_at_two_instances_is_run_once(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, text: str
) -> None:
    oracle.hold("x", "y")
    for name in ("1", "2"):
        daemon(text, name).wait_event("consuming", queue="jobs")
    # The broker gives to each consumer in turn.
    client.publish_jobs("jobs", ["x", "y"])
    until(lambda: oracle.journal.count("start ") == 2, "both instances are busy")
    client.publish_jobs("jobs", ["copy", "copy"], headers={COPY: "mark"})

    oracle.release()
    broker.await_depth("jobs")
    assert oracle.journal.count("start copy") == 1
