"""Faults at random moments, again and again: `WORKERD_TEST_SEEDS=40 pytest -m campaign -rP`.

Each test draws its moments from its seed and prints what ran how often, and why. Even seeds have a
quorum queue, odd ones a classic one.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import AGAIN, config
from tests.harness.waiting import SEEDS, TIMEOUT, until

Start = Callable[..., Daemon]

JOBS = 16
SLOTS = 4
# Seconds after which RabbitMQ sends on what has come due once more, if the queue that it sent it to
# has not said that it has it: while it starts, that queue may not be there yet.
FORWARDING = 180
# Shorter and longer than it takes to connect again.
SECONDS = [0.2, 0.7]

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.parametrize("seed", range(SEEDS)),
]


DOWN = ["kill", "stop"]


@dataclass
class Work:
    """Sixteen jobs in a queue, and the daemons that have run them so far."""

    broker: Broker
    daemon: Start
    oracle: Oracle
    seed: int
    daemons: list[Daemon] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.kind = "classic" if self.seed % 2 else "quorum"
        self.seconds = self.chance.choice(SECONDS)

    def start(self) -> Daemon:
        """Start a daemon; the first one declares the queues."""
        queue = {"concurrency": SLOTS, "type": self.kind}
        command = self.oracle.command(seconds=self.seconds)
        text = config(self.broker.url, command, queues={"jobs": queue}, handler=AGAIN)
        worker = self.daemon(text)
        # Before that a signal simply ends it, as it ends every program that has not begun.
        worker.wait_event("connected")
        self.daemons.append(worker)
        return worker

    def publish(self, *, named: bool = True) -> list[str]:
        """Publish the jobs once the queue is there; return their ids."""
        self.daemons[0].wait_event("consuming")
        ids = [f"job-{number:02}" for number in range(JOBS)] if named else []
        with Client(self.broker.url) as client:
            client.await_topology()
            client.publish_jobs("jobs", ids)
            for _ in range(0 if named else JOBS):
                client.publish("jobs", b"the same")
        return ids

    def some_time(self) -> None:
        """Until a random moment of the time that the jobs take."""
        time.sleep(self.chance.uniform(0, self.seconds * JOBS / SLOTS))

    def take_down(self, fault: str) -> None:
        if fault == "kill":
            self.broker.kill()
        else:
            self.broker.stop()

    def await_end(self) -> None:
        """Wait until nothing is left in the queue."""
        until(lambda: self._depth() == (0, 0), "all jobs are settled")

    def _depth(self) -> tuple[int, int] | None:
        try:
            depth = self.broker.queues()["jobs"]
        except (AssertionError, KeyError):
            return None  # a queue that recovers cannot be counted
        return depth.ready, depth.unacked

    def ids(self, event: str, daemons: Iterable[Daemon] | None = None) -> list[str]:
        """The ids of the jobs of which some daemons logged this event."""
        chosen = self.daemons if daemons is None else daemons
        return [entry["job_id"] for worker in chosen for entry in worker.events(event)]

    def check_logs(self) -> None:
        for worker in self.daemons:
            assert not worker.events("bug")
            assert not [line for line in worker.output if not line.startswith("{")]


# The broker fails


def hurt(work: Work) -> list[str]:
    """One to three faults; at most one of them takes the broker down, for that takes seconds."""
    faults = [work.chance.choice([*DOWN, "close"])]
    faults += ["close"] * work.chance.randint(0, 2)
    work.chance.shuffle(faults)
    for fault in faults:
        work.some_time()
        if fault == "close":
            work.broker.close_all_connections()
        else:
            work.take_down(fault)
            work.broker.start()
    return faults


def test_named_jobs_run_exactly_once_whatever_happens_to_the_broker(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    work = Work(broker, daemon, oracle, seed)
    worker = work.start()
    ids = work.publish()
    faults = hurt(work)
    work.await_end()
    assert worker.stop() == 0
    work.check_logs()
    report = oracle.check(ids)
    rejoined, settled = len(work.ids("rejoined")), len(work.ids("settled again"))
    print(f"{work.kind} {'+'.join(faults)}: {report}; {rejoined} rejoined, {settled} from memory")
    assert sum(report.starts.values()) == JOBS


def test_equal_jobs_without_ids_are_never_dropped_whatever_happens_to_the_broker(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    work = Work(broker, daemon, oracle, seed)
    worker = work.start()
    work.publish(named=False)
    faults = hurt(work)
    work.await_end()
    assert worker.stop() == 0
    work.check_logs()
    starts = work.ids("start")
    report = oracle.check(starts)
    assert len(report.finished) == len(starts) >= JOBS
    # It cannot be told from its equals, so one that comes back when it is done runs again: one that
    # ended while the broker was away, and one whose ack the broker forgot or did not read.
    unsent = work.ids("verdict kept")
    last = worker.log.index(worker.events("disconnected")[-1])
    sent = {entry["job_id"] for entry in worker.log[:last] if entry["event"] == "done"} - {*unsent}
    extra = len(starts) - JOBS
    print(
        f"{work.kind} {'+'.join(faults)}: {report}; {extra} extra runs: "
        f"{len(unsent)} ended during an outage, {extra - len(unsent)} were acknowledged before one"
    )
    assert len(unsent) <= extra <= len(unsent) + len(sent)
    assert extra <= len(worker.events("start", redelivered=True))


# The daemon ends


def test_named_jobs_run_exactly_once_when_the_daemon_is_stopped_and_started(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    work = Work(broker, daemon, oracle, seed)
    work.start()
    ids = work.publish()
    for _ in range(2):
        work.some_time()
        assert work.daemons[-1].stop() == 0
        work.start()
    work.await_end()
    assert work.daemons[-1].stop() == 0
    work.check_logs()
    report = oracle.check(ids)
    print(f"{work.kind} 2 stops: {report}")
    assert sum(report.starts.values()) == JOBS


def test_only_jobs_that_ran_when_the_daemon_was_killed_run_again(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    work = Work(broker, daemon, oracle, seed)
    work.start()
    ids = work.publish()
    killed = 2
    for _ in range(killed):
        work.some_time()
        work.daemons[-1].kill()
        work.start()
    work.await_end()
    assert work.daemons[-1].stop() == 0
    work.check_logs()
    report = oracle.report(ids)
    assert not report.problems(allowed_duplicates=killed * SLOTS), oracle.journal

    # A job that the killed daemon had seen end runs again only if its ack was still on its way.
    unread = 0
    for number, worker in enumerate(work.daemons[:-1], start=1):
        unread += len({*work.ids("done", [worker])} & {*work.ids("start", work.daemons[number:])})
    extra = sum(report.starts.values()) - JOBS
    print(
        f"{work.kind} {killed} kills: {report}; {extra} extra runs: "
        f"{extra - unread} were running, {unread} with an ack that was not read"
    )
    assert unread <= killed


def test_a_stop_while_the_broker_is_down_loses_no_job(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    work = Work(broker, daemon, oracle, seed)
    worker = work.start()
    ids = work.publish()
    work.some_time()
    fault = work.chance.choice(DOWN)
    work.take_down(fault)
    time.sleep(work.chance.uniform(0, 2 * work.seconds))
    worker.signal(signal.SIGTERM)
    assert worker.wait_exit() == 0
    broker.start()
    last = work.start()
    work.await_end()
    assert last.stop() == 0
    work.check_logs()
    # What ended during the outage and was not settled before the exit is not known any more, nor is
    # what was acknowledged before, which a broker may have forgotten.
    report = oracle.check(ids, allowed_duplicates=len(work.ids("done", [worker])))
    kept = {*work.ids("verdict kept", [worker])} & {*work.ids("start", [last])}
    extra = sum(report.starts.values()) - JOBS
    print(
        f"{work.kind} {fault}: {report}; {extra} extra runs: "
        f"{len(kept)} ended during the outage, {extra - len(kept)} were acknowledged before it"
    )


SIGNALS = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGCONT"]


def test_signals_in_quick_succession_lose_no_job_and_end_in_no_traceback(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    work = Work(broker, daemon, oracle, seed)
    work.start()
    ids = work.publish()
    sent = 0
    for _ in range(5):
        worker = work.daemons[-1]
        time.sleep(work.chance.uniform(0, 2 * work.seconds))
        while worker.running and sent < 10_000:
            worker.signal(getattr(signal, work.chance.choice(SIGNALS)))
            sent += 1
            time.sleep(work.chance.expovariate(1 / 0.0005))
        assert worker.wait_exit() == 0
        work.start()
    work.await_end()
    assert work.daemons[-1].stop() == 0
    work.check_logs()
    interrupted = len(work.ids("interrupted"))
    report = oracle.check(ids, allowed_duplicates=interrupted)
    extra = sum(report.starts.values()) - JOBS
    print(f"{sent} signals: {report}; {extra} extra runs, {interrupted} were interrupted")
    assert sent > 100


# Jobs fail, and the broker as well


def test_jobs_that_fail_run_once_for_each_attempt_whatever_the_broker_does(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    chance = random.Random(seed)
    ids = [f"job-{number:03}-{chance.randrange(4)}" for number in range(60)]
    # The last digit of its id says how often a job fails first.
    record = " ".join(oracle.command("$1"))[: -len(" 0 0")]
    script = f'[ "$WORKERD_ATTEMPT" -gt "${{1##*-}}" ] && s=0 || s=1; exec {record} 0.1 $s'
    queue = {"concurrency": SLOTS, "type": "classic" if seed % 2 else "quorum"}
    policy = {"retry": {"attempts": 5, "delay": "1s", "multiplier": 1.0}}
    command = ["sh", "-c", script.replace("{", "{{").replace("}", "}}"), "sh", "{id}"]
    text = config(broker.url, command, queues={"jobs": queue}, handler=policy)
    workers = [daemon(text, instance) for instance in ("1", "2")]
    for worker in workers:
        worker.wait_event("consuming", queue="jobs.due")
    with Client(broker.url) as client:
        client.publish_jobs("jobs", ids)
    for fault in chance.sample(["kill", "close", "close"], 3):
        time.sleep(chance.uniform(0.2, 2.0))
        if fault == "close":
            broker.close_all_connections()
        else:
            broker.kill()
            broker.start()
    until(lambda: oracle.report(ids).finished == set(ids), "all of them", TIMEOUT + FORWARDING)
    report = oracle.check(ids)
    assert all(report.starts[job] == 1 + int(job[-1]) for job in ids), report.starts
    for worker in workers:
        assert worker.stop() == 0
        assert not worker.events("bug")
    with Client(broker.url) as client:
        left = [client.ready(name) for name in ("jobs", "jobs.due", "jobs.dead")]
    assert left == [0, 0, 0]
