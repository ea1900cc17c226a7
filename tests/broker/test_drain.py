"""What a stop does: to jobs that run, to jobs that wait, to acks on their way."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config, gated
from tests.harness.waiting import SCALE, until
from tests.harness.wire import Wire

Start = Callable[..., Daemon]

# The class and the method at the beginning of a frame's payload.
QUEUE_DECLARE_OK = b"\x00\x32\x00\x0b"
CHANNEL_CLOSE_OK = b"\x00\x14\x00\x29"

# What an operator takes for "at once"; the daemon itself needs a few hundredths of a second.
AT_ONCE = 1.0 * SCALE


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The file for which gated jobs wait."""
    return tmp_path / "gate"


def seconds_to_exit(worker: Daemon, number: int = signal.SIGTERM) -> float:
    """Send the signal; the exit status must be 0."""
    sent = time.monotonic()
    worker.signal(number)
    assert worker.wait_exit() == 0
    return time.monotonic() - sent


def await_held(broker: Broker, count: int, queue: str = "jobs") -> None:
    """Wait until the daemon holds so many jobs of a queue."""
    until(lambda: broker.queues()[queue].unacked == count, f"{count} unacknowledged jobs")


def await_nobody(broker: Broker) -> None:
    """Wait until the queue is empty, and nobody consumes it any more."""
    until(lambda: broker.queues()["jobs"] == (0, 0, 0), "nothing and nobody is left")


# Nothing to wait for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_stop_without_jobs_ends_at_once(broker: Broker, daemon: Start, number: int) -> None:
    worker = daemon(config(broker.url, ["true"]))
    worker.wait_ready()
    assert seconds_to_exit(worker, number) < AT_ONCE
    assert worker.events("drained", unfinished=0)


# Jobs that run, jobs that wait


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_a_stop_returns_what_has_not_started_at_once_in_order_and_lets_the_rest_finish(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, gate: Path, kind: str
) -> None:
    queue = {"concurrency": 3, "prefetch": 8, "type": kind}
    worker = daemon(config(broker.url, gated(gate, oracle.command()), queues={"jobs": queue}))
    worker.wait_ready()
    client.await_topology()
    ids = client.publish_jobs("jobs", [f"job-{number}" for number in range(8)])
    worker.wait_event("start", count=3)
    await_held(broker, 8)

    stopped = time.monotonic()
    worker.signal(signal.SIGTERM)
    client.await_ready("jobs", 5)
    assert time.monotonic() - stopped < 0.5 * SCALE
    returned = client.look("jobs")
    assert [message.id for message in returned] == ids[3:]
    if kind == "quorum":
        assert [message.headers["x-delivery-count"] for message in returned] == [1] * 5

    assert not worker.events("done")
    gate.touch()
    assert worker.wait_exit() == 0
    assert len(worker.events("start")) == len(worker.events("done")) == 3
    broker.await_depth("jobs", ready=5)
    oracle.check(ids[:3])


def test_what_arrives_after_a_stop_does_not_start_and_goes_back_with_one_delivery(
    broker: Broker, wire: Wire, client: Client, daemon: Start
) -> None:
    worker = daemon(config(wire.url, ["true"]))
    worker.wait_ready()
    client.await_topology()
    wire.hold("to_daemon")
    ids = client.publish_jobs("jobs", ["late-1", "late-2", "late-3"])
    await_held(broker, 3)
    worker.signal(signal.SIGTERM)
    worker.wait_event("draining")
    wire.release()
    assert worker.wait_exit() == 0
    assert not worker.events("start")
    client.await_ready("jobs", 3)
    returned = client.look("jobs")
    assert [message.id for message in returned] == ids
    assert [message.headers["x-delivery-count"] for message in returned] == [1] * 3


