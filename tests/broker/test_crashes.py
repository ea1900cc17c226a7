"""Jobs that take the daemon down with them, and jobs that only happened to be there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config
from tests.harness.waiting import until

Start = Callable[..., Daemon]

both_types = pytest.mark.parametrize("kind", ["classic", "quorum"])

#: Kills the daemon that has started it, which has no time to log that any more.
KILLS = 'echo "$WORKERD_ATTEMPT" >>"$0"; kill -9 "$PPID"; exit 1'


def killer_among(oracle: Oracle) -> list[str]:
    """A command: the job "killer" kills the daemon, and all others are the oracle's."""
    ordinary = " ".join(oracle.command("$1"))
    script = f'if [ "$1" = killer ]; then {KILLS}; fi; exec {ordinary}'
    return ["sh", "-c", script, f"{oracle.folder}/killer", "{id}"]


def attempts_to_kill(oracle: Oracle) -> str:
    return Path(oracle.folder, "killer").read_text()


def text_of(
    broker: Broker, command: list[str], kind: str, attempts: int = 3, **options: Any
) -> str:
    queue: Mapping[str, Any] = {"type": kind, "concurrency": 5}
    policy = {"retry": {"attempts": attempts, "delay": "0s", "jitter": False}}
    return config(broker.url, command, handler=policy, queues={"jobs": queue}, **options)


class Systemd:
    """Starts the daemon again when it has been killed, and counts its deaths."""

    def __init__(self, daemon: Start, text: str) -> None:
        self._daemon = daemon
        self._text = text
        self.daemons = [daemon(text)]

    @property
    def deaths(self) -> int:
        return len(self.daemons) - 1

    def tend(self) -> Daemon:
        """The daemon that runs now."""
        last = self.daemons[-1]
        if not last.running:
            assert last.wait_exit() == -signal.SIGKILL
            self.daemons.append(self._daemon(self._text))
        return self.daemons[-1]

    def wait_event(self, event: str, **fields: Any) -> dict[str, Any]:
        """Wait until one of the daemons has logged it."""

        def found() -> dict[str, Any] | None:
            self.tend()
            entries = [entry for each in self.daemons for entry in each.events(event, **fields)]
            return entries[0] if entries else None

        result = until(found, f"{event} {fields}")
        assert result
        return result


@both_types
def test_a_job_that_kills_the_daemon_has_so_many_attempts_and_nobody_else_is_blamed(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, kind: str
) -> None:
    neighbours = ["one", "two", "three", "four"]
    systemd = Systemd(daemon, text_of(broker, killer_among(oracle), kind))
    first = systemd.daemons[0]
    first.wait_event("consuming", queue="jobs.due")
    broker.settle()
    oracle.hold(*neighbours)
    client.publish_jobs("jobs", neighbours)
    for job in neighbours:
        first.wait_event("start", job_id=job)
    client.publish("jobs", message_id="killer")
    until(lambda: not first.running, "the first death")
    oracle.release()
    dead = systemd.wait_event("dead letter", job_id="killer")
    assert dead["reason"] == "worker-lost"
    everybody = [*neighbours, "killer"]
    # A daemon that was killed may not have logged what was done.
    until(lambda: not oracle.report(everybody, dead=["killer"]).lost, "the neighbours' end")
    assert systemd.deaths == 3
    assert attempts_to_kill(oracle) == "1\n2\n3\n"
    [letter] = client.take("jobs.dead")
    assert letter.id == "killer"
    assert letter.headers["x-workerd-attempts"] == 3
    assert "could settle 3 of its 3 attempts" in letter.headers["x-workerd-error"]
    # Each of them was cut off once, and run once more.
    oracle.check(everybody, dead=["killer"], allowed_duplicates=len(neighbours))


