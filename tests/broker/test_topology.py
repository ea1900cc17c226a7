"""What the daemon declares at its start, said once more: none of it may ever change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika.spec
import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.peer import Peer
from tests.harness.tables import config
from tests.harness.waiting import until

StartDaemon = Callable[..., Daemon]

LIMIT = "x-delivery-limit=1000000"
QUORUM = {"x-queue-type=quorum", LIMIT}
AT_LEAST_ONCE = {"x-dead-letter-strategy=at-least-once", "x-overflow=reject-publish"}


def letters_to(queue: str) -> set[str]:
    return {"x-dead-letter-exchange=", f"x-dead-letter-routing-key={queue}"}


def below(level: int) -> str:
    """Where a delay level sends what has waited there."""
    return f"workerd.delay.{level - 1:02d}" if level else "workerd.due"


QUEUES: dict[str, dict[str, Any]] = {
    "jobs": {},
    "small": {"max_length": 5},
    "old": {"type": "classic"},
    "ranked": {"type": "classic", "max_priority": 5, "max_length": 5},
    "tutorial": {"declare": "plain"},
    "theirs": {"declare": "wait"},
}
EXPECTED = {
    "jobs": QUORUM | AT_LEAST_ONCE | letters_to("jobs.dead"),
    "small": QUORUM | AT_LEAST_ONCE | letters_to("small.dead") | {"x-max-length=5"},
    "old": {"x-queue-type=classic"} | letters_to("old.dead"),
    "ranked": {
        "x-queue-type=classic",
        "x-max-priority=5",
        "x-max-length=5",
        "x-overflow=reject-publish",
    }
    | letters_to("ranked.dead"),
    "tutorial": set(),
    "workerd.unroutable": QUORUM,
    **{f"{queue}.{what}": QUORUM for queue in QUEUES for what in ("dead", "due")},
    **{
        f"workerd.delay.{level:02d}": QUORUM
        | AT_LEAST_ONCE
        | {
            f"x-message-ttl={2**level * 1000}",
            f"x-dead-letter-exchange={below(level)}",
        }
        for level in range(25)
    },
}

# Prints each argument as " name=value".
ARGUMENTS = (
    '[io:format(" ~ts=~ts", [Name, if is_binary(Value) -> Value; '
    "true -> integer_to_list(Value) end]) || {Name, _, Value} <- Arguments]"
)


def queues(broker: Broker) -> dict[str, set[str]]:
    """The arguments of every durable queue of the virtual host."""
    printed = broker.eval(
        f'[begin io:format("~n~ts", [Name]), {ARGUMENTS} end '
        f'|| Q <- rabbit_amqqueue:list(<<"{broker.vhost}">>), amqqueue:is_durable(Q), '
        "{resource, _, queue, Name} <- [amqqueue:get_name(Q)], "
        "Arguments <- [amqqueue:get_arguments(Q)]]"
    )
    return {line.split()[0]: set(line.split()[1:]) for line in printed.split("\n") if line}


def exchanges(broker: Broker) -> dict[str, set[str]]:
    """The type and the arguments of every durable exchange that RabbitMQ did not make itself."""
    printed = broker.eval(
        f'[begin io:format("~n~ts ~s", [Name, Type]), {ARGUMENTS} end '
        f'|| X <- rabbit_exchange:list(<<"{broker.vhost}">>), '
        "[{_, {resource, _, exchange, Name}}, {_, Type}, {_, true}, {_, Arguments}] "
        "<- [rabbit_exchange:info(X, [name, type, durable, arguments])]]"
    )
    lines = [line.split() for line in printed.split("\n") if line.startswith("workerd.")]
    return {name: set(facts) for name, *facts in lines}


def bindings(broker: Broker) -> set[tuple[str, ...]]:
    """Source, kind and name of the destination, and routing key of every binding."""
    printed = broker.eval(
        '[io:format("~n~ts ~s ~ts ~ts", [Source, Kind, Destination, Key]) '
        f'|| B <- rabbit_binding:list(<<"{broker.vhost}">>), '
        "[{_, Source}, {_, Kind}, {_, Destination}, {_, Key}] <- [rabbit_binding:info("
        "B, [source_name, destination_kind, destination_name, routing_key])], Source =/= <<>>]"
    )
    return {tuple(line.split(" ")) for line in printed.split("\n") if line}


def test_the_whole_topology_is_there_after_the_first_start(
    broker: Broker, daemon: StartDaemon
) -> None:
    workerd = daemon(config(broker.url, ["true"], queues=QUEUES))
    for name in QUEUES:
        workerd.wait_event("consuming", queue=f"{name}.due")
    for name in QUEUES.keys() - {"theirs"}:
        workerd.wait_event("consuming", queue=name)
    workerd.wait_event("queue paused", queue="theirs")

    found = queues(broker)
    # RabbitMQ 4 adds the default type to a declaration that names none.
    found["tutorial"].discard("x-queue-type=classic")
    assert {name: found.get(name) for name in EXPECTED} == EXPECTED
    assert set(found) == set(EXPECTED)

    delays = {f"workerd.delay.{level:02d}": {"topic"} for level in range(25)}
    assert exchanges(broker) == delays | {
        "workerd.due": {"topic", "alternate-exchange=workerd.unroutable"},
        "workerd.unroutable": {"fanout"},
    }

    expected = {("workerd.unroutable", "queue", "workerd.unroutable", "")}
    for queue in QUEUES:
        expected.add(("workerd.due", "queue", f"{queue}.due", "*." * 25 + queue))
    for level in range(25):
        name = f"workerd.delay.{level:02d}"
        stars = "*." * (24 - level)
        expected.add((name, "queue", name, f"{stars}1.#"))
        expected.add((name, "exchange", below(level), f"{stars}0.#"))
    assert bindings(broker) == expected
    assert [entry["queue"] for entry in workerd.events(level="warning")] == ["theirs"]


def test_due_jobs_are_bound_to_nothing_while_the_delay_levels_are_not_declared(
    peer: Callable[..., Peer], daemon: StartDaemon
) -> None:
    broker = peer(mute=(pika.spec.Exchange.Declare,))
    # Consuming does not wait for the levels, which never come here.
    daemon(config(broker.url, ["true"])).wait_event("consuming")
    broker.until(
        lambda: any(isinstance(asked, pika.spec.Exchange.Declare) for asked in broker.asked),
        "an exchange declared",
    )
    assert not [asked for asked in broker.asked if isinstance(asked, pika.spec.Queue.Bind)]


def test_a_second_start_finds_the_topology_as_it_declares_it(
    broker: Broker, daemon: StartDaemon
) -> None:
    for start in ("1", "2"):
        workerd = daemon(config(broker.url, ["true"]), instance=start)
        workerd.wait_event("consuming", queue="jobs.due")
        workerd.wait_event("consuming")
        assert workerd.events(level="warning") == []


@pytest.mark.parametrize("heartbeat", [2, 7])
def test_the_heartbeat_is_the_configured_one(
    broker: Broker, daemon: StartDaemon, heartbeat: int
) -> None:
    settings = {"heartbeat": f"{heartbeat}s"}
    daemon(config(broker.url, ["true"], broker=settings)).wait_ready()

    def agreed() -> list[str]:
        printed = broker.eval(
            '[io:format("~w ", [Timeout]) || Pid <- rabbit_networking:local_connections(), '
            "[{timeout, Timeout}] <- [rabbit_reader:info(Pid, [timeout])]]"
        )
        return printed.split()

    # One to consume, one to publish.
    until(lambda: agreed() == [str(heartbeat)] * 2, f"two heartbeats of {heartbeat} s")


def test_a_delayed_job_whose_queue_is_gone_is_kept_aside(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("consuming", queue="jobs.due")
    # One second: bit 0 of the 25 that stand before the queue's name.
    key = "0." * 24 + "1.nobody"
    client.publish(key, b"later", exchange="workerd.delay.00", message_id="a")
    assert client.take("workerd.unroutable")[0].id == "a"


@pytest.mark.parametrize("declare", ["create", "plain", "wait"])
def test_a_stream_is_paused_with_the_reason_and_nothing_of_it_is_consumed(
    broker: Broker, client: Client, daemon: StartDaemon, declare: str
) -> None:
    """ "Used as it is", 5 of 8 confirmed jobs never ran, and nothing was said."""
    client.declare("jobs", x_queue_type="stream")
    queues = {"jobs": {"declare": declare}, "fine": {}}
    worker = daemon(config(broker.url, ["true"], queues=queues))
    paused = worker.wait_event("queue paused", queue="jobs", level="warning")
    assert paused["text"].startswith("jobs is a queue of type stream, which cannot hold jobs")
    worker.wait_event("consuming", queue="fine")
    worker.wait_notify(lambda said: "jobs paused: jobs is a queue of type stream" in said)
    assert not worker.events("consuming", queue="jobs")