def test_systemd_is_asked_for_more_time_for_as_long_as_the_drain_takes(
    broker: Broker, client: Client, daemon: Start, gate: Path
) -> None:
    worker = daemon(
        config(broker.url, gated(gate, ["true"]), worker={"drain_timeout": "40s"}),
    )
    worker.wait_ready()
    client.publish("jobs")
    worker.wait_event("start")
    worker.signal(signal.SIGTERM)
    worker.wait_notify("STOPPING=1")
    worker.wait_notify("STATUS=draining 1 jobs, 40s left")

    def extensions() -> list[int]:
        lines = [text.split("=") for _, text in worker.notifications]
        return [int(value) for name, value in lines if name == "EXTEND_TIMEOUT_USEC"]

    until(lambda: len(extensions()) >= 3, "three requests for more time")
    # Each counts from when it is sent; all name about the same end, beyond the deadline.
    assert all(38e6 < extension < 110e6 for extension in extensions())
    assert extensions() == sorted(extensions(), reverse=True)
    gate.touch()
    assert worker.wait_exit() == 0


def test_jobs_delivered_to_a_new_connection_in_a_drain_go_back_while_the_others_run(
    broker: Broker, wire: Wire, client: Client, daemon: Start, oracle: Oracle, gate: Path
) -> None:
    queue = {"concurrency": 1, "prefetch": 4}
    worker = daemon(config(wire.url, gated(gate, oracle.command()), queues={"jobs": queue}))
    worker.wait_ready()
    client.await_topology()
    ids = client.publish_jobs("jobs", ["running", "waiting-1", "waiting-2", "waiting-3"])
    worker.wait_event("start")
    worker.signal(signal.SIGTERM)
    client.await_ready("jobs", 3)
    wire.break_connections()
    worker.wait_event("rejoined")
    client.await_ready("jobs", 3)
    assert worker.running
    gate.touch()
    assert worker.wait_exit() == 0
    assert sorted(str(message.id) for message in client.look("jobs")) == ids[1:]
    oracle.check(ids[:1])


def test_what_another_host_got_of_it_holds_up_a_new_connection_only_briefly(
    broker: Broker, wire: Wire, client: Client, daemon: Start, gate: Path
) -> None:
    queue = {"concurrency": 1, "prefetch": 4}
    worker = daemon(config(wire.url, gated(gate, ["true"]), queues={"jobs": queue}))
    worker.wait_ready()
    client.await_topology()
    client.publish("jobs", message_id="running")
    worker.wait_event("start")
    wire.cut()
    until(lambda: client.channel.basic_get("jobs")[0], "the redelivery, to another consumer")
    ids = client.publish_jobs("jobs", ["waiting-1", "waiting-2"])
    mark = worker.mark()
    wire.mend()
    worker.wait_event("consuming", since=mark)
    await_held(broker, 3)
    worker.signal(signal.SIGTERM)
    client.await_ready("jobs", 2, timeout=5 + 5 * SCALE)
    assert worker.running
    gate.touch()
    assert worker.wait_exit() == 0
    assert [message.id for message in client.drain("jobs")] == ids


# Jobs that take too long


