"""SIGHUP: what changes at once, what a running job keeps, and what a bad configuration does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.peer import Peer
from tests.harness.tables import config
from tests.harness.waiting import until
from tests.harness.wire import Wire

Start = Callable[..., Daemon]

# Requests within so many seconds are one reload.
PAUSE = 0.1


class Subject:
    """An instance whose configuration is changed while it runs."""

    def __init__(self, daemon: Start, folder: Path, broker: Broker, oracle: Oracle) -> None:
        self._folder = folder
        self._url = broker.url
        self._command = oracle.command()
        self._start = daemon
        self.worker: Daemon

    def start(self, **tables: Any) -> Daemon:
        self.worker = self._start(self._text(tables))
        self.worker.wait_ready()
        self.worker.wait_event("consuming")
        return self.worker

    def reload(self, **tables: Any) -> str:
        """Reload with this; returns what changed, according to the log."""
        mark = self.worker.mark()
        self.write(self._text(tables))
        self.worker.signal(signal.SIGHUP)
        changes: str = self.worker.wait_event("reloaded", since=mark)["changes"]
        return changes

    def write(self, text: str) -> None:
        """Replace the configuration; nobody can read half of it."""
        new = self._folder / "new.toml"
        new.write_text(text)
        new.rename(self._folder / "workerd-1.toml")

    def reloads(self) -> int:
        """How many reloads have ended, well or not."""
        return sum(text == "READY=1" for _, text in self.worker.notifications) - 1

    def state(self, queue: str = "jobs") -> dict[str, Any]:
        mark = self.worker.mark()
        self.worker.signal(signal.SIGUSR1)
        return self.worker.wait_event("state queue", since=mark, queue=queue)

    def await_state(self, **counts: int) -> None:
        until(lambda: counts.items() <= self.state().items(), f"{counts}")

    def _text(self, tables: dict[str, Any]) -> str:
        tables = dict(tables)
        return config(tables.pop("url", self._url), tables.pop("command", self._command), **tables)


@pytest.fixture
def subject(daemon: Start, tmp_path: Path, broker: Broker, oracle: Oracle) -> Subject:
    return Subject(daemon, tmp_path, broker, oracle)


def jobs(**settings: Any) -> dict[str, dict[str, Any]]:
    return {"jobs": settings}


# What is changed


def test_more_and_fewer_jobs_at_once(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject
) -> None:
    worker = subject.start(queues=jobs(concurrency=1, prefetch=6))
    oracle.hold("a", "b", "c", "d", "e")
    ids = client.publish_jobs("jobs", ["a", "b", "c", "d", "e"])
    subject.await_state(running=1, waiting=4)

    assert subject.reload(queues=jobs(concurrency=3, prefetch=6)) == "queues.jobs"
    worker.wait_event("start", job_id="c")
    subject.await_state(running=3, waiting=2)

    subject.reload(queues=jobs(concurrency=1, prefetch=6))
    oracle.release("a", "b")
    worker.wait_event("done", count=2)
    # What runs goes on, but nothing takes the place of what ends.
    subject.await_state(running=1, waiting=2)
    oracle.release("c")
    worker.wait_event("start", job_id="d")
    subject.await_state(running=1, waiting=1)
    oracle.release()
    broker.await_depth("jobs")
    assert set(oracle.check(ids).starts.values()) == {1}
    # The consumer was left alone.
    assert len(worker.events("consuming", queue="jobs")) == 1


def test_another_prefetch_holds_more_messages_and_gives_none_back(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject
) -> None:
    worker = subject.start(queues=jobs(concurrency=1, prefetch=1))
    names = [f"job-{number}" for number in range(6)]
    oracle.hold(names[0])
    client.publish_jobs("jobs", names)
    worker.wait_event("start")
    broker.await_depth("jobs", ready=5, unacked=1)
    subject.reload(queues=jobs(concurrency=1, prefetch=3))
    # The running job's channel consumes no more.
    broker.await_depth("jobs", ready=2, unacked=4)
    oracle.release()
    broker.await_depth("jobs")
    assert set(oracle.check(names).starts.values()) == {1}


def test_an_added_queue_is_declared_and_consumed_with_its_dead_letters(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject
) -> None:
    worker = subject.start()
    assert subject.reload(queues={"jobs": {}, "more": {}}) == "worker, +queues.more"
    worker.wait_event("consuming", queue="more")
    ids = client.publish_jobs("more", ["a"])
    worker.wait_event("done", job_id="a")
    broker.await_depth("more")
    until(lambda: {"more.dead", "more.due"} <= broker.queues().keys(), "what belongs to it")
    oracle.check(ids)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_removed_queue_keeps_its_running_job_and_gets_the_others_back(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject, kind: str
) -> None:
    old = {"type": kind, "concurrency": 1, "prefetch": 3}
    worker = subject.start(queues={"jobs": {}, "old": old})
    worker.wait_event("consuming", queue="old")
    oracle.hold("a")
    client.publish_jobs("old", ["a", "b", "c", "d"])
    worker.wait_event("start", job_id="a")
    broker.await_depth("old", ready=1, unacked=3)
    assert subject.reload() == "worker, -queues.old"
    broker.await_depth("old", ready=3, unacked=1)
    oracle.release()
    worker.wait_event("done", job_id="a")
    broker.await_depth("old", ready=3)
    # The other queue has not noticed.
    client.publish_jobs("jobs", ["z"])
    worker.wait_event("done", job_id="z")
    until(lambda: broker.queues()["old"].consumers == 0, "nobody consumes it")
    # Taken up again, it goes on where it was.
    subject.reload(queues={"jobs": {}, "old": old})
    broker.await_depth("old")
    assert set(oracle.check(["a", "b", "c", "d", "z"]).starts.values()) == {1}


def test_a_message_that_arrives_from_a_queue_just_removed_goes_back(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject, wire: Wire
) -> None:
    queues: dict[str, dict[str, Any]] = {"jobs": {}, "old": {"prefetch": 3}}
    worker = subject.start(url=wire.url, queues=queues)
    worker.wait_event("consuming", queue="old")
    client.await_topology()
    oracle.hold("a")
    client.publish_jobs("old", ["a"])
    worker.wait_event("start", job_id="a")
    wire.hold("to_daemon")
    client.publish_jobs("old", ["late"])
    broker.await_depth("old", unacked=2)
    subject.reload(url=wire.url)
    wire.release()
    broker.await_depth("old", ready=1, unacked=1)
    oracle.release()
    worker.wait_event("done", job_id="a")
    broker.await_depth("old", ready=1)
    assert len(worker.events("start")) == 1
    assert worker.stop() == 0
    assert not worker.events(level="error")


def test_a_running_job_keeps_its_command_and_the_next_has_the_new_one(
    client: Client, broker: Broker, oracle: Oracle, subject: Subject
) -> None:
    worker = subject.start()
    oracle.hold("a")
    client.publish_jobs("jobs", ["a"])
    until(lambda: "start a" in oracle.journal, "a job is running")
    assert subject.reload(command=oracle.command("new-{id}")) == "handlers.job"
    client.publish_jobs("jobs", ["b"])
    worker.wait_event("done", job_id="b")
    oracle.release()
    worker.wait_event("done", job_id="a")
    broker.await_depth("jobs")
    oracle.check(["a", "new-b"])


def test_the_log_has_the_new_level_and_format(
    client: Client, broker: Broker, subject: Subject
) -> None:
    worker = subject.start(log={"level": "info", "format": "json"})
    subject.write(subject._text({"log": {"level": "info", "format": "console"}}))
    worker.signal(signal.SIGHUP)
    until(lambda: "reloaded changes=log" in "\n".join(worker.output), "a line for eyes")
    subject.write(subject._text({"log": {"level": "error", "format": "console"}}))
    worker.signal(signal.SIGHUP)
    until(lambda: subject.reloads() == 2, "two reloads")
    said = len(worker.output)
    client.publish_jobs("jobs", ["a"])
    broker.await_depth("jobs")
    assert worker.stop() == 0
    assert worker.output[said:] == []


def test_another_broker_is_used_for_the_next_connection(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject, wire: Wire
) -> None:
    worker = subject.start()
    oracle.hold("a")
    ids = client.publish_jobs("jobs", ["a"])
    worker.wait_event("start")
    assert subject.reload(url=wire.url) == "broker"
    ids += client.publish_jobs("jobs", ["b"])
    worker.wait_event("done", job_id="b")
    assert wire.connections() == 0
    broker.eval(
        '[rabbit_networking:close_connection(Pid, "closed by the test") '
        "|| Pid <- rabbit_networking:local_connections(), "
        "[{client_properties, Table}] <- [rabbit_reader:info(Pid, [client_properties])], "
        '{<<"product">>, _, <<"workerd">>} <- Table]'
    )
    worker.wait_event("rejoined", job_id="a")
    # One to consume, one to publish.
    until(lambda: wire.connections() == 2, "two connections on the new way")
    oracle.release()
    broker.await_depth("jobs")
    assert set(oracle.check(ids).starts.values()) == {1}


def test_a_new_drain_timeout_holds_for_the_next_stop(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject
) -> None:
    worker = subject.start(worker={"drain_timeout": "1h"})
    oracle.hold("a")
    client.publish_jobs("jobs", ["a"])
    worker.wait_event("start")
    assert subject.reload(worker={"drain_timeout": "100ms"}) == "worker"
    assert worker.stop() == 0
    worker.wait_event("interrupted", job_id="a")
    broker.await_depth("jobs", ready=1)


def test_nothing_changed_is_told_as_well(subject: Subject) -> None:
    subject.start()
    assert subject.reload() == "none"


# Bad configurations


def test_a_bad_configuration_is_refused_as_a_whole_and_the_old_one_stays(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject
) -> None:
    worker = subject.start(queues=jobs(concurrency=1))
    good = subject._text({"queues": jobs(concurrency=1)})
    subject.write(good.replace("concurrency = 1", "concurrency = 0") + "\n[wroker]\n")
    worker.signal(signal.SIGHUP)
    worker.wait_event("reload refused", level="error", count=2)
    told = sorted(entry["problem"] for entry in worker.events("reload refused"))
    assert any("queues.jobs.concurrency" in problem for problem in told)
    assert any("wroker" in problem for problem in told)
    status = "STATUS=reload refused: 2 problems, see the log; consuming jobs: "
    worker.wait_notify(lambda text: text.startswith(status))
    # systemd waits for it, whatever became of the reload.
    until(lambda: subject.reloads() == 1, "READY=1")
    ids = client.publish_jobs("jobs", ["a", "b"])
    worker.wait_event("done", count=2)
    broker.await_depth("jobs")
    oracle.check(ids)

    seen = len(worker.notifications)
    assert subject.reload(queues=jobs(concurrency=2)) == "queues.jobs"
    until(lambda: subject.reloads() == 2, "READY=1")
    worker.wait_notify(lambda text: text.startswith("STATUS=consuming jobs: 0/2"), since=seen)


def test_a_configuration_that_is_gone_is_refused(
    client: Client, subject: Subject, tmp_path: Path
) -> None:
    worker = subject.start()
    (tmp_path / "workerd-1.toml").unlink()
    worker.signal(signal.SIGHUP)
    worker.wait_event("reload refused", level="error")
    client.publish_jobs("jobs", ["a"])
    worker.wait_event("done")


# Signals and notifications


def test_systemd_is_told_when_a_reload_begins_and_when_it_has_ended(subject: Subject) -> None:
    worker = subject.start()
    seen = len(worker.notifications)
    before = time.clock_gettime(time.CLOCK_MONOTONIC)
    subject.reload(worker={"drain_timeout": "1s"})
    until(lambda: subject.reloads() == 1, "READY=1")
    after = time.clock_gettime(time.CLOCK_MONOTONIC)
    told = [text for _, text in worker.notifications[seen:] if not text.startswith("STATUS=")]
    reloading, ready = told
    first, second = reloading.splitlines()
    assert first == "RELOADING=1"
    name, _, instant = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(instant) / 1_000_000 <= after
    assert ready == "READY=1"


def test_a_storm_of_requests_is_a_few_reloads_and_costs_no_job(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject
) -> None:
    worker = subject.start(queues=jobs(concurrency=2, prefetch=4))
    names = [f"job-{number:02}" for number in range(40)]
    client.publish_jobs("jobs", names)
    worker.wait_event("start")
    began = time.monotonic()
    for number in range(200):
        worker.signal(signal.SIGHUP)
        if number % 50 == 0:
            subject.write(subject._text({"queues": jobs(concurrency=2, prefetch=5 + number // 50)}))
        time.sleep(0.002)  # otherwise the kernel makes one signal of them
    took = time.monotonic() - began
    broker.await_depth("jobs")
    until(lambda: subject.reloads() == len(worker.events("reloaded")) > 0, "no reload is due")
    assert subject.reloads() <= took / PAUSE + 2
    assert set(oracle.check(names).starts.values()) == {1}
    assert not worker.events(level="warning")
    assert not worker.events(level="error")


def test_a_reload_in_a_drain_is_ignored(
    broker: Broker, client: Client, oracle: Oracle, subject: Subject
) -> None:
    worker = subject.start()
    oracle.hold("a")
    ids = client.publish_jobs("jobs", ["a"])
    worker.wait_event("start")
    worker.signal(signal.SIGTERM)
    worker.wait_event("draining")
    worker.signal(signal.SIGHUP)
    worker.wait_event("reload ignored", reason="draining")
    assert worker.running
    oracle.release()
    assert worker.wait_exit() == 0
    broker.await_depth("jobs")
    assert oracle.check(ids).starts == {"a": 1}
    assert not any("RELOADING=1" in text for _, text in worker.notifications)


def test_a_reload_that_comes_while_it_starts_does_not_end_it(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = daemon(config(broker.url, ["true"]))

    def ignored_or_caught() -> int:
        # Before Python has come so far, a signal ends it as it ends every program.
        lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        masks = [
            int(line.split()[1], 16) for line in lines if line.startswith(("SigIgn", "SigCgt"))
        ]
        return (masks[0] | masks[1]) & 1 << (signal.SIGHUP - 1)

    until(ignored_or_caught, "SIGHUP is ignored")
    while not worker.events("ready"):
        assert worker.running
        worker.signal(signal.SIGHUP)
        time.sleep(0.001)
    client.publish_jobs("jobs", ["a"])
    worker.wait_event("done")
    assert worker.stop() == 0


# A consumer that the broker starves


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def test_a_consumer_that_gets_nothing_although_messages_wait_gets_a_new_channel(
    peer: Peer, daemon: Start, oracle: Oracle
) -> None:
    text = config(peer.url, oracle.command(), broker={"heartbeat": "1s"})
    worker = daemon(text)
    worker.wait_event("consuming")
    ids = peer.publish("jobs", "a")
    peer.until(lambda: peer.settled, "a settlement")
    first = peer.settled[0].channel

    peer.pause()
    ids += peer.publish("jobs", "b", "c")
    assert worker.wait_event("consumer stalled", level="warning")["ready"] == 2
    worker.wait_event("consuming", queue="jobs", count=2)
    peer.until(lambda: first in peer.closed, "the old channel is closed")
    peer.resume()
    worker.wait_event("done", count=3)
    peer.until(lambda: len(peer.settled) == 3, "all settlements")
    assert [settled.method for settled in peer.settled] == ["ack"] * 3
    assert first not in {settled.channel for settled in peer.settled[1:]}
    assert peer.errors == []
    oracle.check(ids)
