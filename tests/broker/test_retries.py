"""Failed jobs come back later, so often and no more, and are never lost on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import call
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config
from tests.harness.waiting import SCALE, TIMEOUT, until
from tests.harness.wire import Wire
from workerd.core.job import ATTEMPT, COPY, EXPIRES, MAX_ATTEMPTS

Start = Callable[..., Daemon]

#: A second is the shortest delay there is.
SOON = {"delay": "1s", "multiplier": 1.0, "jitter": False}

#: The class and the method of an acknowledgement, at the beginning of a frame's payload.
BASIC_ACK = b"\x00\x3c\x00\x50"

FAILS = ["sh", "-c", "echo 'no such photo' >&2; exit 3"]
classic_too = pytest.mark.parametrize("kind", ["quorum", "classic"])


def attempts(number: int, **policy: Any) -> dict[str, Any]:
    return {"retry": {"attempts": number, **SOON, **policy}}


def begin(daemon: Start, text: str) -> Daemon:
    """Start a daemon, and wait until it consumes everything."""
    worker = daemon(text)
    worker.wait_event("consuming", queue="jobs")
    worker.wait_event("consuming", queue="jobs.due")
    return worker


def starts(worker: Daemon, job_id: str) -> list[int]:
    """The attempts that were started of a job."""
    return [entry["attempt"] for entry in worker.events("start", job_id=job_id)]


@classic_too
def test_three_attempts_are_three_starts_three_seconds_apart_and_then_a_dead_letter(
    broker: Broker, client: Client, daemon: Start, kind: str
) -> None:
    policy = {"retry": {"attempts": 3, "delay": "1s", "multiplier": 2.0}}
    text = config(broker.url, FAILS, handler=policy, queues={"jobs": {"type": kind}})
    worker = begin(daemon, text)
    began = time.monotonic()
    client.publish("jobs", b"photo", message_id="a", headers={"trace": "t"})
    dead = worker.wait_event("dead letter", job_id="a")
    assert 3.0 <= time.monotonic() - began < 3.0 + TIMEOUT / 10
    assert dead["attempt"] == 3
    assert starts(worker, "a") == [1, 2, 3]
    assert [entry["seconds"] for entry in worker.events("retry", job_id="a")] == [1, 2]
    [letter] = client.take("jobs.dead")
    assert letter.body == b"photo"
    assert letter.headers["trace"] == "t"
    assert letter.headers["x-workerd-attempts"] == 3
    assert letter.headers["x-workerd-exit-status"] == 3
    assert letter.headers["x-workerd-error"] == "no such photo"
    assert letter.headers["x-workerd-first-failure"] < letter.headers["x-workerd-last-failure"]
    assert not {ATTEMPT, COPY} & letter.headers.keys()
    worker.stop()
    for queue in ("jobs", "jobs.due"):
        broker.await_depth(queue)


def test_a_job_that_succeeds_at_last_is_done(broker: Broker, client: Client, daemon: Start) -> None:
    script = 'echo "$WORKERD_ATTEMPT/$WORKERD_MAX_ATTEMPTS"; test "$WORKERD_ATTEMPT" = 3'
    worker = begin(daemon, config(broker.url, ["sh", "-c", script], handler=attempts(4)))
    client.publish("jobs", message_id="a")
    done = worker.wait_event("done", job_id="a")
    assert done["attempt"] == 3
    said = [entry["text"] for entry in worker.events("output", job_id="a")]
    assert said == ["1/4", "2/4", "3/4"]
    worker.wait_notify(lambda text: "1 done, 2 retried, 0 failed" in text)
    assert client.ready("jobs.dead") == 0


def test_without_a_delay_the_next_attempt_comes_at_once(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = begin(daemon, config(broker.url, FAILS, handler=attempts(9, delay="0s")))
    client.publish("jobs", message_id="a")
    worker.wait_event("dead letter", job_id="a", attempt=9)


def test_a_job_without_an_id_has_one_id_in_all_its_attempts(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = begin(daemon, config(broker.url, FAILS, handler=attempts(2, delay="0s")))
    client.publish("jobs", b"anonymous")
    worker.wait_event("dead letter", attempt=2)
    assert len({entry["job_id"] for entry in worker.events("start")}) == 1


# How many attempts


@pytest.mark.parametrize(("wish", "number"), [(1, 1), (4, 4), (1_000_000, 6), (-1, 2), ("4", 2)])
def test_a_sender_may_ask_for_attempts_but_not_for_more_than_the_handler_allows(
    broker: Broker, client: Client, daemon: Start, wish: object, number: int
) -> None:
    policy = attempts(2, delay="0s", max_attempts=6)
    worker = begin(daemon, config(broker.url, FAILS, handler=policy))
    client.publish("jobs", message_id="a", headers={MAX_ATTEMPTS: wish})
    assert worker.wait_event("dead letter", job_id="a")["attempt"] == number
    assert starts(worker, "a") == list(range(1, number + 1))


@pytest.mark.parametrize("forged", [3, 6, 1_000_000])
def test_attempts_that_are_spent_by_a_forged_header_are_none(
    broker: Broker, client: Client, daemon: Start, forged: int
) -> None:
    worker = begin(daemon, config(broker.url, FAILS, handler=attempts(3, max_attempts=6)))
    client.publish("jobs", message_id="a", headers={ATTEMPT: forged})
    assert worker.wait_event("dead letter", job_id="a")["reason"] == "attempts-spent"
    assert not starts(worker, "a")
    [letter] = client.take("jobs.dead")
    assert letter.headers["x-workerd-attempts"] == forged


@pytest.mark.parametrize("forged", [-1, "9", 2_000_000, True])
def test_a_forged_header_that_is_no_number_of_attempts_counts_for_nothing(
    broker: Broker, client: Client, daemon: Start, forged: object
) -> None:
    worker = begin(daemon, config(broker.url, ["true"], handler=attempts(3)))
    client.publish("jobs", message_id="a", headers={ATTEMPT: forged})
    assert worker.wait_event("done", job_id="a")["attempt"] == 1


# What a command says of itself


def test_a_command_may_ask_for_its_own_delay_and_leave_a_note(
    broker: Broker, client: Client, daemon: Start
) -> None:
    script = 'echo retry-after=0 >>"$WORKERD_REPORT"; echo "note=the printer is out" >&3; exit 75'
    policy = attempts(2, delay="1h")
    worker = begin(daemon, config(broker.url, ["sh", "-c", script], handler=policy))
    client.publish("jobs", message_id="a")
    retry = worker.wait_event("retry", job_id="a")
    assert (retry["seconds"], retry["note"]) == (0, "the printer is out")
    dead = worker.wait_event("dead letter", job_id="a", attempt=2)
    assert dead["note"] == "the printer is out"
    [letter] = client.take("jobs.dead")
    assert letter.headers["x-workerd-note"] == "the printer is out"


# Too late


def test_a_delay_is_not_cut_short_by_a_time_to_live_and_a_job_that_is_late_does_not_start(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = begin(daemon, config(broker.url, FAILS, handler=attempts(5, delay="4s")))
    sent = time.time()
    client.publish("jobs", message_id="a", expiration="2000")
    dead = worker.wait_event("dead letter", job_id="a")
    assert time.time() - sent >= 4
    assert (dead["reason"], starts(worker, "a")) == ("expired", [1])
    [letter] = client.take("jobs.dead")
    assert 2000 <= letter.headers[EXPIRES] - sent * 1000 < 4000
    assert letter.headers["x-workerd-attempts"] == 1


def test_a_job_whose_time_is_over_while_it_waits_for_a_slot_does_not_start(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    queues = {"jobs": {"concurrency": 1, "prefetch": 2}}
    worker = begin(daemon, config(broker.url, oracle.command(), queues=queues))
    lives = 0.3 * SCALE
    oracle.hold("slow")
    client.publish("jobs", message_id="slow")
    worker.wait_event("start", job_id="slow")
    client.publish("jobs", message_id="late", expiration=f"{lives * 1000:.0f}")
    # It is taken off the queue in time, and waits here.
    until(lambda: call(worker, "status")["queues"][0]["waiting"] == 1, "it waits")
    time.sleep(lives + 0.1)  # what it waits for is the time itself
    oracle.release("slow")
    assert worker.wait_event("dead letter", job_id="late")["reason"] == "expired"
    assert not starts(worker, "late")


# A copy that the broker does not take


def test_a_retry_that_no_exchange_takes_leaves_the_original_and_pauses_its_queue_alone(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    queues: dict[str, Any] = {"jobs": {}, "others": {}}
    script = f'[ "$1" = bad ] && exit 1; exec {" ".join(oracle.command("$1"))}'
    command = ["sh", "-c", script, "sh", "{id}"]
    worker = begin(daemon, config(broker.url, command, handler=attempts(2), queues=queues))
    client.channel.exchange_delete("workerd.delay.00")
    client.publish("jobs", message_id="bad")
    refused = worker.wait_event("retry refused", job_id="bad")
    assert "no exchange 'workerd.delay.00'" in refused["text"]
    worker.wait_notify(lambda text: "jobs paused: NOT_FOUND" in text)
    # It has slots, but would need a copy as well when it fails.
    client.publish("jobs", message_id="next")
    client.await_ready("jobs", 0)
    ids = client.publish_jobs("others", ["one", "two"])
    for job in ids:
        worker.wait_event("done", job_id=job)
    assert not starts(worker, "next")
    # Whoever declares it again need not be a daemon.
    client.channel.exchange_declare("workerd.delay.00", "topic", durable=True)
    client.channel.queue_bind("workerd.delay.00", "workerd.delay.00", "*." * 24 + "1.#")
    worker.wait_event("retry", job_id="bad")
    worker.wait_event("dead letter", job_id="bad", attempt=2)
    worker.wait_event("done", job_id="next")
    oracle.check([*ids, "next"])
    assert starts(worker, "bad") == [1, 2]


def test_a_missing_exchange_disturbs_no_dead_letter(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script = f'[ "$0" = jobs ] && exit 65; until [ -e {gate} ]; do sleep 0.02; done; exit 75'
    text = config(
        broker.url,
        ["sh", "-c", script, "{queue}"],
        handler=attempts(9),
        queues={"jobs": {"concurrency": 8}, "others": {"concurrency": 8}},
        worker={"drain_timeout": "0s"},
    )
    worker = begin(daemon, text)
    client.channel.exchange_delete("workerd.delay.00")
    # Each of their retries ends the channel, and nobody knows what became of what it carried.
    client.publish_jobs("others", [f"other-{number}" for number in range(8)])
    worker.wait_event("start", count=8)
    gate.touch()
    worker.wait_event("retry refused")
    number = 200
    client.publish_jobs("jobs", [f"job-{number}" for number in range(number)])
    worker.wait_event("dead letter", count=number)
    assert not worker.events("dead letter refused")
    client.await_ready("jobs.dead", number)


def test_a_job_that_fails_while_the_levels_are_still_being_declared_waits_for_them(
    broker: Broker, client: Client, daemon: Start
) -> None:
    client.declare("jobs", x_queue_type="quorum")
    client.publish("jobs", message_id="a")
    worker = daemon(config(broker.url, FAILS, handler=attempts(2)))
    worker.wait_event("dead letter", job_id="a", attempt=2)
    assert not worker.events("retry refused")


def test_a_retry_is_not_sent_to_where_nobody_would_get_it(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = begin(daemon, config(broker.url, FAILS, handler=attempts(2)))
    client.channel.queue_delete("jobs.due")
    worker.wait_event("queue paused", queue="jobs.due")
    client.publish("jobs", message_id="a")
    refused = worker.wait_event("retry refused", job_id="a")
    assert refused["text"] == "no queue 'jobs.due'"
    client.declare("jobs.due", x_queue_type="quorum")
    client.channel.queue_bind("jobs.due", "workerd.due", "*." * 25 + "jobs")
    worker.wait_event("retry", job_id="a")
    worker.wait_event("dead letter", job_id="a", attempt=2)
    assert client.ready("workerd.unroutable") == 0


@classic_too
def test_a_retry_whose_confirm_is_lost_is_published_again_and_runs_once(
    broker: Broker, client: Client, daemon: Start, wire: Wire, kind: str
) -> None:
    command = ["sh", "-c", 'test "$WORKERD_ATTEMPT" = 2']
    queues = {"jobs": {"type": kind}}
    worker = begin(daemon, config(wire.url, command, handler=attempts(9), queues=queues))
    # To the daemon it is a confirm.
    wire.hold("to_daemon", at=BASIC_ACK)
    client.publish("jobs", message_id="a")
    until(wire.holds, "the confirm is on its way")
    wire.break_connections()
    worker.wait_event("retry", job_id="a")
    worker.wait_event("done", job_id="a")
    # The copy that was confirmed, or the one that was not: whichever came second.
    worker.wait_event("settled again", job_id="a")
    assert starts(worker, "a") == [1, 2]
    assert worker.stop() == 0
    for queue in ("jobs", "jobs.due", "jobs.dead"):
        broker.await_depth(queue)


def test_two_copies_of_one_retry_run_once_on_a_host(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = config(broker.url, oracle.command(), handler=attempts(3))
    first = begin(daemon, text)
    oracle.hold("a")
    copy = {ATTEMPT: 1, COPY: "mark"}
    client.publish("jobs.due", message_id="a", headers=copy)
    first.wait_event("start", job_id="a")
    # While it runs there, the other one comes to a sibling.
    second = daemon(text, "2")
    second.wait_event("consuming", queue="jobs.due")
    client.publish("jobs.due", message_id="a", headers=copy)
    client.publish("jobs.due", message_id="a", headers=copy)
    second.wait_event("settled again", job_id="a")
    oracle.release()
    first.wait_event("done", job_id="a")
    # The third one, too, has come to one of the two.
    broker.await_depth("jobs.due")
    assert oracle.check(["a"]).starts == {"a": 1}
    assert first.stop() == second.stop() == 0
    broker.await_depth("jobs.due")


def test_a_job_that_cannot_be_retried_before_the_end_has_spent_its_attempt(
    broker: Broker, client: Client, daemon: Start
) -> None:
    options = config(broker.url, FAILS, handler=attempts(9), worker={"drain_timeout": "0s"})
    first = begin(daemon, options)
    client.channel.exchange_delete("workerd.delay.00")
    client.publish("jobs", message_id="a")
    first.wait_event("retry refused", job_id="a")
    assert first.stop() == 0
    client.await_ready("jobs", 1)
    second = daemon(options)
    assert second.wait_event("start", job_id="a")["attempt"] == 2


# One queue full and one deleted


def retried(worker: Daemon, queue: str) -> set[str]:
    """The jobs of a queue that have had a retry."""
    return {event["job_id"] for event in worker.events("retry", queue=queue)}


def test_a_full_and_a_deleted_queue_hold_up_nobodys_delayed_jobs(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    number = 100
    queues = {"full": {"max_length": 1}, "gone": {}, "third": {}}
    script = f'[ "$2" = third ] || exit 1; exec {" ".join(oracle.command("$1"))}'

    def text(**tables: Any) -> str:
        return config(
            broker.url,
            ["sh", "-c", script, "sh", "{id}", "{queue}"],
            # Long enough for all of them to fail, and for the stop: none may come due before.
            handler=attempts(2, delay=f"{5 * SCALE}s"),
            queues={name: {"concurrency": 8, **queue} for name, queue in queues.items()},
            **tables,
        )

    worker = daemon(text())
    for name in queues:
        worker.wait_event("consuming", queue=f"{name}.due")
    for name in ("full", "gone"):
        for n in range(number):
            client.publish(f"{name}.due", message_id=f"{name}-{n}", headers={COPY: f"{n}"})
    for name in ("full", "gone"):
        until(
            lambda name=name: len(retried(worker, name)) == number,  # type: ignore[misc]
            f"all of {name} retried",
        )
    assert worker.stop() == 0
    client.channel.queue_delete("gone")
    client.channel.queue_delete("gone.due")
    client.publish("full", message_id="fill")
    exchange, key = "workerd.delay.00", "0." * 24 + "1.third"
    ids = [f"third-{n}" for n in range(20)]
    for job in ids:
        client.publish(key, exchange=exchange, message_id=job)
    second = daemon(text(worker={"queues": ["third"]}), "2")
    began = time.monotonic()
    for job in ids:
        second.wait_event("done", job_id=job)
    assert time.monotonic() - began < 1.5 + TIMEOUT / 10
    oracle.check(ids)
    client.await_ready("full.due", number)
    client.await_ready("workerd.unroutable", number)


def test_a_job_that_has_become_too_large_for_the_broker_holds_up_no_other(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = begin(daemon, config(broker.url, ["false"], handler=attempts(3)))
    assert worker.stop() == 0
    client.publish("jobs", b"x" * 3_000_000, message_id="large")
    before = broker.eval(
        '{ok, Size} = application:get_env(rabbit, max_message_size), io:format("~w", [Size])'
    )
    smaller = "application:set_env(rabbit, max_message_size, 1000000)"
    broker.eval(f"{smaller}, persistent_term:put(max_message_size, 1000000)")
    try:
        second = daemon(config(broker.url, ["false"], handler=attempts(3)), "2")
        second.wait_event("moved untouched", job_id="large")
        client.publish("jobs", message_id="small")
        second.wait_event("dead letter", job_id="small")
        client.await_ready("jobs.dead", 2)
        assert not second.events("queue paused")
    finally:
        larger = f"application:set_env(rabbit, max_message_size, {before})"
        broker.eval(f"{larger}, persistent_term:put(max_message_size, {before})")