def test_a_job_that_outlasts_the_drain_gets_sigterm_and_time_to_obey_it(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    # The handler's own child must be asked as well, or the shell would wait for it.
    trap = 'trap "echo asked >>$0; sleep 0.2; echo obeyed >>$0; exit 0" TERM'
    script = f"{trap}; sleep 300 & echo up; wait"
    text = config(
        broker.url,
        ["sh", "-c", script, notes],
        worker={"drain_timeout": "200ms"},
        handler={"kill_grace": "60s"},
    )
    worker = daemon(text)
    worker.wait_ready()
    client.publish("jobs", message_id="long")
    worker.wait_event("output", text="up")
    assert seconds_to_exit(worker) < 10 * SCALE
    assert notes.read_text() == "asked\nobeyed\n"
    assert worker.events("interrupted", job_id="long")
    client.await_ready("jobs", 1)
    (returned,) = client.look("jobs")
    assert returned.headers["x-delivery-count"] == 1
    assert client.ready("jobs.dead") == 0

    again = daemon(text)
    started = again.wait_event("start", job_id="long")
    assert started["attempt"] == 1, "being cut off costs no attempt"


def test_a_job_that_ignores_sigterm_is_killed_and_goes_back(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = daemon(
        config(
            broker.url,
            ["sh", "-c", 'trap "" TERM; echo up; while :; do sleep 0.1; done'],
            worker={"drain_timeout": "200ms"},
            handler={"kill_grace": "300ms"},
        )
    )
    worker.wait_ready()
    client.publish("jobs", message_id="stubborn")
    worker.wait_event("output", text="up")
    assert seconds_to_exit(worker) < 5 * SCALE
    ended = worker.events("interrupted", job_id="stubborn")
    assert [event["signal"] for event in ended] == ["SIGKILL"]
    client.await_ready("jobs", 1)
    (returned,) = client.look("jobs")
    assert returned.headers["x-delivery-count"] == 1
    assert "x-workerd-attempt" not in returned.headers


# A broker that is away


def test_a_stop_before_any_broker_was_reached_ends_at_once(daemon: Start) -> None:
    worker = daemon(
        config("amqp://guest:guest@127.0.0.1:1/", ["true"], worker={"ready_wait": "60s"})
    )
    worker.wait_event("unreachable")
    assert seconds_to_exit(worker) < AT_ONCE
    assert "READY=1" not in [text for _, text in worker.notifications]


def test_a_stop_while_a_broker_accepts_but_does_not_answer_ends_at_once(
    wire: Wire, daemon: Start
) -> None:
    wire.hold("to_daemon")
    worker = daemon(config(wire.url, ["true"]))
    worker.wait_event("starting")
    until(lambda: wire.connections() == 2, "both connections wait for the broker")
    assert seconds_to_exit(worker) < AT_ONCE


def test_a_stop_while_a_queue_is_opened_is_no_trouble_worth_a_warning(
    wire: Wire, daemon: Start
) -> None:
    wire.hold("to_daemon", at=QUEUE_DECLARE_OK)
    worker = daemon(config(wire.url, ["true"]))
    worker.wait_event("connected")
    until(wire.holds, "the broker's answer to the first declaration")
    worker.signal(signal.SIGTERM)
    worker.wait_event("draining")
    wire.release()
    assert worker.wait_exit() == 0
    assert not worker.events(level="warning")


def test_a_stop_in_a_pause_before_the_next_attempt_ends_at_once(wire: Wire, daemon: Start) -> None:
    worker = daemon(config(wire.url, ["true"], broker={"reconnect_max": "60s"}))
    worker.wait_ready()
    wire.cut()
    # The pauses double from 0.2 s on.
    worker.wait_event("unreachable", retry_in=lambda seconds: seconds > 1)
    worker.wait_notify(lambda text: text.startswith("STATUS=reconnecting to 127.0.0.1 in "))
    assert seconds_to_exit(worker) < AT_ONCE


def test_a_job_that_ends_while_the_broker_is_away_goes_back_when_it_stays_away(
    wire: Wire, client: Client, daemon: Start, oracle: Oracle, gate: Path
) -> None:
    worker = daemon(config(wire.url, gated(gate, oracle.command())))
    worker.wait_ready()
    ids = client.publish_jobs("jobs", ["unheard"])
    worker.wait_event("start")
    wire.cut()
    worker.wait_event("disconnected")
    worker.signal(signal.SIGTERM)
    worker.wait_event("draining")
    gate.touch()
    worker.wait_event("verdict kept")
    ended = time.monotonic()
    assert worker.wait_exit() == 0
    assert time.monotonic() - ended < AT_ONCE, "one attempt to connect, refused at once"
    client.await_ready("jobs", 1)
    oracle.check(ids)


def test_one_last_connection_acknowledges_what_ended_while_the_broker_was_away(
    broker: Broker, wire: Wire, client: Client, daemon: Start, oracle: Oracle, gate: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    password = tmp_path / "password"
    password.write_text("guest")
    password.chmod(0o600)
    url = wire.url.replace("guest:guest@", "guest@")
    settings = {"reconnect_max": "60s", "password_file": str(password)}
    worker = daemon(config(url, gated(gate, oracle.command()), broker=settings))
    worker.wait_ready()
    client.await_topology()
    ids = client.publish_jobs("jobs", ["owed"])
    worker.wait_event("start")
    # A login that cannot work is tried again after `reconnect_max`: the pause is a minute long.
    password.write_text("")
    wire.break_connections()
    worker.wait_event("unreachable", retry_in=60)
    password.write_text("guest")
    worker.signal(signal.SIGTERM)
    worker.wait_event("draining")
    gate.touch()
    assert worker.wait_exit() == 0
    assert worker.events("settled from memory", job_id="owed")
    await_nobody(broker)
    oracle.check(ids)


def test_a_channel_close_without_an_answer_is_an_outage_like_any_other(
    wire: Wire, daemon: Start
) -> None:
    wire.hold("to_daemon", at=CHANNEL_CLOSE_OK)
    worker = daemon(config(wire.url, ["true"], worker={"ready_wait": "60s"}))
    worker.wait_event("disconnected", text="connection lost: no answer within 15 s")
    wire.release()
    worker.wait_ready()
    worker.wait_event("consuming")


# Acks on their way


def test_the_last_acks_are_proven_read_before_the_exit(
    broker: Broker, wire: Wire, client: Client, daemon: Start, oracle: Oracle, gate: Path
) -> None:
    queue = {"concurrency": 3, "prefetch": 4}
    worker = daemon(config(wire.url, gated(gate, oracle.command()), queues={"jobs": queue}))
    worker.wait_ready()
    client.await_topology()
    ids = client.publish_jobs("jobs", ["job-1", "job-2", "job-3", "given back"])
    worker.wait_event("start", count=3)
    worker.signal(signal.SIGTERM)
    client.await_ready("jobs", 1)
    # What is still on this wire when the daemon ends is lost.
    wire.delay = 0.2
    gate.touch()
    assert worker.wait_exit() == 0
    until(lambda: not broker.queues()["jobs"].unacked, "the broker knows that the daemon is gone")
    assert client.ready("jobs") == 1
    oracle.check(ids[:3])


def test_a_frozen_broker_gets_the_last_acks_when_it_thaws(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, gate: Path
) -> None:
    worker = daemon(config(broker.url, gated(gate, oracle.command())))
    worker.wait_ready()
    client.await_topology()
    ids = client.publish_jobs("jobs", ["job-1", "job-2"])
    worker.wait_event("start", count=2)
    broker.freeze()
    gate.touch()
    worker.wait_event("done", count=2)
    worker.signal(signal.SIGTERM)
    worker.wait_event("draining")
    broker.thaw()
    assert worker.wait_exit() == 0
    await_nobody(broker)
    oracle.check(ids)


def test_an_unanswering_broker_holds_up_the_exit_for_a_bounded_time(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = daemon(config(broker.url, ["true"], worker={"drain_timeout": "300ms"}))
    worker.wait_ready()
    client.await_topology()
    broker.freeze()
    try:
        assert 10 < seconds_to_exit(worker) < 16 + 2 * SCALE
    finally:
        broker.thaw()


# A second signal


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_second_signal_cuts_the_drain_short(
    broker: Broker, client: Client, daemon: Start, second: int
) -> None:
    worker = daemon(config(broker.url, ["sleep", "300"]))
    worker.wait_ready()
    client.publish("jobs", message_id="cut-short")
    worker.wait_event("start")
    worker.signal(signal.SIGTERM)
    worker.wait_event("draining")
    assert seconds_to_exit(worker, second) < AT_ONCE
    ended = worker.events("interrupted", job_id="cut-short")
    assert [event["signal"] for event in ended] == ["SIGTERM"]
    client.await_ready("jobs", 1)


def test_a_second_signal_does_not_wait_for_a_broker_that_does_not_answer(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = daemon(config(broker.url, ["true"]))
    worker.wait_ready()
    client.await_topology()
    broker.freeze()
    try:
        worker.signal(signal.SIGTERM)
        worker.wait_event("draining")
        assert seconds_to_exit(worker) < 5 * SCALE
    finally:
        broker.thaw()