def test_a_job_whose_start_died_with_the_daemon_runs_alone(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = text_of(broker, oracle.command(), "quorum")
    first = daemon(text)
    first.wait_event("consuming", queue="jobs.due")
    oracle.hold("a", "b", "c")
    client.publish_jobs("jobs", ["a", "b"])
    for job in ("a", "b"):
        first.wait_event("start", job_id=job)
    first.kill()
    second = daemon(text)
    second.wait_event("start", isolated=True)
    client.publish("jobs", message_id="c")
    # All three are here, and one of them runs.
    client.await_ready("jobs", 0)
    second.wait_notify(lambda text: "1 jobs to run alone first" in text)
    [alone] = second.events("start")
    assert alone["attempt"] == 2
    oracle.release(alone["job_id"])
    other = second.wait_event("start", count=2)
    assert other["isolated"] is True
    oracle.release(other["job_id"])
    assert "isolated" not in second.wait_event("start", job_id="c")
    lives = [
        (entry["event"], entry["job_id"])
        for entry in second.events()
        if entry["event"] in ("start", "done")
    ]
    one, two = alone["job_id"], other["job_id"]
    assert {one, two} == {"a", "b"}
    assert lives == [
        ("start", one),
        ("done", one),
        ("start", two),
        ("done", two),
        ("start", "c"),
    ]


def test_a_job_that_runs_alone_holds_up_nobody_when_its_retry_is_refused(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = config(
        broker.url,
        oracle.command(status=1),
        handler={"retry": {"delay": "1s", "multiplier": 1.0, "jitter": False}},
        queues={"jobs": {}, "others": {}},
        worker={"drain_timeout": "0s"},
    )
    first = daemon(text)
    first.wait_event("consuming", queue="jobs.due")
    oracle.hold("a")
    client.publish("jobs", message_id="a")
    first.wait_event("start", job_id="a")
    first.kill()
    second = daemon(text)
    second.wait_event("declared", what="delays")
    second.wait_event("start", job_id="a", isolated=True)
    client.channel.exchange_delete("workerd.delay.00")
    oracle.release("a")
    second.wait_event("retry refused", job_id="a")
    client.publish("others", message_id="b")
    second.wait_event("start", job_id="b")


def test_a_suspect_that_is_gone_holds_up_nobody(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    def text(*names: str) -> str:
        return config(
            broker.url,
            oracle.command(),
            handler={"retry": {"attempts": 3}},
            queues={"jobs": {}, "others": {}},
            worker={"queues": list(names)},
        )

    first = daemon(text("jobs"), "1")
    first.wait_event("consuming", queue="jobs.due")
    oracle.hold("suspect", "runs")
    client.publish("jobs", message_id="suspect")
    first.wait_event("start", job_id="suspect")
    second = daemon(text("jobs", "others"), "2")
    second.wait_event("consuming", queue="jobs")
    second.wait_event("consuming", queue="others")
    client.publish("others", message_id="runs")
    second.wait_event("start", job_id="runs")
    first.kill()
    second.wait_notify(lambda text: "1 jobs to run alone first" in text)
    client.publish("others", message_id="waits")
    client.await_ready("others", 0)
    client.channel.queue_delete("jobs")
    # Beside the one that still runs.
    second.wait_event("done", job_id="waits")
    assert not second.events("done", job_id="runs")


def test_a_job_that_killed_two_instances_is_counted_by_both(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = text_of(broker, killer_among(oracle), "quorum", attempts=2)
    first = daemon(text, "1")
    first.wait_event("consuming", queue="jobs.due")
    client.publish("jobs", message_id="killer")
    assert first.wait_exit() == -signal.SIGKILL
    second = daemon(text, "2")
    assert second.wait_exit() == -signal.SIGKILL
    assert attempts_to_kill(oracle) == "1\n2\n"
    third = daemon(text, "1")
    assert third.wait_event("dead letter", job_id="killer")["reason"] == "worker-lost"


def test_drains_and_deploys_cost_no_attempt(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    queue = {"concurrency": 1, "prefetch": 4}
    text = config(
        broker.url,
        oracle.command(),
        queues={"jobs": queue},
        worker={"drain_timeout": "0s"},
        handler={"retry": {"attempts": 2}},
    )
    ids = ["one", "two", "three"]
    oracle.hold(*ids)
    for deploy in range(5):
        worker = daemon(text)
        worker.wait_event("consuming", queue="jobs.due")
        if deploy == 0:
            client.publish_jobs("jobs", ids)
        # One runs, and two are here and have not started.
        assert worker.wait_event("start")["attempt"] == 1
        client.await_ready("jobs", 0)
        assert worker.stop() == 0
        client.await_ready("jobs", 3)
    oracle.release()
    worker = daemon(text)
    for job in ids:
        assert worker.wait_event("done", job_id=job)["attempt"] == 1


def test_lost_connections_cost_no_attempt(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    worker = daemon(text_of(broker, oracle.command(), "quorum", attempts=2))
    worker.wait_event("consuming", queue="jobs.due")
    oracle.hold("a")
    client.publish("jobs", message_id="a")
    worker.wait_event("start", job_id="a")
    for times in range(1, 6):
        broker.close_all_connections()
        worker.wait_event("rejoined", job_id="a", count=times)
    oracle.release()
    assert worker.wait_event("done", job_id="a")["attempt"] == 1
    assert len(worker.events("start", job_id="a")) == 1


def test_a_child_that_is_killed_for_want_of_memory_has_spent_an_attempt_and_no_more(
    broker: Broker, client: Client, daemon: Start
) -> None:
    # What the kernel's killer does to it.
    text = text_of(broker, ["sh", "-c", "kill -9 $$"], "quorum", attempts=2)
    worker = daemon(text)
    worker.wait_event("consuming", queue="jobs.due")
    client.publish("jobs", message_id="a")
    dead = worker.wait_event("dead letter", job_id="a")
    assert (dead["attempt"], dead["reason"]) == (2, "signal")
    [letter] = client.take("jobs.dead")
    assert letter.headers["x-workerd-signal"] == "SIGKILL"
    assert worker.running


def test_equal_anonymous_jobs_are_not_blamed_for_each_other(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    gate = os.path.join(oracle.folder, "gate")
    text = text_of(broker, ["sh", "-c", f"until [ -e {gate} ]; do sleep 0.05; done"], "quorum")
    first = daemon(text)
    first.wait_event("consuming", queue="jobs.due")
    for _ in range(4):
        client.publish("jobs", b"equal")
    first.wait_event("start", count=4)
    first.kill()
    open(gate, "w").close()
    second = daemon(text)
    second.wait_event("done", count=4)
    assert max(entry["attempt"] for entry in second.events("done")) == 2
    assert not second.events("dead letter")
