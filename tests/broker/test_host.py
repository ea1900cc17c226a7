"""What the instances of a host remember together: no job is lost, none runs twice for nothing."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import AGAIN, config
from tests.harness.waiting import SEEDS, TIMEOUT, until
from tests.harness.wire import Wire

Start = Callable[..., Daemon]

CLASSIC = {"type": "classic"}
QUORUM = {"type": "quorum"}
both_types = pytest.mark.parametrize("queue", [CLASSIC, QUORUM], ids=["classic", "quorum"])

# The class and the method of an acknowledgement, at the beginning of a frame's payload.
BASIC_ACK = b"\x00\x3c\x00\x50"


def close_connections(broker: Broker, instance: str) -> None:
    """Close the connections of one instance, as an administrator may."""
    broker.eval(
        '[rabbit_networking:close_connection(Pid, "closed by the test") '
        "|| Pid <- rabbit_networking:local_connections(), "
        "[{client_properties, Table}] <- [rabbit_reader:info(Pid, [client_properties])], "
        f'{{<<"connection_name">>, _, <<"workerd@{instance} ", _/binary>>}} <- Table]'
    )


def state_of(worker: Daemon, queue: str = "jobs") -> dict[str, Any]:
    """What an instance says of a queue when it is asked."""
    mark = worker.mark()
    worker.signal(signal.SIGUSR1)
    return worker.wait_event("state queue", since=mark, queue=queue)


def await_held(worker: Daemon, count: int) -> None:
    """Wait until an instance holds so many redeliveries of what another one runs."""
    until(lambda: state_of(worker)["held"] == count, f"{count} held")


def done(*workers: Daemon) -> list[str]:
    return [entry["job_id"] for worker in workers for entry in worker.events("done")]


# The broker is killed under two instances


def outlive_kills(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int, jobs: int, seconds: float, kills: int
) -> None:
    chance = random.Random(seed)
    kind = QUORUM if seed % 2 == 0 else CLASSIC
    text = config(broker.url, oracle.command(seconds=seconds), queues={"jobs": kind})
    workers = [daemon(text, instance) for instance in ("1", "2")]
    for worker in workers:
        worker.wait_event("consuming", queue="jobs.due")
        worker.wait_event("consuming")
    with Client(broker.url) as client:
        ids = client.publish_jobs("jobs", [f"job-{number:03}" for number in range(jobs)])
    for _ in range(kills):
        target = chance.randrange(5, jobs - 10)
        until(lambda target=target: len(done(*workers)) >= target, f"{target} jobs")  # type: ignore[misc]
        broker.kill()
        broker.start()
    until(lambda: len(done(*workers)) >= jobs, "all jobs", 3 * TIMEOUT)
    assert broker.recovers()
    broker.await_depth("jobs", timeout=3 * TIMEOUT)
    report = oracle.check(ids)
    told = [
        (event, [len(worker.events(event)) for worker in workers])
        for event in ("done", "rejoined", "settled again")
    ]
    print(f"{kind['type']}: {report}; {told}")
    assert sum(report.starts.values()) == jobs


@pytest.mark.parametrize("seed", range(2))
def test_two_instances_run_each_job_once_although_the_broker_is_killed(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    outlive_kills(broker, daemon, oracle, seed, jobs=60, seconds=0.05, kills=1)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(SEEDS))
def test_two_instances_run_each_of_many_jobs_once_although_the_broker_is_killed(
    broker: Broker, daemon: Start, oracle: Oracle, seed: int
) -> None:
    outlive_kills(broker, daemon, oracle, seed, jobs=200, seconds=0.1, kills=1 + seed % 2)


# What one runs comes to the other


def run_on_one_and_bring_to_two(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, text: str
) -> tuple[Daemon, Daemon]:
    """Job "a", which must be held, runs on 1; the broker delivers it once more, to 2."""
    one = daemon(text, "1")
    one.wait_event("consuming")
    client.publish_jobs("jobs", ["a"])
    until(lambda: "start a " in oracle.journal, "a job at work")
    two = daemon(text, "2")
    two.wait_event("consuming")
    close_connections(broker, "1")
    await_held(two, 1)
    one.wait_event("consuming", queue="jobs", count=2)
    return one, two


@both_types
def test_a_redelivery_of_what_a_sibling_runs_waits_without_a_slot_and_is_settled_with_it(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, queue: dict[str, Any]
) -> None:
    queue = {**queue, "concurrency": 1, "prefetch": 2}
    text = config(broker.url, oracle.command(), queues={"jobs": queue})
    oracle.hold("a")
    one, two = run_on_one_and_bring_to_two(broker, client, daemon, oracle, text)

    # 1 can take two of them behind "a", and nobody else has a slot but 2.
    others = client.publish_jobs("jobs", [f"other-{number}" for number in range(5)])
    two.wait_event("done", count=3)
    assert state_of(two)["held"] == 1
    assert not done(one)

    oracle.release()
    one.wait_event("verdict kept", job_id="a")
    two.wait_event("settled again", job_id="a")
    broker.await_depth("jobs")
    report = oracle.check(["a", *others])
    assert set(report.starts.values()) == {1}


def test_a_redelivery_is_run_when_the_sibling_that_ran_it_is_killed(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    oracle.hold("a")
    text = config(broker.url, oracle.command(), handler=AGAIN)
    one, two = run_on_one_and_bring_to_two(broker, client, daemon, oracle, text)
    one.kill()
    two.wait_event("start", job_id="a", redelivered=True)
    oracle.release()
    two.wait_event("done", job_id="a")
    broker.await_depth("jobs")
    report = oracle.check(["a"], allowed_duplicates=1)
    assert report.cut_off == {"a"}


def test_a_killed_instance_costs_only_the_jobs_that_it_was_running_another_run(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    queues = {"jobs": {"concurrency": 4, "prefetch": 8}}
    text = config(broker.url, oracle.command(), queues=queues, handler=AGAIN)
    workers = [daemon(text, instance) for instance in ("1", "2")]
    for worker in workers:
        worker.wait_event("consuming")
    # Held, they fill both instances: at such a standstill it is certain what was cut off.
    middle = [f"job-{number:03}" for number in range(50, 66)]
    oracle.hold(*middle)
    ids = client.publish_jobs("jobs", [f"job-{number:03}" for number in range(100)])
    full = {"running": 4, "waiting": 4}.items()
    until(lambda: all(full <= state_of(worker).items() for worker in workers), "a standstill")
    running = [f"start {name} " for name in middle]
    until(lambda: sum(start in oracle.journal for start in running) == 8, "eight jobs at work")
    finished = set(done(*workers))
    one, two = workers
    two.kill()
    oracle.release()
    until(lambda: finished | set(done(one)) == set(ids), "the second half")
    broker.await_depth("jobs")
    report = oracle.check(ids, allowed_duplicates=4)
    assert len(report.cut_off) == 4
    assert set(report.duplicates) == report.cut_off
    assert not report.repeated


@pytest.mark.parametrize("successor", ["1", "2"])
def test_a_verdict_whose_ack_was_never_read_is_remembered_when_the_daemon_is_killed(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, wire: Wire, successor: str
) -> None:
    text = config(wire.url, oracle.command())
    worker = daemon(text, "1")
    worker.wait_event("consuming")
    wire.hold("to_broker", at=BASIC_ACK)
    jobs = client.publish_jobs("jobs", ["a"])
    worker.wait_event("done", job_id="a")
    until(wire.holds, "the ack is on its way")
    worker.kill()
    wire.break_connections()

    later = daemon(text, successor)
    later.wait_event("settled again", job_id="a")
    broker.await_depth("jobs")
    report = oracle.check(jobs)
    assert report.starts == {"a": 1}


@pytest.mark.parametrize("successor", ["1", "2"])
def test_a_confirmed_dead_letter_is_not_published_again_when_the_daemon_is_killed(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, wire: Wire, successor: str
) -> None:
    text = config(wire.url, oracle.command(status=1))
    worker = daemon(text, "1")
    worker.wait_event("consuming")
    wire.hold("to_broker", at=BASIC_ACK)
    jobs = client.publish_jobs("jobs", ["a"])
    worker.wait_event("dead letter", job_id="a")
    until(wire.holds, "the ack is on its way")
    worker.kill()
    wire.break_connections()

    later = daemon(text, successor)
    later.wait_event("settled again", job_id="a")
    broker.await_depth("jobs")
    client.await_ready("jobs.dead", 1)
    report = oracle.check(jobs, dead=jobs)
    assert report.starts == {"a": 1}


def test_a_sibling_holds_a_failed_job_until_its_dead_letter_is_confirmed(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    oracle.hold("a")
    text = config(broker.url, oracle.command(status=1))
    one, two = run_on_one_and_bring_to_two(broker, client, daemon, oracle, text)
    # Once it is back, and consumes everything, it declares nothing any more.
    back = one.log.index(one.wait_event("connected", count=2))
    one.wait_event("consuming", queue="jobs.due", since=back)
    client.channel.queue_delete("jobs.dead")
    oracle.release()
    one.wait_event("dead letter refused", job_id="a")
    assert state_of(two)["held"] == 1
    assert not two.events("settled again")

    client.declare("jobs.dead")
    one.wait_event("dead letter", job_id="a")
    two.wait_event("settled again", job_id="a")
    broker.await_depth("jobs")
    client.await_ready("jobs.dead", 1)
    report = oracle.check(["a"], dead=["a"])
    assert report.starts == {"a": 1}


def test_a_dead_letter_that_was_not_confirmed_when_the_daemon_was_killed_is_published_once(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = config(broker.url, oracle.command(status=1))
    worker = daemon(text, "1")
    worker.wait_event("consuming", queue="jobs.due")
    client.channel.queue_delete("jobs.dead")
    jobs = client.publish_jobs("jobs", ["a"])
    worker.wait_event("dead letter refused", job_id="a")
    worker.kill()
    broker.await_depth("jobs", ready=1)

    later = daemon(text, "1")  # declares what was deleted
    later.wait_event("dead letter", job_id="a")
    broker.await_depth("jobs")
    client.await_ready("jobs.dead", 1)
    oracle.check(jobs, dead=jobs)
    assert not later.events("settled again")


def test_a_job_given_back_by_a_drain_runs_on_a_sibling_at_once(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    # Job "b" ignores SIGTERM, so that 1 is still there when "a" runs on 2.
    judge, folder, job, *rest = oracle.command()
    command = ["sh", "-c", '[ "$2" != b ] || trap "" TERM; exec "$0" "$@"', judge, folder, job]
    text = config(
        broker.url,
        [*command, *rest],
        handler={"kill_grace": "60s"},
        worker={"drain_timeout": "200ms"},
    )
    one = daemon(text, "1")
    one.wait_event("consuming")
    oracle.hold("a", "b")
    jobs = client.publish_jobs("jobs", ["a", "b"])
    one.wait_event("start", count=2)
    until(lambda: oracle.journal.count("start") == 2, "two starts")
    two = daemon(text, "2")
    two.wait_event("consuming")
    one.signal(signal.SIGTERM)
    one.wait_event("interrupted", job_id="a")

    def arrived() -> dict[str, Any]:
        state = state_of(two)
        return state if state["running"] + state["held"] else {}

    assert until(arrived, "it comes to 2")["running"] == 1
    two.wait_event("start", job_id="a", redelivered=True)
    assert one.running
    oracle.release()
    assert one.wait_exit() == 0
    two.wait_event("done", job_id="a")
    broker.await_depth("jobs")
    # What ends after SIGTERM may have been cut short, whatever its status.
    report = oracle.check(jobs, allowed_duplicates=2)
    assert report.starts == {"a": 2, "b": 2}


# Equal messages, as cron sends them


def test_an_equal_message_given_back_after_a_stop_is_run(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = config(broker.url, oracle.command())
    worker = daemon(text, "1")
    worker.wait_event("consuming")
    client.publish_jobs("jobs", ["cron"])
    worker.wait_event("done")
    broker.await_depth("jobs")
    assert worker.stop() == 0

    client.publish_jobs("jobs", ["cron"])
    # Somebody looks at it and gives it back: it will come flagged as redelivered.
    assert [message.id for message in client.look("jobs")] == ["cron"]
    later = daemon(text, "1")
    later.wait_event("start", job_id="cron", redelivered=True)
    later.wait_event("done", job_id="cron")
    broker.await_depth("jobs")
    assert oracle.report(["cron"]).starts == {"cron": 2}


@pytest.mark.parametrize("successor", ["1", "2"])
def test_a_job_cut_off_by_a_kill_is_run_again_although_an_equal_one_was_finished(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, successor: str
) -> None:
    text = config(broker.url, oracle.command(), handler=AGAIN)
    worker = daemon(text, "1")
    worker.wait_event("consuming")
    client.publish_jobs("jobs", ["cron"])
    worker.wait_event("done")
    broker.await_depth("jobs")
    # Its ack was read, but from now on the daemon cannot know that.
    close_connections(broker, "1")
    worker.wait_event("consuming", queue="jobs", count=2)

    oracle.hold("cron")
    client.publish_jobs("jobs", ["cron"])
    worker.wait_event("start", count=2)
    worker.kill()
    oracle.release()
    later = daemon(text, successor)
    later.wait_event("done", job_id="cron")
    broker.await_depth("jobs")
    assert not later.events("settled again")


def test_foreign_files_and_a_folder_that_nobody_may_read_do_no_harm(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    for name in ("1", "stale", "secret"):
        (state / name).mkdir(parents=True)
        (state / name / "00000001").write_bytes(bytes(100))
        (state / name / "README").write_text("not ours")
    (state / "notes.txt").write_text("not ours")
    (state / "empty").mkdir()
    (state / "nowhere").symlink_to("nothing")
    (state / "itself").symlink_to("itself")
    os.mkfifo(state / "pipe")
    (state / "secret").chmod(0)
    # Without these not even root may read it.
    powers = "-dac_override,-dac_read_search"
    text = config(broker.url, oracle.command())
    oracle.hold("a")

    def start(instance: str) -> Daemon:
        program = ["setpriv", "--bounding-set", powers, sys.executable, "-m", "workerd", "run"]
        path = tmp_path / f"workerd-{instance}.toml"
        command = [*program, "--config", str(path), "--instance", instance]
        worker = daemon(text, instance, command=command)
        worker.wait_event("consuming")
        return worker

    one = start("1")
    client.publish_jobs("jobs", ["a"])
    one.wait_event("start", job_id="a")
    two = start("2")
    close_connections(broker, "1")
    await_held(two, 1)
    oracle.release()
    two.wait_event("settled again", job_id="a")
    broker.await_depth("jobs")
    assert oracle.check(["a"]).starts == {"a": 1}
    for worker in (one, two):
        assert not worker.events("run log not kept")
        assert not [line for line in worker.output if not line.startswith("{")]
