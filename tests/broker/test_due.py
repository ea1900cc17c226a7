"""Delayed jobs come due on time, whatever else waits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import SCALE, SEEDS, TIMEOUT, until
from workerd.core.topology import delayed

Start = Callable[..., Daemon]

#: How late a job may start, in seconds: 1.5 on a machine that has nothing else to do.
LATENESS = 1.5 * SCALE


def delay(client: Client, job: str, seconds: int, queue: str = "jobs") -> None:
    exchange, key = delayed(queue, seconds)
    client.publish(key, exchange=exchange, message_id=job)


def started_at(oracle: Oracle) -> dict[str, float]:
    """When each job started first, in seconds since the boot."""
    found: dict[str, float] = {}
    for line in oracle.journal.splitlines():
        word, job, _pid, when = line.split()[:4]
        if word == "start":
            found.setdefault(job, float(when))
    return found


def boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def consuming(daemon: Start, text: str, *queues: str) -> Daemon:
    worker = daemon(text)
    for queue in queues or ("jobs",):
        worker.wait_event("consuming", queue=queue)
        worker.wait_event("consuming", queue=f"{queue}.due")
    return worker


def test_a_delayed_job_starts_when_it_is_due_and_not_before(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    worker = consuming(daemon, config(broker.url, oracle.command()))
    sent = boot_time()
    delay(client, "a", 2)
    delay(client, "b", 1)
    worker.wait_event("done", job_id="a")
    lateness = [started_at(oracle)[job] - sent - due for job, due in (("a", 2), ("b", 1))]
    assert all(-0.1 < late < LATENESS for late in lateness), lateness
    assert worker.events("start", job_id="a")[0]["queue"] == "jobs"


def test_as_many_due_jobs_run_at_once_as_others(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = config(broker.url, oracle.command(), queues={"jobs": {"concurrency": 3}})
    worker = consuming(daemon, text)
    oracle.hold("a", "b", "c")
    for job in ("a", "b", "c"):
        delay(client, job, 0)
        worker.wait_event("start", job_id=job)
    # They share the slots of their queue.
    client.publish("jobs", message_id="d")
    oracle.release("b")
    worker.wait_event("start", job_id="d")
    assert len(worker.events("done", job_id="b")) == 1


def test_a_backlog_does_not_hold_up_a_job_that_is_due(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    # Much of it is here already, and would take longer than a job may be late.
    queues = {"jobs": {"concurrency": 2, "prefetch": 200}}
    text = config(broker.url, oracle.command(seconds=0.05), queues=queues)
    consuming(daemon, text).stop()
    backlog = [f"backlog-{number}" for number in range(300)]
    client.publish_jobs("jobs", backlog)
    worker = consuming(daemon, text)
    sent = boot_time()
    delay(client, "due", 1)
    worker.wait_event("done", job_id="due")
    assert 0.9 < started_at(oracle)["due"] - sent < 1 + LATENESS
    assert len(worker.events("done")) < len(backlog)


def test_a_long_delay_does_not_hold_up_a_short_one(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    worker = consuming(daemon, config(broker.url, oracle.command()))
    delay(client, "in two hours", 7200)
    delay(client, "soon", 1)
    worker.wait_event("done", job_id="soon")
    assert not worker.events("start", job_id="in two hours")


def test_jobs_that_came_due_while_nobody_was_there_run_at_once(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = config(broker.url, oracle.command())
    consuming(daemon, text).stop()
    delay(client, "a", 1)
    client.await_ready("jobs.due", 1)
    daemon(text).wait_event("done", job_id="a")


def test_a_due_queue_that_is_deleted_is_waited_for_and_its_work_queue_goes_on(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    worker = consuming(daemon, config(broker.url, oracle.command()))
    client.channel.queue_delete("jobs.due")
    worker.wait_event("consumer cancelled", queue="jobs.due")
    worker.wait_event("queue paused", queue="jobs.due")
    worker.wait_notify(lambda text: "jobs.due paused: waiting for it to be declared" in text)
    client.publish("jobs", message_id="a")
    worker.wait_event("done", job_id="a")


def test_a_missing_permission_to_read_due_jobs_pauses_those_alone(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    broker.add_user("worker", read="^(jobs|workerd.*)$")
    url = broker.url.replace("guest:guest", "worker:worker")
    worker = daemon(config(broker.url, oracle.command()), env={"WORKERD_BROKER_URL": url})
    paused = worker.wait_event("queue paused", queue="jobs.due")
    assert "ACCESS_REFUSED" in paused["text"]
    client.publish("jobs", message_id="a")
    worker.wait_event("done", job_id="a")


# Many, and a broker that is restarted meanwhile


def spread(seed: int, jobs: int, longest: int) -> dict[str, int]:
    chance = random.Random(seed)
    return {f"job-{number}": chance.randint(1, longest) for number in range(jobs)}


def submit_lines(broker: Broker, number: int) -> None:
    """Put so many jobs into the queue, quickly."""
    subprocess.run(
        [sys.executable, "-m", "workerd", "submit", "job", "--queue", "jobs", "--lines"],
        input="\n" * number,
        env={**os.environ, "WORKERD_BROKER_URL": broker.url, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.DEVNULL,
        text=True,
        check=True,
    )


def assert_on_time(
    oracle: Oracle, due: dict[str, int], sent: dict[str, float], back: float = 0.0
) -> None:
    """Each job started when it was due, or when the broker was back."""
    started = started_at(oracle)
    late = {job: started[job] - max(sent[job] + due[job], back) for job in due}
    worst = max(late, key=lambda job: late[job])
    assert late[worst] < LATENESS, (worst, late[worst], due[worst])
    early = min(started[job] - sent[job] - due[job] for job in due)
    assert early > -0.1, early


@pytest.mark.campaign
@pytest.mark.timeout(60 + TIMEOUT * 3)
@pytest.mark.parametrize("seed", range(max(1, SEEDS // 20)))
def test_many_jobs_are_on_time_behind_a_backlog_and_across_a_restart_of_the_broker(
    own_broker: Callable[..., Broker], daemon: Start, oracle: Oracle, seed: int
) -> None:
    jobs, longest, backlog = (1000, 60, 100_000) if SEEDS > 2 else (250, 15, 25_000)
    broker = own_broker()
    text = config(broker.url, oracle.command(), queues={"jobs": {"concurrency": 4}})
    consuming(daemon, text).stop()
    submit_lines(broker, backlog)
    worker = consuming(daemon, text)
    due = spread(seed, jobs, longest)
    sent: dict[str, float] = {}
    with Client(broker.url) as client:
        delay(client, "in two hours", 7200)
        for job, seconds in due.items():
            delay(client, job, seconds)
            sent[job] = boot_time()
    mark = worker.mark()
    broker.kill()
    broker.start()
    worker.wait_event("consuming", queue="jobs.due", since=mark)
    back = boot_time()
    until(
        lambda: oracle.journal.count("finish job-") >= len(due),
        "all of them",
        timeout=longest + TIMEOUT,
    )
    with Client(broker.url) as client:
        assert client.ready("jobs"), "there was no backlog"
    assert worker.stop() == 0
    assert not oracle.report(due).duplicates
    assert_on_time(oracle, due, sent, back)
